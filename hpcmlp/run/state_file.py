"""The file of one state: arrays by name and JSON in HDF5, with digests, and with the rule by which older formats open.

The HDF5 library lays the file out without its data: it writes to an object that keeps the few kilobytes of metadata
and tells where each array will stand. The bytes of the file are then these pieces and the arrays' own memory, in
order, so that no second copy of the state is made, and nothing that takes long holds Python's interpreter lock.
Reading is the same the other way round: the library reads metadata from memory, and arrays are views of that memory.
Arrays of which there is only one at a time are written in their places as they come (`write_streamed`).

Format 2: the data set `meta.json` holds the format, the run's own values and, for every array, type, shape and sha256;
an attribute holds its own sha256. Format 1 had `meta.json` without the table and a sha256 attribute at every array.
A format is never changed: a new one gets the next number, a reader in `_READERS`, and a stored file in the tests.
"""

import hashlib
import io
import json
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

FORMAT_VERSION = 2
META = "meta.json"
_GAP = bytes(1 << 12)
_ALIGNED_FROM, _ALIGNMENT = 1024, 64


@dataclass
class State:
    """What a checkpoint holds: `meta` (JSON values) and `arrays` by path, such as `params/layers.0.weight`."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def group(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays below `name`, by the rest of their path. Local."""
        return {path[len(name) + 1:]: a for path, a in self.arrays.items() if path.startswith(name + "/")}


@dataclass
class Streamed:
    """A state of which there is never more than one array: they are made one after the other, twice.

    `shapes` : of all arrays, by path. `arrays` : called twice; returns an iterator over (path, float32 array), each of
    which holds until the next one is asked for.
    """

    meta: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    arrays: Callable[[], Iterator[tuple[str, np.ndarray]]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays. Local."""
        return 4 * sum(map(math.prod, self.shapes.values()))


class UnknownFormat(Exception):
    """A format that this program does not read; the text names it and those it reads."""


def finite(value: Any) -> Any:
    """Return JSON-able `value` with None in place of numbers that are not finite. Local."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def digest(data: Any) -> str:
    """Return the sha256 of contiguous `data` in hexadecimal. Local."""
    return hashlib.sha256(data).hexdigest()


def file_pieces(state: State) -> Iterator[Any]:
    """Yield the bytes of the file of `state` in order, as buffers; the same state gives the same bytes.

    Local. The arrays must stay as they are until the last piece has been taken. An array that is not contiguous is
    copied while its piece is in use.
    """
    text = _meta_text(state.meta, state.arrays.items())
    keeper, places = _lay_out(text, state.arrays)
    at = 0
    for start, piece in sorted([*keeper.runs(), *places, (keeper.end, b"")], key=lambda entry: entry[0]):
        while at < start:
            gap = _GAP[:start - at]
            yield gap
            at += len(gap)
        if len(piece):
            buffer = memoryview(np.ascontiguousarray(piece).reshape(-1) if isinstance(piece, np.ndarray) else piece)
            yield buffer.cast("B")
            at += buffer.nbytes


def write_streamed(path: Any, state: Streamed) -> None:
    """Make the file `path` of a streamed state, and sync it: the bytes of `file_pieces`, in another order.

    Local. Raises OSError; what was made is then left to the caller.
    """
    text = _meta_text(state.meta, state.arrays())
    number = np.float32(0)      # stands for arrays that are still to come
    keeper, places = _lay_out(text, {name: np.broadcast_to(number, shape) for name, shape in state.shapes.items()})
    offsets = dict(zip((META, *(name for name, shape in state.shapes.items() if math.prod(shape))),
                       (offset for offset, _ in places), strict=True))
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        os.truncate(handle, keeper.end)
        for offset, run in keeper.runs():
            _write_at(handle, offset, run)
        _write_at(handle, offsets[META], text)
        for name, array in state.arrays():
            if array.size:
                _write_at(handle, offsets[name], np.ascontiguousarray(array).reshape(-1))
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_at(handle: int, offset: int, data: Any) -> None:
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):     # a nearly full disk takes a part
        done += os.pwrite(handle, view[done:], offset + done)


def _meta_text(meta: dict[str, Any], arrays: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
    """Return the content of META: the values of the run, and what every array is."""
    table = {path: {"dtype": a.dtype.str, "shape": list(a.shape), "sha256": digest(np.ascontiguousarray(a))}
             for path, a in arrays}
    values = {"format_version": FORMAT_VERSION, "meta": finite(meta), "arrays": table}
    return np.frombuffer(json.dumps(values, allow_nan=False, sort_keys=True).encode(), np.uint8)


def _lay_out(text: np.ndarray, arrays: dict[str, np.ndarray]) -> "tuple[_Keeper, list[tuple[int, np.ndarray]]]":
    """Return what the HDF5 library writes of a file, and (offset, array) of the data, which it leaves to others."""
    keeper, places = _Keeper(), []
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    with h5py.File(keeper, "w", alignment_threshold=_ALIGNED_FROM, alignment_interval=_ALIGNMENT) as file:
        file.attrs["format_version"] = FORMAT_VERSION
        for path, array in ((META, text), *arrays.items()):
            group, _, name = path.rpartition("/")
            home = file.require_group(group) if group else file
            data = h5py.h5d.create(home.id, name.encode(), h5py.h5t.py_create(array.dtype),
                                   h5py.h5s.create_simple(array.shape), layout)
            if array.size:
                places.append((data.get_offset(), array))
        file[META].attrs["sha256"] = digest(text)
    return keeper, places


class _Keeper:
    """A file of which only the written bytes are kept. Zeros stand between them."""

    def __init__(self) -> None:
        self._written: dict[int, bytes] = {}
        self._at = self.end = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        data = bytes(data)
        self._written.pop(self._at, None)  # the order is that of the last writing
        self._written[self._at] = data
        self._at += len(data)
        self.end = max(self.end, self._at)
        return len(data)

    def readinto(self, buffer: Any) -> int:
        start, length = self._at, len(buffer)
        out = bytearray(length)
        for at, data in self._written.items():
            low, high = max(at, start), min(at + len(data), start + length)
            if low < high:
                out[low - start:high - start] = data[low - at:high - at]
        buffer[:] = out
        self._at += length
        return length

    def read(self, length: int = -1) -> bytes:
        raise OSError("the library reads into its own memory")

    def truncate(self, length: int | None = None) -> int:
        self.end = self._at if length is None else length
        return self.end

    def flush(self) -> None:
        pass

    def runs(self) -> list[tuple[int, bytes]]:
        """Return what was written last at every place, as (offset, bytes) that neither overlap nor touch."""
        bounds: list[list[int]] = []
        for at, data in sorted(self._written.items()):
            if bounds and at <= bounds[-1][1]:
                bounds[-1][1] = max(bounds[-1][1], at + len(data))
            else:
                bounds.append([at, at + len(data)])
        runs = [(start, bytearray(stop - start)) for start, stop in bounds]
        starts = [start for start, _ in runs]
        for at, data in self._written.items():
            start, run = runs[bisect_right(starts, at) - 1]
            run[at - start:at - start + len(data)] = data
        return [(start, bytes(run)) for start, run in runs]


def parse(image: np.ndarray, check_arrays: bool = True) -> State:
    """Return the state that the bytes `image` ((n,) uint8) of a file hold; its arrays are views of `image`.

    Local. `check_arrays`: compare the sha256 of every array; False only where that of the whole file has been
    compared. Raises ValueError saying what is damaged, UnknownFormat for a format that is none of ours.
    """
    try:
        with h5py.File(_Reader(image), "r") as file:
            version = int(file.attrs["format_version"])
            if version not in _READERS:
                known = ", ".join(map(str, sorted(_READERS)))
                raise UnknownFormat(f"checkpoint format {version}; this program reads {known}")
            return _READERS[version](file, image, check_arrays)
    except (OSError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


class _Reader(io.RawIOBase):
    """The bytes of an array as a file, without a copy of it."""

    def __init__(self, image: np.ndarray):
        self._view, self._at = memoryview(image), 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._view))[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._at:self._at + len(buffer)]
        buffer[:len(part)] = part
        self._at += len(part)
        return len(part)


def _read_2(file: h5py.File, image: np.ndarray, check_arrays: bool) -> State:
    text = _array(file, META, image)
    if digest(text) != file[META].attrs["sha256"]:
        raise ValueError(f"sha256 of {META} differs")
    values = json.loads(text.tobytes())
    arrays = {}
    for path, told in values["arrays"].items():
        array = arrays[path] = _array(file, path, image)
        if array.dtype.str != told["dtype"] or list(array.shape) != told["shape"]:
            raise ValueError(f"{path} is {array.dtype.str} {array.shape}, {told['dtype']} {told['shape']} expected")
        if check_arrays and digest(array) != told["sha256"]:
            raise ValueError(f"sha256 of {path} differs")
    return State(values["meta"], arrays)


def _read_1(file: h5py.File, image: np.ndarray, check_arrays: bool) -> State:
    """Format 1: every array with its own attribute, and no table of them. The values have been the same since."""
    paths: list[str] = []
    file.visititems(lambda path, item: paths.append(path) if isinstance(item, h5py.Dataset) else None)
    arrays = {path: _array(file, path, image) for path in paths}
    for path, array in arrays.items():
        if (check_arrays or path == META) and digest(array) != file[path].attrs["sha256"]:
            raise ValueError(f"sha256 of {path} differs")
    return State(json.loads(arrays.pop(META).tobytes()), arrays)


_READERS = {1: _read_1, 2: _read_2}


def _array(file: h5py.File, path: str, image: np.ndarray) -> np.ndarray:
    """Return the array at `path` from `image`; the HDF5 library itself reads no data."""
    item = file[path]
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiu" or item.chunks is not None \
            or item.external or item.is_virtual:
        raise ValueError(f"{path} is no plain array")
    size = item.dtype.itemsize * math.prod(int(extent) for extent in item.shape)
    if not size:
        return np.empty(item.shape, item.dtype)
    start = item.id.get_offset()
    if start is None or item.id.get_storage_size() != size or start + size > image.size:
        raise ValueError(f"{path} is cut off")
    data = image[start:start + size]
    if start % item.dtype.itemsize:
        data = data.copy()
    return data.view(item.dtype).reshape(item.shape)
