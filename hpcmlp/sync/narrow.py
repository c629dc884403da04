"""The sliced update over a narrow wire: owners hold exact parameters, all ranks equal replicas that follow them.

Each rank keeps a float32 master of its slice, which the optimizer updates. Sharing sends, rounded, how far the masters
are from the replicas, and every rank adds the same decoded differences (`comm.ring_wire.WireRing.gather_towards`): the
replicas stay float32 with the same bits on all ranks, and nothing is lost, for the next difference holds what was
rounded away. Gradients, validation, the best state and the final model are those of the replicas; the average of the
weights and the optimizer follow the masters. A step that is skipped changes neither. Memory: the size of the slice once
more.
"""

from typing import Any

import numpy as np

from hpcmlp.sync.buckets import Bucket
from hpcmlp.sync.strategy import SlicedUpdate


class NarrowUpdate(SlicedUpdate):
    """Narrow reduce-scatter of the gradient, update of this rank's masters, narrow all-gather towards them.

    Parameters are those of `SlicedUpdate`; `params` holds the first parameters, alike on all ranks.
    """

    def __init__(self, collective: Any, buckets: list[Bucket], size: int, params: Any, grads: Any, ops: Any):
        super().__init__(collective, buckets, size, params, grads, ops)
        self._places = self._find_places()
        largest = max((own.stop - own.start for _, own in self._places), default=0)
        self._swapped = ops.empty((largest,), params.dtype)
        if self._staged:
            ops.to_host(params, self._host_params)
        self._set_masters(self._host_params)

    def _find_places(self) -> list[tuple[slice, slice]]:
        """Return for every bucket where this rank's part of it stands in the flat vector, and where in the masters."""
        starts, at = {}, 0
        for start, stop in self.ranges:
            starts[start] = at
            at += stop - start
        places = []
        for bucket in self.buckets:
            start, stop = (bucket.start + int(b) for b in bucket.bounds[self.collective.part:][:2])
            first = starts.get(start, 0)
            places.append((slice(start, stop), slice(first, first + stop - start)))
        return places

    def _set_masters(self, flat: np.ndarray) -> None:
        self._masters = self.owned(flat)     # while an update is under way: the replica of this rank's slice
        self._host_masters = np.zeros(self._masters.shape, self._masters.dtype) if self._staged else self._masters

    def _swap(self) -> None:
        """Exchange the masters and what stands in this rank's ranges of `params`."""
        for flat, own in self._places:
            between = self._swapped[:own.stop - own.start]
            between[...] = self._masters[own]
            self._masters[own] = self.params[flat]
            self.params[flat] = between

    def update(self, optimizer: Any, lr: float, step: int, grad_scale: float) -> None:
        """Update the masters, which stand in this rank's ranges of `params` until `share`.

        Collective only for optimizers that need norms.
        """
        self._swap()
        super().update(optimizer, lr, step, grad_scale)

    def _offer(self) -> None:
        self._swap()
        if self._staged:
            self.ops.to_host(self._masters, self._host_masters)

    def _share_bucket(self, k: int, bucket: Bucket) -> None:
        self.collective.gather_towards(*self._towards(k, bucket))

    def _start_share(self, k: int, bucket: Bucket) -> Any:
        return self.collective.start_gather_towards(*self._towards(k, bucket))

    def _towards(self, k: int, bucket: Bucket) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        _, own = self._places[k]
        return self._host_params[bucket.start:bucket.stop], bucket.bounds, self._host_masters[own]

    def carried(self) -> dict[str, np.ndarray]:
        """Return the masters too ("master"). Collective."""
        return {"master": self.whole(self._masters), **super().carried()}

    def take_up(self, carried: dict[str, np.ndarray]) -> None:
        """Go on from `carried`; without a "master" in it the parameters are the masters. Local."""
        if self._staged:
            self.ops.to_host(self.params, self._host_params)
        self._set_masters(carried.get("master", self._host_params))
        super().take_up({name: flat for name, flat in carried.items() if name != "master"})
