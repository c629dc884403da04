"""What an HDF5 data set must satisfy before its first byte is read.

libhdf5 follows links out of the file, maps other files into data sets, allocates what a header declares and crashes on
damaged chunk records. Each data set is therefore judged by its metadata alone first: hard links only, no external or
virtual storage, plain numbers, known filters, a size below the limit, a full grid of chunks inside the file.
Cost: linear in the number of chunks, about 1 us each (`chunk_iter`).
"""

import os
from typing import Any

import numpy as np

from hpcmlp.data.links import Refused, Welcome, follow, open_beside

LIMIT_BYTES = 1 << 44
_CHUNK_LIMIT_BYTES = 1 << 28
_INFLATION_LIMIT = 1000
_TEXT_LIMIT_BYTES = 4096
_SOURCES_LIMIT = 10_000
_BUILT_IN_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
_FLETCHER32 = 3


def guarded(file: Any, name: str, limit_bytes: int = LIMIT_BYTES,
            outside: Welcome | None = None, foreign: bool = False) -> Any:
    """Return the data set `name` of the open h5py file once it has passed every check.

    Local. `outside(path)` says whether links and virtual sources to another file `path` are welcome (foreign files
    only; shards take none). `foreign` lets texts of fixed length and compound data sets pass, whose fields the caller
    judges one by one with `check_dtype`. Raises `Refused`.
    """
    dataset = follow(file, name, outside)
    if not hasattr(dataset, "dtype") or not hasattr(dataset, "chunks"):
        raise Refused("is no data set.")
    if not (foreign and dataset.dtype.names):
        check_dtype(dataset.dtype, foreign)
    if dataset.shape is None:
        raise Refused("has no values at all.")
    _check_storage(dataset, limit_bytes, outside)
    return dataset


def check_dtype(dtype: np.dtype, texts: bool = False) -> None:
    """Raise Refused unless `dtype` is plain numbers (or, with `texts`, texts of fixed length). Local."""
    if texts and dtype.kind == "S" and 0 < dtype.itemsize <= _TEXT_LIMIT_BYTES:
        return
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise Refused(f"has type {dtype}; it must hold plain numbers of at most 8 bytes.")


def _check_storage(dataset: Any, limit_bytes: int, outside: Welcome | None) -> None:
    import h5py
    plist = dataset.id.get_create_plist()
    if plist.get_external_count():
        raise Refused(f"keeps its bytes in {os.fsdecode(plist.get_external(0)[0])}; they must be in the file itself.")
    size = dataset.dtype.itemsize
    for extent in dataset.shape:
        size *= int(extent)
    if size > limit_bytes:
        raise Refused(f"declares {size} bytes, shape {dataset.shape}; at most {limit_bytes} are read.")
    file_size = os.path.getsize(dataset.file.filename)
    if dataset.is_virtual:
        _check_sources(dataset, limit_bytes, outside)
        return
    layout = plist.get_layout()
    if layout == h5py.h5d.CHUNKED:
        _check_chunks(dataset, plist, size, file_size)
    elif layout == h5py.h5d.CONTIGUOUS and size:
        stored, offset = dataset.id.get_storage_size(), dataset.id.get_offset()
        if offset is None or not stored:
            raise Refused("was declared and never written.")
        if stored != size or offset + size > file_size:
            raise Refused(f"is cut off: {size} bytes declared, {max(0, min(stored, file_size - offset))} in the file.")


def _check_sources(dataset: Any, limit_bytes: int, outside: Welcome | None) -> None:
    """A virtual data set takes all its values from plain data sets, or libhdf5 fills in, or goes round until it dies.
    """
    directory = os.path.dirname(dataset.file.filename)
    mapped, seen = 0, set()
    for source in dataset.virtual_sources():
        place = os.path.join(directory, source.file_name)
        if outside is None or (source.file_name != "." and not outside(place)):
            raise Refused(f"takes its values from {source.file_name}; they must be in the file itself.")
        mapped += source.vspace.get_select_npoints()
        if (place, source.dset_name) in seen:
            continue
        seen.add((place, source.dset_name))
        if len(seen) > _SOURCES_LIMIT:
            raise Refused(f"takes its values from more than {_SOURCES_LIMIT} data sets.")
        file = dataset.file if source.file_name == "." else open_beside(place)
        try:
            guarded(file, source.dset_name, limit_bytes)
        except Refused as error:
            raise Refused(f"takes its values from {source.dset_name} of {source.file_name}, which {error}") from None
    if mapped < dataset.size:
        raise Refused(f"takes only {mapped} of its {dataset.size} values from other data sets.")


def _check_chunks(dataset: Any, plist: Any, size: int, file_size: int) -> None:
    filters = [plist.get_filter(k) for k in range(plist.get_nfilters())]
    for code, _, _, label in filters:
        if code not in _BUILT_IN_FILTERS and not _filter_available(code):
            raise Refused(f"is compressed by filter {code} ({label.decode('ascii', 'replace') or 'no name'}); install "
                          "the package hdf5plugin, or write the file with gzip.")
    room = dataset.dtype.itemsize * int(np.prod([int(c) for c in dataset.chunks], dtype=object))
    if room > _CHUNK_LIMIT_BYTES:
        raise Refused(f"has chunks of {room} bytes; at most {_CHUNK_LIMIT_BYTES} are read.")
    records: list[Any] = []
    if size:
        dataset.id.chunk_iter(records.append)
    grid = 1
    for extent, chunk in zip(dataset.shape, dataset.chunks, strict=True):
        grid *= -(-int(extent) // int(chunk))
    if len(records) != (grid if size else 0):
        raise Refused(f"holds {len(records)} of its {grid} chunks; the others were never written.")
    least = 5 if any(f[0] == _FLETCHER32 for f in filters) else 1
    for record in records:
        if not (least <= record.size <= 2 * room + 64 and record.byte_offset + record.size <= file_size):
            raise Refused(f"is damaged or cut off: the chunk at {tuple(record.chunk_offset)} is not whole.")
    stored = sum(record.size for record in records)
    if stored and room * len(records) > _INFLATION_LIMIT * stored:
        raise Refused(f"would inflate {stored} stored bytes to {room * len(records)}; at most {_INFLATION_LIMIT} times "
                      "is believed.")


def _filter_available(code: int) -> bool:
    """Whether the optional package of further filters is there and brings this one."""
    import h5py
    try:
        import hdf5plugin  # noqa: F401
    except ImportError:
        return False
    return bool(h5py.h5z.filter_avail(code))
