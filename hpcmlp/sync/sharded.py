"""Parameters in slices: layers gathered just before they are used, gradients reduced to their owners layer by layer.

S. Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", SC 2020, stage 3. Every
rank keeps its part of each layer's parameters, gradient and optimizer state, `size` parts of equal length, and nothing
else of them but two buffers for gathered layers and two for layers' gradients, which even and odd layers take in turn:
while a layer is computed, the next one that will be needed is gathered and the gradient before is reduced. A rank holds

    4 bytes x ((2 + moments) n / P + 2 (e + o)),    e, o: elements of the largest even and odd layer

(`sync.memory`); with node memory the ranks of a node have the buffers for gathered layers in common. A step gathers all
layers twice, all but the last, and but the first in backward, which needs it for no gradient: 3 (P-1)/P n numbers a
rank instead of 2 (P-1)/P n. With recomputation of activations the layers that run again are gathered once more.

The sums have the order of `SlicedUpdate` with one bucket per layer, and so have the results its bits; where local
batches are cut into micro-batches each of them is reduced by itself, which adds in another order.

Who may write where. A buffer in node memory is filled by all ranks of the node and read by all: one of them may not
begin to fill it anew while another still computes. A gathering and a reduction are meetings of the node's ranks; a
buffer whose last use ended before the last meeting is free. Where layers come in turn that is always so; where it is
not (odd numbers of layers, evaluation, recomputation) `_gather` calls a meeting of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

from hpcmlp.nn.network import Network
from hpcmlp.sync.buckets import Bucket, cut
from hpcmlp.sync.memory import buffer_elements
from hpcmlp.sync.overlap import Progress
from hpcmlp.sync.step import Step, StepResult
from hpcmlp.sync.strategy import SlicedUpdate


@dataclass
class Layer:
    """Where a layer stands on this rank.

    params, grads : its parameters when they are gathered, its gradient as backward leaves it; in buffers.
    bounds : its parts, by rank. own : this rank's part of it. at : that part in the vectors of owned elements.
    gaps : pieces of `grads` that belong to no tensor.
    """

    params: np.ndarray
    grads: np.ndarray
    bounds: np.ndarray
    own: slice
    at: slice
    gaps: list[np.ndarray]


class _AtWait:
    """A collective that cannot be under way: `wait` does it."""

    def __init__(self, action: Callable[[], None]):
        self._action = action
        self.began = self.ended = 0

    def wait(self) -> None:
        self.began = perf_counter_ns()
        self._action()
        self.ended = perf_counter_ns()


class ShardedUpdate(SlicedUpdate):
    """Parameters, gradients and optimizer state in slices; layers come and go.

    Parameters
    ----------
    collective : as for `SlicedUpdate`; `meet` lets the ranks that have memory in common wait for each other.
    spec : `nn.network.NetworkSpec`.
    size : the number of ranks.
    gathered, grads : (sum of `memory.buffer_elements`,) host arrays for gathered layers and for layers' gradients, made
        by the collective's `common` and `empty`.
    ops : the arithmetic, on the host.

    Attributes
    ----------
    params, grads : (owned,) this rank's parts of all layers, one after the other.
    layers : `Layer` by number.
    """

    overlaps = True

    def __init__(self, collective: Any, spec: Any, size: int, gathered: np.ndarray, grads: np.ndarray, ops: Any):
        buckets = cut(spec.layout().size, spec.layer_starts(), 1, size)
        self.layers = _find_layers(spec, buckets[::-1], collective.part, gathered, grads)
        owned = self.layers[-1].at.stop
        super().__init__(collective, buckets, size, np.zeros(owned, gathered.dtype), np.zeros(owned, grads.dtype), ops)
        self.progress = Progress(collective)
        self._by_start = {bucket.start: number for number, bucket in enumerate(buckets[::-1])}
        self._shown = self.params           # what is gathered: the parameters, or others for a while
        self._order: list[int] = []         # in which layers are entered in a pass
        self._position = self._left = 0     # in the order; passes left, the present one included
        self._standing: int | None = None   # the layer that may be read now
        self._coming: tuple[int, Any] | None = None     # a layer under way
        self._meetings, self._used = 0, [-1, -1]        # so far; before which a buffer was last read
        self._pending: dict[int, tuple[int, bool, Any]] = {}    # buffer -> reduction under way: layer, first, operation
        self._first = True                  # the pass under way is the first of the step

    # ---- the network's calls

    def begin(self, order: list[int], passes: int) -> None:
        """Say that layers will be entered in `order`, `passes` times. Local."""
        self._order, self._position, self._left, self._first = order, 0, passes, True

    def enter(self, layer: int) -> None:
        """Return when the parameters of `layer` stand; they do until another layer is entered.

        Collective over the ranks of a node; all ranks enter the same layers.
        """
        began = perf_counter()
        if self._position == len(self._order):
            self._position, self._left = 0, self._left - 1
        if layer != self._standing:
            self._release()
            if self._coming is None:
                self._gather(layer)
            coming, operation = self._coming
            assert coming == layer == self._order[self._position], "layers are entered as it was said in `begin`"
            self.progress.wait(operation)
            self._coming, self._standing = None, layer
            self._meetings += 1
        self._position += 1
        following = self._following()
        if following is not None and self._coming is None and (following - layer) % 2:
            self._gather(following)
        self.progress.exposed_s += perf_counter() - began

    def open_grads(self, layer: int) -> None:
        """Return when the gradient of `layer` may be written. Collective over the ranks of a node."""
        began = perf_counter()
        self._take(layer % 2)
        for gap in self.layers[layer].gaps:
            gap[...] = 0    # what another layer has left there would be added up
        self.progress.exposed_s += perf_counter() - began

    def grads_at(self, start: int) -> np.ndarray:
        """Return the gradient of the layer that begins at `start` as backward has left it. Local."""
        return self.layers[self._by_start[start]].grads

    def close(self, start: int, words: np.ndarray) -> None:
        """The gradient of the layer that begins at `start` is final: reduce it; `words` with the last one of the step.

        Collective over the ranks of a node.
        """
        began = perf_counter()
        number = self._by_start[start]
        layer = self.layers[number]
        if number == 0:
            self._release()     # nothing reads its parameters after this
        words = words if number == 0 and self._left == 1 else None
        with self.progress.lock:
            self._pending[number % 2] = number, self._first, self._start_reduction(layer, words)
            self.progress.watch()
        self._meetings += 1
        if number == 0:
            self._first = False
        self.progress.advance()
        self.progress.exposed_s += perf_counter() - began

    # ---- the step's calls

    def reduce(self, words: np.ndarray) -> None:
        """Wait for the sums of the gradient and of the control words over the ranks.

        Collective. Afterwards `grads` holds the sums of the owned elements, `words` the sums.
        """
        began = perf_counter()
        for buffer in (1, 0):
            self._take(buffer)
        self.progress.exposed_s += perf_counter() - began

    def grad_norm(self) -> float:
        """Return the Euclidean norm of the summed gradient. Collective: one scalar is summed."""
        # Layer by layer: the bits of the norm of a flat vector.
        self._square[0] = sum(self.ops.sum_squares(self.grads[layer.at]) for layer in self.layers)
        self.sum_over_owners(self._square)
        return float(np.sqrt(self._square[0]))

    def share(self) -> None:
        """Start to gather what the next step reads first: all else stays with its owners. Collective."""
        began = perf_counter()
        self._gather(0)
        self.progress.exposed_s += perf_counter() - began

    def finish(self) -> None:
        """Return when nothing is under way. Collective over the ranks of a node."""
        self._release()
        if self._coming is not None:
            layer, operation = self._coming
            self.progress.wait(operation)
            self._coming = None
            self._meetings += 1
            self._used[layer % 2] = self._meetings  # somebody may be on the way out of the meeting

    # ---- other uses of the slices

    @contextmanager
    def showing(self, owned: np.ndarray) -> Iterator[None]:
        """Let the network see other parameters, of which each rank gives its `owned` elements. Collective."""
        self.finish()
        self._shown = owned
        try:
            yield
        finally:
            self.finish()
            self._shown = self.params

    def whole_layers(self, owned: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first element, elements) of every layer in order, of which each rank gives its `owned` ones.

        Collective: all ranks take all layers. An array holds until the next one is asked for, and is only read.
        """
        with self.showing(owned):
            self.begin(list(range(len(self.layers))), 1)
            for number, layer in enumerate(self.layers):
                self.enter(number)
                yield self.buckets[-1 - number].start, layer.params

    def whole(self, owned: np.ndarray, keep: bool = True) -> np.ndarray | None:
        """Return the flat host vector whose owned elements are `owned` on each rank; without `keep` None.

        Collective.
        """
        flat = np.zeros(self.buckets[0].stop, owned.dtype) if keep else None
        for start, values in self.whole_layers(owned):
            if keep:
                flat[start:start + values.size] = values
        return flat

    def take_layer(self, number: int, values: np.ndarray, owned: np.ndarray) -> None:
        """Put this rank's part of the whole layer `values` into its `owned` elements. Local."""
        layer = self.layers[number]
        owned[layer.at] = values[layer.own]

    # ---- inside

    def _release(self) -> None:
        """The layer that stands is not read any more."""
        if self._standing is not None:
            self._used[self._standing % 2] = self._meetings
            self._standing = None

    def _following(self) -> int | None:
        """The layer that will be entered after the present one; None at the end of the passes."""
        if self._position < len(self._order):
            return self._order[self._position]
        return self._order[0] if self._left > 1 else None

    def _gather(self, number: int) -> None:
        """Start to gather a layer."""
        if self._used[number % 2] == self._meetings:
            with self.progress.lock:
                self.collective.meet()
            self._meetings += 1
        layer = self.layers[number]
        np.copyto(layer.params[layer.own], self._shown[layer.at])
        with self.progress.lock:
            if self.collective.starts:
                operation = self.collective.start_all_gather(layer.params, layer.bounds)
                self.progress.watch()
            else:
                operation = _AtWait(lambda: self.collective.all_gather(layer.params, layer.bounds))
            self._coming = number, operation

    def _start_reduction(self, layer: Layer, words: np.ndarray | None) -> Any:
        if self.collective.starts:
            return self.collective.start_reduce_scatter(layer.grads, layer.bounds, words)
        return _AtWait(lambda: self.collective.reduce_scatter(layer.grads, layer.bounds, words))

    def _take(self, buffer: int) -> None:
        """Wait for the reduction that a buffer is busy with, and keep the sum of the own part."""
        number, first, operation = self._pending.pop(buffer, (0, False, None))
        if operation is None:
            return
        self.progress.wait(operation)
        layer = self.layers[number]
        own, total = layer.grads[layer.own], self.grads[layer.at]
        if first:
            np.copyto(total, own)
        else:
            np.add(total, own, total)


def _find_layers(spec: Any, buckets: list[Bucket], part: int, gathered: np.ndarray, grads: np.ndarray) -> list[Layer]:
    """Return the places of the layers, whose `buckets` are given in their order."""
    layers, at, tensors = [], 0, spec.layout().tensors
    for number, bucket in enumerate(buckets):
        first = buffer_elements(spec)[0] * (number % 2)
        place = slice(first, first + bucket.stop - bucket.start)
        own = slice(int(bucket.bounds[part]), int(bucket.bounds[part + 1]))
        starts = [t.start for t in tensors if bucket.start < t.start < bucket.stop] + [bucket.stop]
        stops = [t.stop for t in tensors if bucket.start <= t.start < bucket.stop]
        gaps = [grads[place][stop - bucket.start:start - bucket.start]
                for stop, start in zip(stops, starts, strict=True) if stop < start]
        layers.append(Layer(gathered[place], grads[place], bucket.bounds, own, slice(at, at + own.stop - own.start),
                            gaps))
        at += own.stop - own.start
    return layers


def open_sharded(exchange: Any, spec: Any, size: int, ops: Any, rows: int,
                 recompute: bool = False) -> tuple[Network, ShardedUpdate]:
    """Return a network for up to `rows` samples whose layers come and go, and the strategy that brings them.

    Local. `exchange` : `comm.Exchange` of vectors of the sum of `memory.buffer_elements` elements. All parameters are
    zero; `take_layer` fills them.
    """
    strategy = ShardedUpdate(exchange.collective, spec, size, exchange.params, exchange.grads, ops)
    params, grads = zip(*((layer.params, layer.grads) for layer in strategy.layers), strict=True)
    return Network(spec, ops, rows, list(params), list(grads), recompute=recompute), strategy


class ShardedStep(Step):
    """The planned step over `ShardedUpdate`: all ranks take equally many micro-batches, some of them perhaps empty.

    Parameters are those of `Step`; `network` has the layers of the strategy.
    """

    def __init__(self, *parts: Any, micro_batches: int = 1, **options: Any):
        super().__init__(*parts, micro_batches=micro_batches, **options)
        self._passes, self._entries = micro_batches, self.network.entries()

    def run(self, batch: Any, step: int, lr: float, *, check: bool = False, **options: Any) -> StepResult:
        """Take one step as `Step.run`; there is nothing to `check`: every parameter has one owner. Collective."""
        return super().run(batch, step, lr, **options)

    def checksum(self) -> int:
        """Return 0: there are no replicas that could drift. Local."""
        return 0

    def _gradient(self, batch: Any, step: int) -> None:
        strategy = self.strategy
        assert batch.rows <= self._passes * self.micro_rows
        strategy.begin(self._entries, self._passes)
        for turn in range(self._passes):
            start, stop = (min(k * self.micro_rows, batch.rows) for k in (turn, turn + 1))
            dlogits = self._forward(batch, start, stop, step, enter=strategy.enter)
            self.network.backward(dlogits, self._close, open_grads=strategy.open_grads)

    def _close(self, start: int, stop: int) -> None:
        self._look_at(self.strategy.grads_at(start))
        self.strategy.close(start, self.words.array)
