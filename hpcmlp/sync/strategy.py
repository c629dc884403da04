"""How gradients become equal updates on all ranks: sliced between the halves of the ring, or whole as the oracle.

`SlicedUpdate`: reduce-scatter, the owner updates its slice, all-gather. Optimizer state and update time fall as
1/size; the bytes on the wire are those of an all-reduce, 2 (size - 1)/size x parameters x width per rank.
(Rajbhandari et al. 2020, ZeRO, stage 1; the ring is that of Patarasuk and Yuan 2009.)
`WholeUpdate`: all-reduce, then every rank updates everything: the plain form that the other is compared with.
`narrow.NarrowUpdate`: as `SlicedUpdate`, with a collective that rounds what it sends.
`overlap.Overlapped`: either of the two, with messages that travel while the ranks compute.

A strategy takes flat vectors and a collective; it knows neither networks nor MPI.
"""

import math
from typing import Any

import numpy as np

from hpcmlp.sync.buckets import Bucket, owned_ranges


class SlicedUpdate:
    """Reduce-scatter of the gradient, update of this rank's slice, all-gather of the parameters.

    Parameters
    ----------
    collective : `comm.ring.Ring` or one with the same methods; its `part` says which part of a bucket is this rank's.
    buckets : as `buckets.cut` returns them.
    size : the number of ranks.
    params, grads : flat vectors of one dtype, on the device or on the host (there `params` may be common to a node).
    ops : the arithmetic; when its arrays are on a device, messages are staged through host copies: a bucket is copied
        while the one before it is on its way between the ranks; with `ops.device.DirectOps` they need none.
    host : vectors on the host, as the collective likes them, for the copies of params and grads; None: made here.

    Attributes
    ----------
    overlaps : whether messages travel while the ranks compute; see `overlap.Overlapped`.
    """

    overlaps = False

    def __init__(self, collective: Any, buckets: list[Bucket], size: int, params: Any, grads: Any, ops: Any,
                 host: tuple[np.ndarray | None, np.ndarray | None] = (None, None)):
        self.collective, self.buckets, self.size = collective, buckets, size
        self.params, self.grads, self.ops = params, grads, ops
        self.ranges = self._ranges()
        self._owned = [self._own(bucket) for bucket in buckets]
        self._params, self._grads = ops.stage(params, host[0]), ops.stage(grads, host[1])
        self._sent_params, self._sent_grads = self._params.sent, self._grads.sent
        # The collectives prepare their messages per array: kept arrays make that a cost of the first call only.
        self._square = np.zeros(1, dtype=np.float64)
        self._gathered: np.ndarray | None = None

    def _ranges(self) -> list[tuple[int, int]]:
        return owned_ranges(self.buckets, self.collective.part)

    def _own(self, bucket: Bucket) -> tuple[int, int]:
        """The range of a bucket that this rank updates."""
        first, stop = bucket.bounds[self.collective.part:][:2]
        return bucket.start + int(first), bucket.start + int(stop)

    def go_on(self, collective: Any, buckets: list[Bucket], size: int) -> None:
        """Use another collective among other ranks; this rank's ranges must be the ones it had. Local."""
        self.collective, self.buckets, self.size = collective, buckets, size
        self._owned = [self._own(bucket) for bucket in buckets]
        assert self._ranges() == self.ranges

    def reduce(self, words: np.ndarray) -> None:
        """Sum the gradient and the control words over the ranks.

        Collective. Afterwards `grads` holds the sum in this rank's ranges (elsewhere anything), `words` the sums.
        """
        arrivals = [self._grads.fetch(bucket.start, bucket.stop) for bucket in self.buckets]
        last = len(self.buckets) - 1
        for k, bucket in enumerate(self.buckets):
            arrivals[k]()
            self._reduce_bucket(self._sent_grads[bucket.start:bucket.stop], bucket, words if k == last else None)
            self._grads.put(*self._owned[k])
        self._grads.settle()

    def _reduce_bucket(self, part: np.ndarray, bucket: Bucket, words: np.ndarray | None) -> None:
        self.collective.reduce_scatter(part, bucket.bounds, words)

    def sum_over_owners(self, value: np.ndarray) -> None:
        """Sum a small float64 array over the owners of the slices, in place. Collective."""
        self.collective.all_reduce(value)

    def grad_norm(self) -> float:
        """Return the Euclidean norm of the summed gradient. Collective: one scalar is summed."""
        self._square[0] = sum(self.ops.sum_squares(self.grads[a:b]) for a, b in self.ranges)
        self.sum_over_owners(self._square)
        return math.sqrt(self._square[0])

    def update(self, optimizer: Any, lr: float, step: int, grad_scale: float) -> None:
        """Update this rank's ranges of `params` in place. Collective only for optimizers that need norms."""
        optimizer.update(self.params, self.grads, lr, step, grad_scale,
                         self.sum_over_owners if optimizer.needs_norms else None)

    def share(self) -> None:
        """Give every rank the updated parameters of all owners. Collective."""
        arrivals = [self._params.fetch(*own) for own in self._owned]
        for k, bucket in enumerate(self.buckets):
            arrivals[k]()
            self._share_bucket(k, bucket)
            self._params.put(bucket.start, bucket.stop)
        self._params.settle()

    def finish(self) -> None:
        """Return when nothing is under way any more: here, always. Collective where a strategy overlaps."""

    def _share_bucket(self, k: int, bucket: Bucket) -> None:
        self.collective.all_gather(self._sent_params[bucket.start:bucket.stop], bucket.bounds)

    def _start_share(self, k: int, bucket: Bucket) -> Any:
        """As `_share_bucket`, but return at once what is to be waited for."""
        return self.collective.start_all_gather(self._sent_params[bucket.start:bucket.stop], bucket.bounds)

    def _gather(self, flat: np.ndarray) -> None:
        for bucket in self.buckets:
            self.collective.all_gather(flat[bucket.start:bucket.stop], bucket.bounds)

    def carried(self, keep: bool = True) -> dict[str, np.ndarray]:
        """Return, by name, the flat host vectors that a checkpoint must hold besides for an exact resumption.

        Collective: what narrow reductions still owe the gradient ("residual") is added up over the ranks, here too. A
        rank without `keep` helps the others and gets {}.
        """
        if not self.collective.narrow:
            return {}
        flat = self._kept()
        for bucket in self.buckets:
            piece = slice(bucket.start, bucket.stop)
            self.collective.settle(self._sent_grads[piece], bucket.bounds, flat[piece])
        return {"residual": flat.copy()} if keep else {}

    def take_up(self, carried: dict[str, np.ndarray]) -> None:
        """Go on from `carried`, which all ranks hold alike, at any rank count and wire it comes from.

        Local. Parameters have been set before. A "master" becomes the parameters, exact as it is, where this strategy
        keeps none of its own. A "residual", a rounding of one step's gradient, is dropped where no wire is narrow.
        """
        if "master" in carried:
            self.ops.from_host(carried["master"], self.params)
        if "residual" in carried and self.collective.narrow:
            for bucket in self.buckets:
                piece = slice(bucket.start, bucket.stop)
                self.collective.put_residual(self._sent_grads[piece], bucket.bounds, carried["residual"][piece])

    def _kept(self) -> np.ndarray:
        """Return a flat host vector for what is gathered now and then."""
        if self._gathered is None:
            self._gathered = self.collective.empty(self._sent_params.size, self._sent_params.dtype)
        return self._gathered

    def whole(self, owned: Any, keep: bool = True) -> np.ndarray | None:
        """Return the flat host vector whose owned ranges, concatenated, are `owned` on each rank.

        Collective, between steps: the memory that the gradient is sent from, or beside it, is used. For saving or using
        optimizer state, averaged weights and the best state. A rank without `keep` helps the others and gets None.
        """
        flat = self._grads.host
        part = owned
        if not isinstance(owned, np.ndarray):
            part = np.empty(owned.shape, flat.dtype)
            self.ops.to_host(owned, part)
        at = 0
        for start, stop in self.ranges:
            flat[start:stop] = part[at:at + stop - start]
            at += stop - start
        self._gather(flat)
        return flat.copy() if keep else None

    def owned(self, flat: Any) -> Any:
        """Return a copy of this rank's ranges of `flat`, concatenated. Local."""
        out = self.ops.empty((sum(b - a for a, b in self.ranges),), flat.dtype)
        at = 0
        for start, stop in self.ranges:
            self.ops.from_host(flat[start:stop], out[at:at + stop - start])
            at += stop - start
        return out


class WholeUpdate(SlicedUpdate):
    """All-reduce of the gradient, then the same update of all parameters on every rank."""

    def _ranges(self) -> list[tuple[int, int]]:
        return [(0, self.params.shape[0])]

    def _own(self, bucket: Bucket) -> tuple[int, int]:
        return bucket.start, bucket.stop

    def _reduce_bucket(self, part: np.ndarray, bucket: Bucket, words: np.ndarray | None) -> None:
        self.collective.reduce_scatter(part, bucket.bounds, words)
        self.collective.all_gather(part, bucket.bounds)

    def sum_over_owners(self, value: np.ndarray) -> None:
        """Leave `value`: every rank owns everything. Local."""

    def share(self) -> None:
        """Do nothing: every rank has updated everything itself. Local."""

    def _gather(self, flat: np.ndarray) -> None:
        pass
