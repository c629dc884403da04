"""Shards: one HDF5 file of samples each, written whole or not at all, judged before the first read.

A shard holds `x` (n, d), `y` (n,) int32 classes or (n, k) float32, optional `weight` (n,) float32, little-endian,
contiguous (or chunked by whole rows when compressed). Contiguous data are read by offset with `pread`, which needs no
lock of libhdf5 and lets other threads run; the guard has checked that the offsets lie inside the file.
"""

import os
from typing import Any

import numpy as np

from hpcmlp.data.files import digest_file, write_atomically
from hpcmlp.data.guard import guarded
from hpcmlp.data.links import Refused, link_kind, open_file
from hpcmlp.data.manifest import FORMAT_VERSION, Manifest, ShardEntry
from hpcmlp.errors import DataError, InputMissing

_CHUNK_BYTES = 1 << 19
_ALIGNMENT = 64


def hdf5_versions() -> dict[str, str]:
    """Return the versions of h5py and of the HDF5 library in it. Local."""
    import h5py
    return {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version}


def shard_name(split: str, number: int, count: int) -> str:
    """Return the file name of a shard. Local."""
    return f"{split}-{number:05d}-of-{count:05d}.h5"


def write_shard(path: str | os.PathLike, x: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None,
                attrs: dict[str, Any] | None = None, compression: str | None = None) -> ShardEntry:
    """Write one shard and return its manifest entry.

    Local. The file is built in memory (libhdf5 never touches the final name), then written beside, synced and renamed:
    twice the shard's size is needed for a moment. The same arrays give the same bytes. Raises CannotWrite.

    Parameters
    ----------
    x : (n, d) of any shard type
    y : (n,) int32 or (n, k) float32
    weight : (n,) float32, optional
    attrs : further attributes of the file (texts and numbers)
    compression : None, "gzip" or "lzf"
    """
    import hashlib

    data = shard_image(x, y, weight, attrs, compression)
    write_atomically(path, data)
    return ShardEntry(os.path.basename(path), int(x.shape[0]), len(data), hashlib.sha256(data).hexdigest())


def shard_image(x: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, attrs: dict[str, Any] | None = None,
                compression: str | None = None) -> bytes:
    """Return the bytes of a shard; see `write_shard`. Local."""
    import h5py

    with h5py.File("shard.h5", "w", driver="core", backing_store=False, alignment_threshold=_ALIGNMENT,
                   alignment_interval=_ALIGNMENT) as file:
        file.attrs["hpcmlp_format"] = FORMAT_VERSION
        for key, value in (attrs or {}).items():
            file.attrs[key] = value
        for name, values in (("x", x), ("y", y), ("weight", weight)):
            if values is None:
                continue
            values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
            options: dict[str, Any] = {}
            if compression and values.size:
                row_bytes = values.nbytes // values.shape[0]
                rows = max(1, min(values.shape[0], _CHUNK_BYTES // max(1, row_bytes)))
                options = dict(chunks=(rows, *values.shape[1:]), compression=compression, shuffle=True)
            file.create_dataset(name, data=values, track_times=False, **options)
        file.flush()
        return file.id.get_file_image()


class ShardReader:
    """Reads ranges of rows of one shard; the file stays open until `close`.

    The constructor opens nothing. `check` runs the guard and compares the shard with its entry in the manifest; it is
    called by the first read when nobody called it before. One thread at a time may read.
    """

    def __init__(self, path: str | os.PathLike, entry: ShardEntry):
        self.path = os.fspath(path)
        self.entry = entry
        self._file: Any = None
        self._handle = -1
        self._datasets: dict[str, Any] = {}

    def check(self, manifest: Manifest | None = None) -> None:
        """Open the shard, run the guard, compare rows, width and types with the entry (and with `manifest`).

        Local. Reads metadata only. Raises InputMissing when the file is not there, DataError for all else.
        """
        if self._file is None:
            self._open()
        try:
            self._check_shapes(manifest)
        except DataError:
            self.close()
            raise

    def _open(self) -> None:
        try:
            self._handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self._handle).st_size
        except OSError as error:
            raise InputMissing(f"{self.path}: cannot read this shard ({error.strerror}).") from None
        try:
            if size != self.entry.bytes:
                what = "truncated" if size < self.entry.bytes else "changed"
                raise DataError(f"{self.path}: {what}: {size} bytes, {self.entry.bytes} expected; prepare the data "
                                "set again or restore this shard.")
            self._file = open_file(self.path)
            for name in ("x", "y", "weight"):
                if name != "weight" or link_kind(self._file, name):
                    self._datasets[name] = self._guarded(name)
        except BaseException:
            self.close()
            raise

    def _guarded(self, name: str) -> Any:
        try:
            return guarded(self._file, name)
        except Refused as error:
            raise DataError(f"{self.path}: data set {name} {error}") from None
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"{self.path}: data set {name} is damaged ({reason}).") from None

    def _check_shapes(self, manifest: Manifest | None) -> None:
        x, y, weight = (self._datasets.get(name) for name in ("x", "y", "weight"))
        if x.ndim != 2 or y.ndim not in (1, 2) or (weight is not None and weight.ndim != 1):
            raise DataError(f"{self.path}: x has shape {x.shape}, y {y.shape}; they must be (n, d) and (n,) or (n, k).")
        for name, dataset in self._datasets.items():
            if dataset.shape[0] != self.entry.rows:
                raise DataError(f"{self.path}: data set {name} has {dataset.shape[0]} rows; the manifest says "
                                f"{self.entry.rows}.")
        if manifest is None:
            return
        classes = manifest.task == "classification"
        wanted = {"x": ((manifest.num_features,), manifest.x_dtype),
                  "y": ((), "int32") if classes else ((manifest.num_outputs,), "float32"), "weight": ((), "float32")}
        for name, dataset in self._datasets.items():
            shape, dtype = wanted[name]
            if dataset.shape[1:] != shape or dataset.dtype != np.dtype(dtype):
                raise DataError(f"{self.path}: data set {name} has rows of shape {dataset.shape[1:]} and type "
                                f"{dataset.dtype}; the data set has {shape} and {dtype}.")
        if manifest.weighted != (weight is not None):
            raise DataError(f"{self.path}: {'no weights' if weight is None else 'weights'} here; the other shards "
                            "disagree.")

    def verify_sha256(self) -> None:
        """Compare the sha256 of the whole file with the manifest's. Local; raises DataError."""
        if digest_file(self.path) != self.entry.sha256:
            raise DataError(f"{self.path}: damaged or changed: its sha256 differs from the manifest's; prepare the "
                            "data set again or restore this shard.")

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return (x, y, weight or None) of rows start..stop as new arrays. Local."""
        if self._file is None:
            self.check()
        out = []
        for name in ("x", "y", "weight"):
            dataset = self._datasets.get(name)
            out.append(None if dataset is None else np.empty((stop - start, *dataset.shape[1:]), _native(dataset)))
        self.read_into(start, stop, *out)
        return tuple(out)

    def read_into(self, start: int, stop: int, x: np.ndarray | None = None, y: np.ndarray | None = None,
                  weight: np.ndarray | None = None) -> None:
        """Read rows start..stop into C-contiguous arrays of the shard's own types; None skips one.

        Local. Raises DataError when the file cannot deliver.
        """
        if self._file is None:
            self.check()
        if not 0 <= start <= stop <= self.entry.rows:
            raise DataError(f"{self.path}: rows {start}..{stop} asked for; it has {self.entry.rows}.")
        for name, out in (("x", x), ("y", y), ("weight", weight)):
            if out is not None and out.size:
                self._read_one(self._datasets[name], name, start, stop, out)

    def _read_one(self, dataset: Any, name: str, start: int, stop: int, out: np.ndarray) -> None:
        offset = dataset.id.get_offset()
        if offset is None or dataset.dtype != out.dtype:
            try:
                dataset.read_direct(out, np.s_[start:stop])
            except (OSError, RuntimeError, ValueError) as error:
                raise DataError(f"{self.path}: data set {name}: rows {start}..{stop} cannot be read "
                                f"({' '.join(str(error).split())[:120]}).") from None
            return
        view = memoryview(out).cast("B")
        offset += start * (view.nbytes // out.shape[0])
        done = 0
        while done < view.nbytes:
            try:
                count = os.preadv(self._handle, [view[done:done + (1 << 30)]], offset + done)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read ({error.strerror}).") from None
            if not count:
                raise DataError(f"{self.path}: truncated while it was read: data set {name} ends early.")
            done += count

    def close(self) -> None:
        """Close the file; a later read opens it again. Local."""
        self._datasets = {}
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _native(dataset: Any) -> np.dtype:
    return dataset.dtype.newbyteorder("=")


def check_values(path: str | os.PathLike, x: np.ndarray, y: np.ndarray, num_classes: int | None = None,
                 first: int = 0) -> None:
    """Raise DataError, with row and column, when a sample cannot be trained on: not finite, or no class.

    Local. `first` is the row number of x[0] in its file. `num_classes` None: y holds numbers, which must be finite.
    """
    if x.dtype.kind == "f":
        place = first_not_finite(x)
        if place is not None:
            row, column = place
            raise DataError(f"{path}: data set x: row {first + row}, column {column} is {x[row, column]}; features "
                            "must be finite: drop or fill such rows with prepare.")
    if num_classes is not None:
        wrong = (y < 0) | (y >= num_classes)
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(f"{path}: data set y: row {first + row} is class {y[row]}; classes are 0 to "
                            f"{num_classes - 1}.")
    elif y.size:
        place = first_not_finite(y.reshape(len(y), -1))
        if place is not None:
            row, column = place
            raise DataError(f"{path}: data set y: row {first + row}, target {column} is "
                            f"{y.reshape(len(y), -1)[row, column]}; targets must be finite.")


def first_not_finite(a: np.ndarray) -> tuple[int, int] | None:
    """Return (row, column) of the first NaN or infinity of a (n, d) array, or None. Local."""
    block = max(1, (1 << 18) // max(1, a.shape[1]))
    for start in range(0, a.shape[0], block):
        fine = np.isfinite(a[start:start + block])
        if not fine.all():
            row, column = np.unravel_index(int(np.argmin(fine)), fine.shape)
            return start + int(row), int(column)
    return None
