"""idx files (the MNIST format), plain or gzip-compressed: images paired with their labels by name."""

import gzip
import os
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from hpcmlp.data.tables import Rows, Table, numbered, physical_bytes, target_columns, width_of
from hpcmlp.errors import DataError, InputMissing

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DIMENSIONS_LIMIT = 8
_PIECE_BYTES = 1 << 24


class IdxFile:
    """One idx file: its shape, and ranges of its rows. A compressed one is held in memory whole."""

    def __init__(self, path: str | os.PathLike):
        self.name = str(path)
        self._path = Path(path)
        self._held: bytes | None = None
        try:
            with open(path, "rb") as handle:
                compressed = handle.read(2) == b"\x1f\x8b"
            with gzip.open(path, "rb") if compressed else open(path, "rb") as handle:
                self._read_header(handle.read(4 + 4 * _DIMENSIONS_LIMIT))
                expected = self._start + self.shape[0] * self._row_bytes
                size = self._path.stat().st_size
                if compressed:                         # no more than the header declares is inflated, and one byte
                    if expected > physical_bytes():
                        raise DataError(f"{path}: its header declares {self.shape}, {expected} bytes; this machine has "
                                        f"{physical_bytes()}: decompress the file.")
                    handle.seek(0)
                    self._held = _read_up_to(handle, expected + 1)
                    size = len(self._held)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged gzip file ({error}).") from None
        except OSError as error:
            raise InputMissing(f"{path}: cannot read this file ({error.strerror}).") from None
        if expected != size:
            more = " or more" if compressed and size > expected else ""
            raise DataError(f"{path}: its header declares {self.shape}, {expected} bytes; it has {size}{more}.")

    def _read_header(self, head: bytes) -> None:
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or not 0 < head[3] <= _DIMENSIONS_LIMIT or \
                len(head) < 4 + 4 * head[3]:
            raise DataError(f"{self.name}: not an idx file (its first bytes are {head[:4].hex(' ')}).")
        self.shape = tuple(np.frombuffer(head, ">u4", head[3], 4).tolist())
        if not all(self.shape[1:]):
            raise DataError(f"{self.name}: its header declares {self.shape}: no columns.")
        self.dtype = np.dtype(_TYPES[head[2]])
        self._start = 4 + 4 * head[3]
        self._row_bytes = self.dtype.itemsize
        for extent in self.shape[1:]:
            self._row_bytes *= extent

    def _bytes(self, offset: int, count: int) -> bytes:
        if self._held is not None:
            return self._held[offset:offset + count]
        with open(self._path, "rb") as handle:
            handle.seek(offset)
            return handle.read(count)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop, native byte order. Local."""
        data = self._bytes(self._start + start * self._row_bytes, (stop - start) * self._row_bytes)
        if len(data) != (stop - start) * self._row_bytes:
            raise DataError(f"{self.name}: truncated while it was read.")
        values = np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])
        return values.astype(self.dtype.newbyteorder("="))


def _read_up_to(handle: IO[bytes], limit: int) -> bytes:
    """Read at most `limit` bytes, in pieces: a reader that is asked for all at once makes room for all of it first."""
    pieces, left = [], limit
    while left and (piece := handle.read(min(left, _PIECE_BYTES))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


class IdxTable(Table):
    """Images, flattened to rows, with their labels when a file of labels is given."""

    matrix = True

    def __init__(self, images: str | os.PathLike, labels: str | os.PathLike | None = None):
        self._x = IdxFile(images)
        self._y = IdxFile(labels) if labels is not None else None
        self.name = self._x.name
        if len(self._x.shape) < 2:
            raise DataError(f"{images}: has shape {self._x.shape}; images have two or more dimensions (are these the "
                            "labels?).")
        self.num_rows = self._x.shape[0]
        self.columns = numbered("x", width_of(self.name, self._x.shape))
        if self._y is not None:
            if len(self._y.shape) > 2 or self._y.shape[0] != self.num_rows:
                raise DataError(f"{labels}: has shape {self._y.shape}; {images} has {self.num_rows} rows.")
            self.target_names = target_columns(self._y.read(0, 0))

    def read(self, start: int, stop: int) -> Rows:
        rows = {"x": self._x.read(start, stop).reshape(stop - start, len(self.columns))}
        if self._y is not None:
            y = self._y.read(start, stop)
            rows["y"] = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        return rows


def labels_of(images: str | os.PathLike) -> Path | None:
    """Return the file of labels that belongs to a file of images by its name, when it is there. Local."""
    path = Path(images)
    for old, new in (("images", "labels"), ("x", "y")):
        for other in (path.name.replace(old, new), path.name.replace(old, new).replace("idx3", "idx1")):
            for spelling in (other, other.removesuffix(".gz"), other + ".gz"):
                if spelling != path.name and path.with_name(spelling).is_file():
                    return path.with_name(spelling)
    return None
