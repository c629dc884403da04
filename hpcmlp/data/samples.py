"""Samples in memory: the arrays of a batch, and the checked reading of a shard's rows into them."""

import os
from dataclasses import dataclass

import numpy as np

from hpcmlp.data.manifest import Manifest
from hpcmlp.data.shards import ShardReader, check_values
from hpcmlp.errors import DataError, Unavailable

_BLOCK_BYTES = 1 << 23


@dataclass(slots=True)
class Batch:
    """One rank's share of a global batch: the arguments of `ops.gather`, targets and weights.

    Sample i of the share is row index[i] of `source`, with targets[i] and weights[i]. All arrays belong to the loader
    and hold until its next `batch`.
    """

    rows: int                       # of this rank; may be 0
    first: int                      # place of the first one in the global batch
    global_rows: int                # of the whole global batch
    source: np.ndarray              # (N, d) as stored
    index: np.ndarray               # (rows,) int64
    targets: np.ndarray             # (rows,) int32 or (rows, k) float32
    weights: np.ndarray | None      # (rows,) float32


@dataclass(slots=True)
class Samples:
    """Arrays of n samples: x (n, d), y (n,) or (n, k), weight (n,) or None."""

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return self.x.nbytes + self.y.nbytes + (0 if self.weight is None else self.weight.nbytes)


def row_bytes(manifest: Manifest) -> int:
    """Return the bytes that one sample takes in memory. Local."""
    outputs = 1 if manifest.task == "classification" else manifest.num_outputs
    return np.dtype(manifest.x_dtype).itemsize * manifest.num_features + 4 * outputs + 4 * manifest.weighted


def allocate(num_rows: int, manifest: Manifest) -> Samples:
    """Return uninitialised arrays for `num_rows` samples of the data set.

    Local. Raises Unavailable when the system does not give the memory.
    """
    try:
        x = np.empty((num_rows, manifest.num_features), manifest.x_dtype)
        if manifest.task == "classification":
            y = np.empty(num_rows, np.int32)
        else:
            y = np.empty((num_rows, manifest.num_outputs), np.float32)
        return Samples(x, y, np.empty(num_rows, np.float32) if manifest.weighted else None)
    except (MemoryError, ValueError):
        raise Unavailable(f"{num_rows} samples need {num_rows * row_bytes(manifest) / 2**20:.0f} MiB of memory, which "
                          "the system does not give; use more ranks, or --memory-limit to stream them.") from None


def require_memory(num_bytes: int) -> None:
    """Raise Unavailable when this host has less than `num_bytes` of memory left.

    Local. To be asked before allocating: a kernel that overcommits grants what it lacks and kills the rank later.
    """
    available = available_bytes()
    if available is not None and num_bytes > available:
        raise Unavailable(f"the samples of this rank need {num_bytes / 2**20:.0f} MiB of memory, "
                          f"{available / 2**20:.0f} MiB are available here; use more ranks, or --memory-limit to "
                          "stream them.")


def available_bytes() -> int | None:
    """Return the memory that the kernel thinks it can still give, or None where it does not tell."""
    try:
        with open("/proc/meminfo", "rb") as handle:
            for line in handle:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def open_shard(directory: str | os.PathLike, manifest: Manifest, split: str, shard: int, verify: bool) -> ShardReader:
    """Return the reader of one shard that has passed the guard, agrees with the manifest and, if wanted, its sha256.

    Local. Raises InputMissing or DataError.
    """
    entry = manifest.splits[split][shard]
    reader = ShardReader(os.path.join(directory, entry.file), entry)
    reader.check(manifest)
    if verify:
        try:
            reader.verify_sha256()
        except BaseException:
            reader.close()
            raise
    return reader


def read_rows(reader: ShardReader, manifest: Manifest, start: int, stop: int, out: Samples, at: int) -> None:
    """Read rows start..stop of a shard into `out`, from its row `at` on, and check that they can be trained on.

    Local. Works in blocks of a few MiB. Raises DataError with file, row and column.
    """
    num_classes = manifest.num_outputs if manifest.task == "classification" else None
    block = max(1, _BLOCK_BYTES // row_bytes(manifest))
    for first in range(start, stop, block):
        last = min(first + block, stop)
        rows = slice(at + first - start, at + last - start)
        weight = None if out.weight is None else out.weight[rows]
        reader.read_into(first, last, out.x[rows], out.y[rows], weight)
        check_values(reader.path, out.x[rows], out.y[rows], num_classes, first)
        if weight is not None and not ((weight >= 0) & (weight < np.inf)).all():
            row = int(np.argmin((weight >= 0) & (weight < np.inf)))
            raise DataError(f"{reader.path}: data set weight: row {first + row} is {weight[row]}; weights must be "
                            "finite and not negative.")
