"""Batches from memory: the shards that a rank touches are read once, and each batch only names rows of them.

Rows are worked out for many steps at once, so that the fixed cost of the keyed order (some 50 us a shard) is spread
over them; a step then takes a few microseconds of slicing.
"""

import os

import numpy as np

from hpcmlp.data.manifest import Manifest
from hpcmlp.data.order import Order, ShardSequence
from hpcmlp.data.samples import Batch, allocate, open_shard, read_rows, require_memory, row_bytes

_PLAN_ROWS = 1 << 13        # local rows planned at once
_PLAN_STEPS = 64


class Resident:
    """One rank's shards of a split in memory.

    Parameters
    ----------
    order : the order of the split
    shards : numbers of the shards to hold: those that (rank, size) touches
    verify : compare each shard's sha256
    """

    def __init__(self, directory: str | os.PathLike, manifest: Manifest, split: str, order: Order, shards: list[int],
                 rank: int, size: int, verify: bool = True):
        self._order = order
        self._rank, self._size = rank, size
        rows = order.shard_rows
        held = rows[shards]
        self._base = dict(zip(shards, (np.cumsum(held) - held).tolist(), strict=True))
        require_memory(int(held.sum()) * row_bytes(manifest))
        self.samples = allocate(int(held.sum()), manifest)
        for shard in shards:
            with open_shard(directory, manifest, split, shard, verify) as reader:
                read_rows(reader, manifest, 0, int(rows[shard]), self.samples, self._base[shard])
        self._sequences: dict[int, ShardSequence] = {}
        self._epoch = -1
        self._t0 = self._t1 = 0
        local_rows = -(-order.global_rows(0) // size)
        self._plan_steps = max(1, min(_PLAN_STEPS, _PLAN_ROWS // max(1, local_rows)))

    @property
    def shards(self) -> list[int]:
        """Numbers of the shards held, one after the other in `samples`."""
        return list(self._base)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the samples held."""
        return self.samples.nbytes

    def prefetch(self, epoch: int, t: int) -> None:
        """Plan batch `t` and those after it, unless they are planned already. Local."""
        if epoch != self._epoch or not self._t0 <= t < self._t1:
            self._plan(epoch, t)

    def batch(self, epoch: int, t: int) -> Batch:
        """Return this rank's share of batch `t` of `epoch`. Local."""
        self.prefetch(epoch, t)
        start, stop = self._bounds[t - self._t0], self._bounds[t - self._t0 + 1]
        weights = None if self._weights is None else self._weights[start:stop]
        global_rows = self._order.global_rows(t)
        return Batch(stop - start, self._rank * global_rows // self._size, global_rows, self.samples.x,
                     self._index[start:stop], self._targets[start:stop], weights)

    def close(self) -> None:
        """Do nothing: no file is open; here so that all kinds of loading end alike. Local."""

    def _plan(self, epoch: int, t: int) -> None:
        """Work out the rows of batches t, t + 1, .. and gather their targets and weights."""
        order = self._order
        if epoch != self._epoch:
            self._sequences = {shard: order.sequence(epoch, shard) for shard in self._base}
        self._epoch = epoch
        self._t0, self._t1 = t, min(t + self._plan_steps, order.steps_per_epoch)
        start, stop = order.parts(self._t0, self._t1, self._rank, self._size)       # (T, S)
        lengths = stop - start
        self._bounds = [0, *np.cumsum(lengths.sum(axis=1)).tolist()]
        # All positions of all steps, step by step and shard by shard within, then one call per shard for its rows.
        flat = lengths.ravel()
        ends = np.cumsum(flat)
        positions = np.arange(int(ends[-1])) + np.repeat(start.ravel() - (ends - flat), flat)
        shard_of = np.repeat(np.tile(np.arange(lengths.shape[1]), lengths.shape[0]), flat)
        self._index = np.empty(len(positions), np.int64)
        for shard in np.flatnonzero(lengths.any(axis=0)).tolist():
            mine = np.flatnonzero(shard_of == shard)
            self._index[mine] = self._sequences[shard].rows(positions[mine]) + self._base[shard]
        self._targets = self.samples.y[self._index]
        self._weights = None if self.samples.weight is None else self.samples.weight[self._index]
