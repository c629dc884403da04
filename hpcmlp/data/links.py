"""Links in HDF5 files, followed by hand: libhdf5 would open whatever file a link names, devices and pipes included."""

import os
from collections.abc import Callable
from typing import Any

from hpcmlp.errors import DataError, HpcmlpError, Unavailable

_STEPS_LIMIT = 8

Welcome = Callable[[str], bool]


class Refused(Exception):
    """Why a data set is not read; the text goes after 'FILE: data set NAME '."""


def link_kind(group: Any, name: str) -> str | None:
    """Return hard, soft, external or odd for the link `name` of an h5py group, None when there is none.

    Local. Nothing is opened: h5py's own `in` and `get` follow the link first.
    """
    import h5py
    try:
        links = group.id.links
        if not links.exists(_raw(name)):
            return None
        kind = links.get_info(_raw(name)).type
    except (AttributeError, KeyError, OSError, RuntimeError, ValueError):
        return None
    return {h5py.h5l.TYPE_HARD: "hard", h5py.h5l.TYPE_SOFT: "soft", h5py.h5l.TYPE_EXTERNAL: "external"}.get(kind, "odd")


def follow(group: Any, path: str, outside: Welcome | None, steps: int = 0) -> Any:
    """Return the object at `path` below an h5py group.

    Local. Soft and external links are followed only where `outside` is given and welcomes the other file's path, at
    most eight of them. Raises Refused.
    """
    for part in [p for p in path.split("/") if p and p != "."]:
        kind = link_kind(group, part)
        if kind is None:
            raise Refused("is not there.")
        try:
            if kind == "hard":
                group = group[part]
                continue
            target = group.id.links.get_val(_raw(part)) if kind in ("soft", "external") else b"?"
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise Refused(f"cannot be opened ({' '.join(str(error).split())[:200]}).") from None
        file, inner = map(os.fsdecode, target) if kind == "external" else ("", os.fsdecode(target))
        place = os.path.join(os.path.dirname(group.file.filename), file)
        if kind == "odd" or outside is None or (file and not outside(place)):
            raise Refused(f"is a link to {file or inner!r}; it must be in the file itself.")
        if steps >= _STEPS_LIMIT:
            raise Refused(f"is reached through more than {_STEPS_LIMIT} links.")
        start = open_beside(place) if file else group.file["/"] if inner.startswith("/") else group
        group = follow(start, inner, outside, steps + 1)
    return group


def open_beside(path: str) -> Any:
    """Open another HDF5 file that a file refers to. Local; raises Refused."""
    try:
        return open_file(path)
    except HpcmlpError as error:
        raise Refused(f"needs another file: {error}") from None


def open_file(path: str | os.PathLike) -> Any:
    """Open an HDF5 file to be read, with no lock where none is to be had.

    Local. Raises DataError when it is no HDF5 file, Unavailable when a lock that the environment insists on is refused.
    """
    import h5py
    try:
        return h5py.File(path, "r", locking="best-effort")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, SystemError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if "lock file" in reason:
            raise Unavailable(f"{path}: its file lock is held by a writer or not supported here, and "
                              f"HDF5_USE_FILE_LOCKING={os.environ.get('HDF5_USE_FILE_LOCKING')} insists on it; set it "
                              "to FALSE.") from None
        raise DataError(f"{path}: not an HDF5 file, or damaged ({reason}).") from None


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
