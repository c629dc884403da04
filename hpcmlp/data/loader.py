"""The loader: one rank's share of each global batch, from memory or streamed, the same order either way."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from hpcmlp.data.manifest import Manifest
from hpcmlp.data.order import PIECES, Order
from hpcmlp.data.resident import Resident
from hpcmlp.data.samples import Batch, Samples, allocate, open_shard, read_rows, require_memory, row_bytes
from hpcmlp.errors import ConfigError, DataError, InputMissing

_WINDOW_BYTES = 1 << 22
_WINDOWS_PER_SHARD = 16
_MAX_DEPTH = 8


class Loader:
    """One rank's samples of one split of a data set directory.

    Nothing here talks to other ranks: what is wrong is raised by the rank that sees it. Whether rows are ordered by
    windows is decided from (data set, memory_limit), which all ranks hold; whether a rank then keeps its shards in
    memory or streams them changes nothing but `mode`.

    Parameters
    ----------
    rank, size : this rank among those that share the batches
    global_batch_size : samples per step over all ranks; None for a loader of `sequential` alone
    memory_limit : bytes for the samples of one rank; None: everything stays in memory
    window_rows : rows of a window of the streamed order; default from the data set: `default_window_rows`
    verify : compare the sha256 of each shard that this rank opens, once

    Raises InputMissing (split or shards not there), DataError (damaged, contradictory, not finite, empty), Unavailable
    (not enough memory), ConfigError (memory_limit too small to stream).
    """

    def __init__(self, directory: str | os.PathLike, manifest: Manifest, split: str, rank: int, size: int,
                 global_batch_size: int | None = None, seed: int = 0, shuffle: bool = True,
                 memory_limit: float | None = None, window_rows: int | None = None, verify: bool = True):
        self.directory, self.manifest, self.split = os.fspath(directory), manifest, split
        self.rank, self.size = rank, size
        self.x_dtype = np.dtype(manifest.x_dtype)
        self.num_rows = manifest.rows(split)
        self._verify = verify
        self._verified: set[int] = set()
        self._shard_rows = _check_split(self.directory, manifest, split)
        self._sequential: Samples | None = None
        self._batches: Any = None  # Resident or Streamed
        self.order: Order | None = None
        if global_batch_size is None:
            self.steps_per_epoch = 0
            self.local_rows_max = 0
            self._open_sequential(memory_limit)
        else:
            self._open_batches(global_batch_size, seed, shuffle, memory_limit, window_rows)

    def _open_sequential(self, memory_limit: float | None) -> None:
        begin, end = self._own_rows()
        needed = (end - begin) * row_bytes(self.manifest)
        self.mode = "resident" if memory_limit is None or needed <= memory_limit else "streamed"
        if self.mode == "resident":
            require_memory(needed)
            self._sequential = allocate(end - begin, self.manifest)
            self._read_range(begin, end, self._sequential)

    def _open_batches(self, global_batch_size: int, seed: int, shuffle: bool, memory_limit: float | None,
                      window_rows: int | None) -> None:
        if not self.num_rows:
            raise DataError(f"{self.directory}: split {self.split!r} has no rows; prepare the data set with some.")
        one = row_bytes(self.manifest)
        if memory_limit is None or self.num_rows * one <= memory_limit:
            window_rows = None
        elif window_rows is None:
            window_rows = default_window_rows(self._shard_rows, one, memory_limit)
        self.order = Order(self._shard_rows, global_batch_size, seed, shuffle, window_rows)
        self.steps_per_epoch = self.order.steps_per_epoch
        full, last = self.order.global_rows(0), self.order.global_rows(self.steps_per_epoch - 1)
        self.local_rows_max = max((self.rank + 1) * b // self.size - self.rank * b // self.size for b in (full, last))
        shards = self.order.touched(self.rank, self.size)
        held = sum(self._shard_rows[s] for s in shards) * one
        arguments = (self.directory, self.manifest, self.split, self.order, shards, self.rank, self.size)
        if memory_limit is None or held <= memory_limit:
            self.mode = "resident"
            self._batches = Resident(*arguments, verify=self._verify)
        else:
            self.mode = "streamed"
            from hpcmlp.data.streamed import Streamed  # only where memory is short
            self._batches = Streamed(*arguments, depth=self._depth(shards, memory_limit), verify=self._verify)

    def _depth(self, shards: list[int], memory_limit: float) -> int:
        """Return how many batches are assembled ahead: what the windows leave of the limit, one at least."""
        one = row_bytes(self.manifest)
        windows = 2 * one * sum(min(self.order.window_rows, self._shard_rows[s]) for s in shards)
        batch = one * max(1, self.local_rows_max)
        depth = int((memory_limit - windows) // batch) - 1      # one more is in use
        if depth < 1:
            raise ConfigError(f"memory_limit {memory_limit / 2**20:.4g} MiB is too small to stream split "
                              f"{self.split!r} with {self.size} ranks: windows of {len(shards)} shards and two local "
                              f"batches need {(windows + 2 * batch) / 2**20:.4g} MiB; raise it, or use more ranks.")
        return min(_MAX_DEPTH, depth)

    @property
    def memory_bytes(self) -> int:
        """Bytes of samples that this loader keeps in memory."""
        held = 0 if self._sequential is None else self._sequential.nbytes
        return held + (0 if self._batches is None else self._batches.memory_bytes)

    @property
    def resident(self) -> Resident | None:
        """The shards in memory, where they are there and their order is not one of windows; else None."""
        whole = self.order is not None and self.order.window_rows is None
        return self._batches if whole and isinstance(self._batches, Resident) else None

    def batch(self, epoch: int, t: int) -> Batch:
        """Return this rank's share of global batch `t` of `epoch`; its arrays hold until the next call.

        Local. Any (epoch, t) may be asked for; going on from one to the next is what is fast.
        """
        return self._batches.batch(epoch, t)

    def prefetch(self, epoch: int, t: int) -> None:
        """Prepare batch `t` of `epoch`, which will be asked for next. Local."""
        self._batches.prefetch(epoch, t)

    def sequential(self, max_rows: int) -> Iterator[Batch]:
        """Yield this rank's rows r*N//P .. (r+1)*N//P of the split, in order, at most `max_rows` at a time.

        Local. `first` is the row number in the split, `global_rows` the rows of the split. A batch's arrays hold until
        the next one is asked for. From memory when the loader was made without global_batch_size and the rows fit.
        """
        begin, end = self._own_rows()
        samples = self._sequential
        index = np.arange(min(max_rows, end - begin) if samples is None else end - begin)
        buffer = samples
        for start in range(begin, end, max_rows):
            stop = min(start + max_rows, end)
            at = start - begin
            if samples is None:
                at = 0
                buffer = buffer or allocate(len(index), self.manifest)
                self._read_range(start, stop, buffer)
            rows = slice(at, at + stop - start)
            weights = None if buffer.weight is None else buffer.weight[rows]
            yield Batch(stop - start, start, self.num_rows, buffer.x, index[rows], buffer.y[rows], weights)

    def close(self) -> None:
        """End the prefetch thread and close files. Local."""
        if self._batches is not None:
            self._batches.close()

    def _own_rows(self) -> tuple[int, int]:
        return self.rank * self.num_rows // self.size, (self.rank + 1) * self.num_rows // self.size

    def _read_range(self, start: int, stop: int, out: Samples) -> None:
        """Read rows start..stop of the split, counted through its shards, to the front of `out`."""
        first = 0
        for shard, rows in enumerate(self._shard_rows):
            low, high = max(start, first) - first, min(stop, first + rows) - first
            if low < high:
                verify = self._verify and shard not in self._verified
                self._verified.add(shard)
                with open_shard(self.directory, self.manifest, self.split, shard, verify) as reader:
                    read_rows(reader, self.manifest, low, high, out, first + low - start)
            first += rows


def default_window_rows(shard_rows: list[int], bytes_per_row: int, memory_limit: float) -> int:
    """Return the rows of a window for a split that is larger than `memory_limit` bytes.

    Local. A sixteenth of the largest shard, at most 4 MiB: from the data set alone. Only where two windows of every
    shard would take more than half of the limit (a single rank needs them all) it is halved until they do not.
    """
    rows = max(PIECES, min(_WINDOW_BYTES // bytes_per_row, -(-max(shard_rows) // _WINDOWS_PER_SHARD)))
    while rows > PIECES and 2 * rows * len(shard_rows) * bytes_per_row > memory_limit / 2:
        rows //= 2
    return -(-rows // PIECES) * PIECES


def _check_split(directory: str, manifest: Manifest, split: str) -> list[int]:
    """Return the rows of each shard of the split once all its files are seen to be there."""
    if split not in manifest.splits:
        raise InputMissing(f"{directory}: has no split {split!r}; it has {', '.join(manifest.splits) or 'none'}.")
    try:
        # one listing instead of a look at each file: cheap on parallel file systems with many ranks
        there = set(os.listdir(directory))
    except OSError as error:
        raise InputMissing(f"{directory}: cannot read this data set directory ({error.strerror}).") from None
    missing = [entry.file for entry in manifest.splits[split] if entry.file not in there]
    if missing:
        named = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        raise InputMissing(f"{directory}: shards are missing: {named}; restore them, or prepare the data set again.")
    return [entry.rows for entry in manifest.splits[split]]
