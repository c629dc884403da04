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

BLOCK = 1 << 15  # elements that change places at once, in the cache


class NarrowUpdate(SlicedUpdate):
    """Narrow reduce-scatter of the gradient, update of this rank's masters, narrow all-gather towards them.

    Parameters are those of `SlicedUpdate`; `params` holds the first parameters, alike on all ranks.
    """

    def __init__(self, collective: Any, buckets: list[Bucket], size: int, params: Any, grads: Any, ops: Any,
                 host: tuple[np.ndarray | None, np.ndarray | None] = (None, None)):
        super().__init__(collective, buckets, size, params, grads, ops, host)
        self._places = self._find_places()
        self._masters = np.empty(sum(stop - start for start, stop in self.ranges), self._sent_params.dtype)
        self._between = np.empty(min(BLOCK, self._masters.size), self._masters.dtype)
        self.take_up({})

    def _find_places(self) -> list[tuple[slice, slice]]:
        """Return for every bucket where this rank's part of it stands in the flat vector, and where in the masters."""
        starts, at = {}, 0
        for start, stop in self.ranges:
            starts[start] = at
            at += stop - start
        places = []
        for start, stop in self._owned:
            first = starts.get(start, 0)
            places.append((slice(start, stop), slice(first, first + stop - start)))
        return places

    def update(self, optimizer: Any, lr: float, step: int, grad_scale: float) -> None:
        """Update the masters, which stand in this rank's ranges of `params` until `share`.

        Collective only for optimizers that need norms.
        """
        for flat, own in self._places:
            self._exchange(self._sent_params[flat], self._masters[own])
            self._params.put(flat.start, flat.stop)
        self._params.settle()
        super().update(optimizer, lr, step, grad_scale)

    def _exchange(self, one: np.ndarray, other: np.ndarray) -> None:
        for start in range(0, one.size, BLOCK):
            piece = slice(start, min(start + BLOCK, one.size))
            between = self._between[:piece.stop - start]
            between[...] = one[piece]
            one[piece] = other[piece]
            other[piece] = between

    def _share_bucket(self, k: int, bucket: Bucket) -> None:
        self.collective.gather_towards(*self._towards(k, bucket))

    def _start_share(self, k: int, bucket: Bucket) -> Any:
        return self.collective.start_gather_towards(*self._towards(k, bucket))

    def _towards(self, k: int, bucket: Bucket) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        _, own = self._places[k]
        return self._sent_params[bucket.start:bucket.stop], bucket.bounds, self._masters[own]

    def carried(self, keep: bool = True) -> dict[str, np.ndarray]:
        """Return the masters too ("master"). Collective."""
        flat = self._kept()
        for place, own in self._places:
            flat[place] = self._masters[own]
        self._gather(flat)
        master = {"master": flat.copy()} if keep else {}
        return {**master, **super().carried(keep)}

    def take_up(self, carried: dict[str, np.ndarray]) -> None:
        """Go on from `carried`; without a "master" in it the parameters are the masters. Local."""
        self._params.fetch(0, self._sent_params.size)()
        for place, own in self._places:     # while an update is under way a master is the replica of these elements
            if "master" in carried:
                self._masters[own] = carried["master"][place]
            else:       # not from what is sent: other ranks of the node may be writing there, the same numbers
                self.ops.to_host(self.params[place], self._masters[own])
        super().take_up({name: flat for name, flat in carried.items() if name != "master"})
