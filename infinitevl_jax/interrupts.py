"""Ctrl-C, SIGTERM and a closed terminal end a command at once: one line, nothing half-written, exit
status 128 + signal.

Nothing is raised for it. A KeyboardInterrupt appears wherever Python happens to be: inside a
callback of the compiler or a finaliser, which abort the process or swallow it, or between threads
of a library that each print a traceback. Instead a thread waits for signals, removes what is under
construction and ends the process, whatever the main thread is doing. Everything that is meant to
last is written under another name and renamed, so there is nothing else to clean up.

Code that has something to do first (finish a step and save it) says so by `postponed`. A handler
that other code installs by signal.signal has its signal to itself; it must not put the former
handler back from within, which would pass for ours.
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
_terminal: list | None = None  # its settings, which readline changes while it waits for a line


def install() -> None:
    """From now on signals end this process as above. To be called in the main thread, first of all.

    A signal that is ignored, or that somebody handles already, stays as it is.
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
    """Within, the folder is removed if a signal ends the process. It is to be renamed when it is
    whole."""
    _under_construction.add(folder)
    try:
        yield
    finally:
        _under_construction.discard(folder)


@contextlib.contextmanager
def postponed(action: Callable[[], None], *names: str) -> Iterator[None]:
    """Within, these signals call `action`, each time, in place of what they do otherwise; SIGINT
    only if it is the first of them.

    Args:
      action: sets a flag, say. It runs in another thread where `install` was called, else in the
        main thread; from any other thread, which cannot listen for signals, nothing is changed.
      names: "SIGINT" and others; one that is ignored stays so.
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
    """Before the main thread ends the process: let the thread that is ending it come first."""
    while _leaving.is_set():
        time.sleep(1)


def _noticed(number, frame) -> None:
    """Python's side of a signal: the thread has been woken already."""


def _watch(reader: socket.socket) -> None:
    while woken := reader.recv(1):
        number = woken[0]
        # Decided here, in one thread: the main thread may be anywhere by now.
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
        start = "\n" if os.isatty(2) else ""  # after ^C, or a bar
        os.write(2, f"{start}{line}\n".encode())
    if _terminal is not None and os.tcgetpgrp(0) == os.getpgrp():
        import termios

        termios.tcsetattr(0, termios.TCSANOW, _terminal)
    # What other threads have to say about their folder's disappearance is of no interest.
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(silence, descriptor)
    for folder in list(_under_construction):
        _remove(folder)
    os._exit(128 + number)


def _remove(folder: Path) -> None:
    """Remove a folder that threads still write into, so that none of them makes it anew."""
    doomed = [folder.with_name(f"{folder.name}.removed{n}") for n in range(3)]
    for place in doomed:
        try:  # from now on nobody renames it to where it would pass for whole
            os.rename(folder, place)
        except OSError:  # it became what it was to be, a moment ago
            break
        with contextlib.suppress(FileExistsError):  # a thread made the folder again
            os.close(
                os.open(folder, os.O_CREAT | os.O_EXCL)
            )  # in a file's place no folder can be made
            break
    for _ in range(3):  # files may still come from calls that were under way
        for place in doomed:
            shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(folder)
