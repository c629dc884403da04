"""Files and directories that appear whole under their name, or not at all."""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from hpcmlp.errors import CannotWrite, InputMissing

_PIECE_BYTES = 1 << 20
_JOIN_BYTES = 1 << 16


def write_atomically(path: str | os.PathLike, data: bytes | bytearray | memoryview) -> None:
    """Write `data` to `path`: a temporary beside it, fsync, rename, fsync of the directory.

    Local. `path` is replaced when it exists. On any failure the temporary is removed, what stood under `path` before
    still stands there, and CannotWrite tells why.
    """
    path = os.fspath(path)
    temporary = _beside(path)
    try:
        write_new(temporary, [data])
        os.rename(temporary, path)
        sync_directory(os.path.dirname(path) or ".")
    except OSError as error:
        _remove(temporary)
        raise CannotWrite(write_failure(path, error, memoryview(data).nbytes)) from None
    except BaseException:
        _remove(temporary)
        raise


def write_new(path: str | os.PathLike, buffers: Iterable[Any], digest: Any = None) -> int:
    """Make the file `path` of `buffers`, one after the other, and sync it; return its size in bytes.

    Local. `digest`: an object of hashlib that takes up all that is written. The name is durable once its directory is
    synced too. Raises OSError, also when something stands there; what was made is then left to the caller.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    size = 0
    try:
        for piece in _pieces(buffers):
            if digest is not None:
                digest.update(piece)
            written = 0
            while written < len(piece):  # a nearly full disk takes a part
                written += os.write(handle, piece[written:])
            size += written
        os.fsync(handle)
    finally:
        os.close(handle)
    return size


def _pieces(buffers: Iterable[Any]) -> Iterator[memoryview]:
    """Cut large buffers and join small ones: few calls, each of a size that stays in the cache."""
    joined = bytearray()
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        if len(joined) + len(view) <= _JOIN_BYTES:
            joined += view
            continue
        if joined:
            yield memoryview(joined)
            joined = bytearray()
        if len(view) <= _JOIN_BYTES:
            joined += view
            continue
        for start in range(0, len(view), _PIECE_BYTES):
            yield view[start:start + _PIECE_BYTES]
    if joined:
        yield memoryview(joined)


def write_failure(path: str | os.PathLike, error: OSError, num_bytes: int = 0) -> str:
    """Return one sentence for a failed write of `num_bytes` to `path`. Local."""
    text = f"{path}: cannot write this file ({error.strerror or error})"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            disk = os.statvfs(os.path.dirname(path) or ".")
            text += f"; {num_bytes} bytes are needed, {disk.f_bavail * disk.f_frsize} are free"
        except OSError:
            text += f"; {num_bytes} bytes are needed"
    return text + "."


def sync_directory(path: str | os.PathLike) -> None:
    """Make the names in the directory `path` durable. Local."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_new_directory(path: str | os.PathLike) -> None:
    """Raise CannotWrite unless `path` can become a new directory: not there, or an empty directory.

    Local.
    """
    try:
        if not os.path.lexists(path):
            return
        if not os.path.isdir(path):
            raise CannotWrite(f"{path}: is there and is no directory; name another --out.")
        if os.listdir(path):
            raise CannotWrite(f"{path}: this directory is not empty; name another --out, or remove it first.")
    except OSError as error:
        raise CannotWrite(f"{path}: cannot look into this directory ({error.strerror}).") from None


def new_directory(path: str | os.PathLike) -> str:
    """Make a fresh directory beside `path`, to be filled and then given that name by `publish_directory`.

    Local. Parents of `path` are made. Raises CannotWrite when `path` is taken or nothing can be written there.
    """
    path = os.path.abspath(path)
    check_new_directory(path)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = _beside(path)
        os.mkdir(temporary)
    except OSError as error:
        raise CannotWrite(f"{path}: cannot make this directory ({error.strerror}).") from None
    return temporary


def publish_directory(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Give the filled directory `temporary` its final name `path`; all of it appears at once.

    Local.
    """
    path = os.path.abspath(path)
    try:
        sync_directory(temporary)
        os.rename(temporary, path)
        sync_directory(os.path.dirname(path))
    except OSError as error:
        raise CannotWrite(f"{path}: cannot put the finished directory in place ({error.strerror}).") from None


def discard_directory(temporary: str | os.PathLike) -> None:
    """Remove an unfinished directory; quiet when that fails, since an error is under way already. Local."""
    import shutil  # after a failure only: it brings eight modules along
    shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: str) -> str:
    """Return a new hidden name in the directory of `path`."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{os.urandom(4).hex()}.partial")


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # not made yet, or out of reach: an error is under way already


def digest_file(path: str | os.PathLike) -> str:
    """Return the sha256 of a file in hexadecimal. Local; raises InputMissing when it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputMissing(f"{path}: cannot read this file ({error.strerror}).") from None
