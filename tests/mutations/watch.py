"""What a case touches: files beside its destination, programs, the network.

Seen by Python's audit events and by a snapshot.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

_CHANGES = {
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
}
_TWO = {"os.rename", "os.link"}
_PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
_NETWORK = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"}
_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Watch:
    """Notes what happens outside `allowed` folders between `start` and `stop`.

    One a process: an audit hook stays for ever.
    """

    def __init__(self, allowed: Iterable[Path]):
        self.always = [os.path.abspath(p) for p in allowed]
        self.allowed: list[str] = []
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)

    def start(self, allowed: Iterable[Path]) -> None:
        self.allowed = [*self.always, *(os.path.abspath(p) for p in allowed)]
        self.on, self.seen = True, []

    def stop(self) -> list[str]:
        self.on = False
        return self.seen

    def _hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            if isinstance(path, str | bytes) and (
                set(mode or "") & set("wax+") or (flags or 0) & _WRITE
            ):
                self._path(event, path)
        elif event in _CHANGES or event in _TWO:
            if not any(
                isinstance(a, int) and a >= 0 for a in args[-1:]
            ):  # relative to an open folder: left to the snapshot
                self._path(event, args[0])
                if event in _TWO:
                    self._path(event, args[1])
        elif event in _PROGRAMS or (event in _NETWORK and getattr(args[0], "family", 2) != 1):
            self.seen.append(f"{event} {args[1:] if event.startswith('socket.') else args!r}"[:200])

    def _path(self, event: str, path) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            full = os.path.abspath(os.fsdecode(path))
            if full != "/dev/null" and not any(
                full == top or full.startswith(top + os.sep) for top in self.allowed
            ):
                self.seen.append(f"{event} {full}"[:300])


def snapshot(root: Path, besides: Iterable[Path]) -> dict[str, tuple]:
    """Names, kinds, sizes and times of everything under `root` except what lies in `besides`."""
    skip, found, waiting = {str(p) for p in besides}, {}, [str(root)]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            if entry.path in skip:
                continue
            facts = entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
                found[entry.path] = (
                    facts.st_mode,
                )  # a folder's own time tells of a partial folder that has come and gone
            else:
                found[entry.path] = (facts.st_mode, facts.st_size, facts.st_mtime_ns)
    return found


def differences(before: dict[str, tuple], after: dict[str, tuple], root: Path) -> list[str]:
    """What came, went or changed."""
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    said = {True: "new", False: "changed"}
    return [
        f"{'gone' if n not in after else said[n not in before]}: {os.path.relpath(n, root)}"
        for n in sorted(changed)
    ]
