"""Signals: Ctrl-C, SIGTERM and a closed terminal end a command with one line and 128 + signal.

A thread waits for signals, removes unfinished output and ends the process. KeyboardInterrupt is not
used: Python may raise it inside a compiler callback or a finaliser, which abort the process or
swallow it, or between threads that then print tracebacks. Final output is always written under
another name and renamed, so nothing else needs cleaning up.

Code that must finish something first, such as a training step, uses `postponed`. A handler that
other code installs by `signal.signal` replaces this one; it must not restore the previous handler
from within itself.
"""

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal was closed"}
_under_construction: set[Path] = set()
_postponed: dict[int, Callable[[], None]] = {}
_leaving = threading.Event()
_terminal: list | None = None  # terminal settings; readline changes them while it reads a line


def install() -> None:
    """Handle signals from now on. Call it first, in the main thread.

    Signals that are ignored or already have a handler are left alone.
    """
    global _terminal
    if os.isatty(0):
        import termios

        _terminal = termios.tcgetattr(0)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for name in _WORDS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (
            signal.SIG_DFL,
            signal.default_int_handler,
        ):
            signal.signal(number, _noticed)
    threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals").start()


@contextlib.contextmanager
def under_construction(folder: Path) -> Iterator[None]:
    """Context manager during which a signal removes `folder`. Rename it when it is complete."""
    _under_construction.add(folder)
    try:
        yield
    finally:
        _under_construction.discard(folder)


@contextlib.contextmanager
def postponed(action: Callable[[], None], *names: str) -> Iterator[None]:
    """Context manager during which signals call `action` instead of ending the process.

    After the first of these signals, SIGINT ends the process as usual.

    Args:
      action: for example sets a flag. It runs in another thread after `install`, else in the main
        thread. Outside the main thread and without `install` nothing changes, because only the main
        thread can handle signals.
      names: signals, such as "SIGINT". Ignored signals stay ignored.
    """
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    ours = [number for number in numbers if signal.getsignal(number) is _noticed]
    usual = {}

    def handle(number, frame) -> None:
        if signal.SIGINT in usual:
            signal.signal(signal.SIGINT, usual[signal.SIGINT])
        action()

    _postponed.update(dict.fromkeys(ours, action))
    if threading.current_thread() is threading.main_thread():
        usual |= {number: signal.signal(number, handle) for number in numbers if number not in ours}
    try:
        yield
    finally:
        for number in ours:
            _postponed.pop(number, None)
        for number, handler in usual.items():
            signal.signal(number, handler)


def wait_if_leaving() -> None:
    """Block if another thread is ending the process. Call it before the main thread exits."""
    while _leaving.is_set():
        time.sleep(1)


def _noticed(number, frame) -> None:
    """Python-level handler of a signal. The thread is woken through the wakeup file descriptor."""


def _watch(reader: socket.socket) -> None:
    while woken := reader.recv(1):
        number = woken[0]
        # Decided in this thread, because the main thread may be anywhere.
        action = _postponed.get(number)
        if action is not None:
            _postponed.pop(signal.SIGINT, None)
            action()
        elif signal.getsignal(number) is _noticed:
            _leave(number)


def _leave(number: int) -> None:
    _leaving.set()
    line = _WORDS[signal.Signals(number).name]
    with contextlib.suppress(OSError):
        start = "\n" if os.isatty(2) else ""  # after ^C or a progress bar
        os.write(2, f"{start}{line}\n".encode())
    if _terminal is not None and os.tcgetpgrp(0) == os.getpgrp():
        import termios

        termios.tcsetattr(0, termios.TCSANOW, _terminal)
    # hides errors of other threads whose folder is removed
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(silence, descriptor)
    for folder in list(_under_construction):
        _remove(folder)
    os._exit(128 + number)


def _remove(folder: Path) -> None:
    """Remove a folder that other threads still write into, and keep them from creating it again."""
    doomed = [folder.with_name(f"{folder.name}.removed{n}") for n in range(3)]
    for place in doomed:
        try:  # from now on no thread can rename the folder to its final name
            os.rename(folder, place)
        except OSError:  # it was renamed to its final name just before
            break
        with contextlib.suppress(FileExistsError):  # a thread created the folder again
            # no folder can be created in the place of a file
            os.close(os.open(folder, os.O_CREAT | os.O_EXCL))
            break
    for _ in range(3):  # pending calls may still create files
        for place in doomed:
            shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(folder)
