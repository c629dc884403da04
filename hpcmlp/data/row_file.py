"""One HDF5 file of rows that many ranks fill at once: laid out beforehand, written by offset, published whole.

One rank lays out contiguous data sets in a temporary file and closes it (`lay_out`), so that every row has a known
place; then each rank writes the bytes of its rows there (`RowWriter`) and syncs them; when all have, one rank renames
the file (`publish`). libhdf5 is not asked again: its parallel build is not needed, and no rank's data pass through
another.
"""

import contextlib
import io
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcmlp.data.files import sync_directory, write_failure
from hpcmlp.errors import CannotWrite

Field = tuple[str, tuple[int, ...], np.dtype]  # name, shape with the rows first, dtype; S: texts in UTF-8


def check_new_file(path: str | os.PathLike, replace: bool = False) -> None:
    """Raise CannotWrite when `path` exists and may not be replaced, or its directory is not there. Local."""
    path = Path(path)
    if path.is_dir():
        raise CannotWrite(f"{path}: is a directory; name a file with --out.")
    if path.is_symlink() or (path.exists() and not replace):
        raise CannotWrite(f"{path}: exists already; give --force to replace it, or another --out.")
    if not path.parent.is_dir():
        raise CannotWrite(f"{path}: its directory {path.parent} is not there; make it, or name another --out.")


def lay_out(path: str | os.PathLike, fields: Sequence[Field], attributes: Mapping[str, Any],
            texts: Mapping[str, Sequence[str]]) -> tuple[Path, dict[str, int | None]]:
    """Make the temporary file of `path` with every data set in its place.

    Local: one rank calls it, and removes the file when it is not published. Raises CannotWrite.

    Parameters
    ----------
    fields : the data sets to be filled by rows; little-endian types
    attributes : of the file
    texts : small data sets of texts, written here

    Returns
    -------
    temporary : the file, closed
    offsets : of each field in the file, bytes; None when it is empty
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    offsets: dict[str, int | None] = {}
    laid_out = _Pieces()
    try:
        with h5py.File(laid_out, "w") as file:
            for name, shape, dtype in fields:
                offsets[name] = _place(file, name, shape, dtype)
            for key, value in attributes.items():
                file.attrs[key] = value
            for key, words in texts.items():
                raw = [word.encode() for word in words]
                file.create_dataset(key, data=np.array(raw, _text_type(max(map(len, raw), default=1))),
                                    track_times=False)
        laid_out.store(temporary)
    except OSError as error:
        with contextlib.suppress(OSError):             # where nothing can be written nothing can be removed
            temporary.unlink(missing_ok=True)
        raise CannotWrite(write_failure(path, error, sum(_bytes(s, t) for _, s, t in fields))) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary, offsets


class _Pieces(io.RawIOBase):
    """A file in memory that keeps only what is written: the metadata, a few KB, and not the space for the rows.

    libhdf5 writes here and not to the disk: where that is full it raises, or ends the process by SIGSEGV.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, bytes]] = []
        self._place = self._size = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def truncate(self, size: int | None = None) -> int:
        self._size = self._place if size is None else size
        return self._size

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._pieces.append((self._place, piece))
        self._place += len(piece)
        self._size = max(self._size, self._place)
        return len(piece)

    def readinto(self, out: Any) -> int:
        count = max(0, min(len(out), self._size - self._place))
        out[:count] = bytes(count)
        for start, piece in self._pieces:              # later ones over earlier ones
            low, high = max(start, self._place), min(start + len(piece), self._place + count)
            if low < high:
                out[low - self._place:high - self._place] = piece[low - start:high - start]
        self._place += count
        return count

    def store(self, path: str | os.PathLike) -> None:
        """Write all of it to the new file `path`; raises OSError."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(handle, self._size)
            for start, piece in self._pieces:
                done = 0
                while done < len(piece):
                    done += os.pwrite(handle, piece[done:], start + done)
        finally:
            os.close(handle)


def _place(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int | None:
    """Make one contiguous data set whose space exists at once and is not filled."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = _text_type(dtype.itemsize) if dtype.kind == "S" else dtype
    data = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(kind, logical=True),
                           h5py.h5s.create_simple(shape), plan)
    return data.get_offset()


def _text_type(length: int) -> np.dtype:
    return h5py.string_dtype("utf-8", max(1, length))


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


class RowWriter:
    """Writes rows into a file that `lay_out` has made. Local; several ranks may write different rows at once.

    Raises CannotWrite naming `path`, the name that the file will have.
    """

    def __init__(self, temporary: str | os.PathLike, path: str | os.PathLike, offsets: Mapping[str, int | None]):
        self._path, self._offsets = path, offsets
        try:
            self._handle = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise CannotWrite(write_failure(path, error)) from None

    def write(self, name: str, first: int, values: np.ndarray) -> None:
        """Write `values`, of the field's dtype, as the rows `first`, first + 1, ... of the data set `name`. Local."""
        if values.size == 0:
            return
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        offset = self._offsets[name] + first * (data.nbytes // len(values))
        done = 0
        try:
            while done < data.nbytes:
                done += os.pwrite(self._handle, data[done:], offset + done)
        except OSError as error:
            raise CannotWrite(write_failure(self._path, error, data.nbytes)) from None

    def sync(self) -> None:
        """Return when all that was written is durable. Local."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise CannotWrite(write_failure(self._path, error)) from None

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def publish(temporary: str | os.PathLike, path: str | os.PathLike, replace: bool = False) -> None:
    """Give the finished file its name. Local: one rank, after all have synced. Raises CannotWrite."""
    check_new_file(path, replace)
    try:
        os.rename(temporary, path)
        sync_directory(Path(os.path.abspath(path)).parent)
    except OSError as error:
        raise CannotWrite(write_failure(path, error)) from None
