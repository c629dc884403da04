"""Files and directories that appear whole under their name, or not at all."""

import errno
import hashlib
import os
import secrets
import shutil
from pathlib import Path

from hpcmlp.errors import CannotWrite, InputMissing

_PIECE_BYTES = 1 << 24


def write_atomically(path: str | os.PathLike, data: bytes | bytearray | memoryview) -> None:
    """Write `data` to `path`: a temporary beside it, fsync, rename, fsync of the directory.

    Local. `path` is replaced when it exists. On any failure the temporary is removed, what stood under `path` before
    still stands there, and CannotWrite tells why.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    view = memoryview(data).cast("B")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            written = 0
            while written < len(view):
                written += os.write(handle, view[written:written + _PIECE_BYTES])
            os.fsync(handle)
        finally:
            os.close(handle)
        os.rename(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CannotWrite(write_failure(path, error, len(view))) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_failure(path: str | os.PathLike, error: OSError, num_bytes: int = 0) -> str:
    """Return one sentence for a failed write of `num_bytes` to `path`. Local."""
    text = f"{path}: cannot write this file ({error.strerror or error})"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            disk = os.statvfs(Path(path).parent)
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
    path = Path(path)
    try:
        if not path.exists() and not path.is_symlink():
            return
        if not path.is_dir():
            raise CannotWrite(f"{path}: is there and is no directory; name another --out.")
        if any(path.iterdir()):
            raise CannotWrite(f"{path}: this directory is not empty; name another --out, or remove it first.")
    except OSError as error:
        raise CannotWrite(f"{path}: cannot look into this directory ({error.strerror}).") from None


def new_directory(path: str | os.PathLike) -> Path:
    """Make a fresh directory beside `path`, to be filled and then given that name by `publish_directory`.

    Local. Parents of `path` are made. Raises CannotWrite when `path` is taken or nothing can be written there.
    """
    path = Path(os.path.abspath(path))
    check_new_directory(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        temporary.mkdir()
    except OSError as error:
        raise CannotWrite(f"{path}: cannot make this directory ({error.strerror}).") from None
    return temporary


def publish_directory(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Give the filled directory `temporary` its final name `path`; all of it appears at once.

    Local.
    """
    path = Path(os.path.abspath(path))
    try:
        sync_directory(temporary)
        os.rename(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise CannotWrite(f"{path}: cannot put the finished directory in place ({error.strerror}).") from None


def discard_directory(temporary: str | os.PathLike) -> None:
    """Remove an unfinished directory; quiet when that fails, since an error is under way already. Local."""
    shutil.rmtree(temporary, ignore_errors=True)


def digest_file(path: str | os.PathLike) -> str:
    """Return the sha256 of a file in hexadecimal. Local; raises InputMissing when it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputMissing(f"{path}: cannot read this file ({error.strerror}).") from None
