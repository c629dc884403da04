"""The file operations of a piece of code, as the operating system gets them: recorded, left out, failing, or the last.

Every function of `os` by which hpcmlp changes files is wrapped while the recorder is active, so that the trace is that
of the real code, in order, with the bytes written. Reads are not recorded.
"""

import os
import shutil  # noqa: F401  it looks at the functions of `os` when it is imported: before they are wrapped
from collections.abc import Callable
from typing import Any

WRAPPED = ("open", "close", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")


class Killed(BaseException):
    """The process is no more: this operation and all that would follow did not happen."""


class FileCalls:
    """Record the file operations below `root` while used as a context manager.

    decide : called as decide(number, name, path) before each operation that changes something; it may return None,
        "skip" (pretend that it was done), or raise, an OSError or `Killed`. After `Killed` nothing is done any more.

    `events` are tuples: ("mkdir", path), ("create", path), ("write", path, offset, bytes), ("fsync", path),
    ("rename", from, to), ("unlink", path), ("rmdir", path), and whatever `note` adds.
    """

    def __init__(self, root: str | os.PathLike, decide: Callable[[int, str, str], str | None] | None = None):
        self.root, self.decide = os.path.abspath(root), decide
        self.events: list[tuple] = []
        self.number = 0
        self._paths: dict[int, str] = {}
        self._places: dict[int, int] = {}
        self._dead = False
        self._real = {name: getattr(os, name) for name in WRAPPED}

    def __enter__(self) -> "FileCalls":
        for name in WRAPPED:
            setattr(os, name, getattr(self, f"_{name}"))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)

    def note(self, *event: Any) -> None:
        """Put an event of the caller's own into the trace."""
        self.events.append(event)

    def revive(self) -> None:
        """Go on after `Killed`, as another process would."""
        self._dead = False

    def _below(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + os.sep)

    def _full(self, path: Any, dir_fd: int | None = None) -> str:
        base = os.getcwd() if dir_fd is None else self._paths.get(dir_fd, "")
        return os.path.normpath(os.path.join(base, os.fspath(path)))

    def _do(self, event: tuple, real: Callable[[], Any], pretend: Any = None) -> Any:
        if self._dead:
            raise Killed
        path = event[1]
        if not self._below(path):
            return real()
        number, self.number = self.number, self.number + 1
        if self.decide is not None:
            try:
                if self.decide(number, event[0], path) == "skip":
                    return pretend
            except Killed:
                self._dead = True
                raise
        result = real()
        self.events.append(event)
        return result

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        full = self._full(path, dir_fd)
        if flags & os.O_CREAT:
            handle = self._do(("create", full), lambda: self._real["open"](path, flags, mode, dir_fd=dir_fd))
        else:
            handle = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        self._paths[handle], self._places[handle] = full, 0
        return handle

    def _close(self, handle: int) -> None:
        self._paths.pop(handle, None)
        self._real["close"](handle)

    def _write(self, handle: int, data: Any) -> int:
        if handle not in self._paths:
            return self._real["write"](handle, data)
        at, taken = self._places[handle], bytes(data)
        size = self._do(("write", self._paths[handle], at, taken), lambda: self._real["write"](handle, taken),
                        len(taken))
        self._places[handle] = at + size
        return size

    def _fsync(self, handle: int) -> None:
        self._do(("fsync", self._paths.get(handle, "")), lambda: self._real["fsync"](handle))

    def _rename(self, source: Any, target: Any, **how: Any) -> None:
        self._do(("rename", self._full(source), self._full(target)),
                 lambda: self._real["rename"](source, target, **how))

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._do(("mkdir", self._full(path, dir_fd)), lambda: self._real["mkdir"](path, mode, dir_fd=dir_fd))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._do(("unlink", self._full(path, dir_fd)), lambda: self._real["unlink"](path, dir_fd=dir_fd))

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._do(("rmdir", self._full(path, dir_fd)), lambda: self._real["rmdir"](path, dir_fd=dir_fd))
