"""What a shard file holds, told without a manifest: arrays, layout, attributes, classes."""

import os
from typing import Any

import numpy as np

from hpcmlp.data.files import digest_file
from hpcmlp.data.guard import guarded
from hpcmlp.data.links import Refused, link_kind, open_file
from hpcmlp.data.manifest import ShardEntry
from hpcmlp.data.shards import ShardReader, check_values
from hpcmlp.errors import DataError, InputMissing

_BLOCK_BYTES = 1 << 23
_MAX_ATTRIBUTES = 32
_MAX_CLASSES_COUNTED = 1000


def describe_shard(path: str | os.PathLike, verify: bool = True) -> dict[str, Any]:
    """Return what a shard holds, as JSON-able values; with `verify` every row is read and checked.

    Local. Nothing is read before the guard has passed it. Raises InputMissing or DataError.

    Returns
    -------
    rows, bytes, attributes, arrays (name -> shape, dtype, layout, compression); with `verify` also sha256, class_counts
    (for integer y below a thousand classes) or y_mean and y_std
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb"):
            pass
    except OSError as error:
        raise InputMissing(f"{path}: cannot read this file ({error.strerror}).") from None
    try:
        with open_file(path) as file:
            arrays = {name: _facts(guarded(file, name)) for name in ("x", "y", "weight")
                      if name != "weight" or link_kind(file, name)}
            attributes = _attributes(file)
    except Refused as error:
        raise DataError(f"{path}: this is no shard: x, y or weight {error}") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an HDF5 file, or damaged ({' '.join(str(error).split())[:120]}).") from None
    rows = arrays["x"]["shape"][0] if arrays["x"]["shape"] else 0
    out = {"rows": rows, "bytes": size, "attributes": attributes, "arrays": arrays}
    entry = ShardEntry(os.path.basename(path), rows, size, "")
    with ShardReader(path, entry) as reader:
        reader.check()
        if verify:
            row_bytes = sum(np.dtype(a["dtype"]).itemsize * int(np.prod(a["shape"][1:])) for a in arrays.values())
            out |= {"sha256": digest_file(path), **_scan(reader, row_bytes)}
    return out


def _facts(dataset: Any) -> dict[str, Any]:
    return {"shape": list(dataset.shape), "dtype": str(dataset.dtype),
            "layout": "contiguous" if dataset.chunks is None else f"chunks of {dataset.chunks[0]} rows",
            "compression": dataset.compression}


def _attributes(file: Any) -> dict[str, Any]:
    """Numbers and short texts among the file's attributes."""
    out: dict[str, Any] = {}
    for name in list(file.attrs)[:_MAX_ATTRIBUTES]:
        value = file.attrs[name]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str | int | float):
            out[str(name)] = value[:200] if isinstance(value, str) else value
    return out


def _scan(reader: ShardReader, row_bytes: int) -> dict[str, Any]:
    """Read all rows, check that they are finite, and sum up the targets."""
    rows, block = reader.entry.rows, max(1, _BLOCK_BYTES // max(1, row_bytes))
    counts = np.zeros(0, np.int64)
    total = squares = 0.0
    classes = False
    for start in range(0, rows, block):
        x, y, _ = reader.read(start, min(start + block, rows))
        classes = y.dtype.kind in "iu" and y.ndim == 1
        check_values(reader.path, x, y, 2**31 if classes else None, start)
        if classes and y.max() < _MAX_CLASSES_COUNTED:
            here = np.bincount(y, minlength=len(counts))
            here[:len(counts)] += counts
            counts = here
        elif not classes:
            total = total + y.sum(axis=0, dtype=np.float64)
            squares = squares + np.square(y, dtype=np.float64).sum(axis=0)
    if classes:
        return {"class_counts": counts.tolist()} if counts.sum() == rows else {}
    mean = total / max(1, rows)
    std = np.sqrt(np.maximum(squares / max(1, rows) - mean * mean, 0.0))
    return {"y_mean": np.atleast_1d(mean).tolist(), "y_std": np.atleast_1d(std).tolist()} if rows else {}
