"""The step as it will be taken, recorded: the real step runs on arrays without memory, with arithmetic that notes down.

Network, strategy, optimizer and step are those of training; only `ops` and the collective are stand-ins. Arrays are
views of one number (strides of 0), so that a network of any size costs nothing. What comes out is the list of all
operations in their order, with sizes, and of all that goes between ranks; and the bytes of every array that was made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcmlp import traffic
from hpcmlp.nn.network import Network
from hpcmlp.nn.optimizers import make_optimizer
from hpcmlp.ops import activations, losses
from hpcmlp.ops.staging import InPlace
from hpcmlp.plan.workload import Workload
from hpcmlp.sync import Plan, make_strategy, plan
from hpcmlp.sync.buckets import Bucket, part_bounds
from hpcmlp.sync.control import ControlWords
from hpcmlp.sync.step import Step


@dataclass(frozen=True)
class Op:
    """One operation of the arithmetic: `name`, and `elements` of its main array; of a matrix product its three sizes.

    `product` is (m, k, n): m samples in, k and n wide; `name` is then "forward" (x @ w.T), "weight" (dz.T @ x) or
    "input" (dz @ w).
    """

    name: str
    elements: int
    product: tuple[int, int, int] | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations of a matrix product; 0 of anything else."""
        return 0 if self.product is None else 2 * self.product[0] * self.product[1] * self.product[2]


@dataclass(frozen=True)
class Transfer:
    """Something between ranks. `action` is "run", "start" or "wait"; `half` "reduce", "gather" or "sum" (a scalar).

    `key` names what was started; `elements` and `bounds` are those of the array.
    """

    action: str
    half: str = ""
    key: int = 0
    elements: int = 0
    bounds: Any = None
    words: int = 0


@dataclass
class Recording:
    """What one rank does in a step, the last of three that were recorded, and the bytes it holds by part."""

    events: list[Op | Transfer] = field(default_factory=list)
    first: list[Op | Transfer] = field(default_factory=list)    # of the step before it, for the steady state
    held: dict[str, int] = field(default_factory=dict)
    planned: Plan | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products of this rank's step."""
        return sum(e.flops for e in self.events if isinstance(e, Op))


def blank(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Return an array of that shape which takes no memory; all its elements are one. Local."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class RecordingOps:
    """The arithmetic contract as a notebook: allocates nothing, computes nothing, notes every call.

    Attributes: `events`, to be taken away by the caller, and `held`, bytes by the part that `label` names.
    """

    NEEDS_PRE = activations.NEEDS_PRE
    ACTIVATIONS = activations.KINDS
    LOSSES = losses.KINDS
    fused = True

    def __init__(self) -> None:
        self.events: list[Op | Transfer] = []
        self.held: dict[str, int] = {}
        self.label = "other"

    @contextmanager
    def part(self, label: str) -> Iterator[None]:
        """Count what is allocated inside under `label`. Local."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        array = blank(shape, dtype)
        self.held[self.label] = self.held.get(self.label, 0) + array.nbytes
        return array

    zeros = empty

    def bring(self, a: Any) -> Any:
        return a

    def from_host(self, a: Any, out: Any) -> None:
        """Nothing has a value here."""

    to_host = from_host

    def stage(self, a: Any, host: Any = None) -> InPlace:
        return InPlace(a)

    def _note(self, name: str, array: Any) -> None:
        if array.size:
            self.events.append(Op(name, int(array.size)))

    def _product(self, name: str, m: int, k: int, n: int) -> None:
        if m and k and n:
            self.events.append(Op(name, m * n, (int(m), int(k), int(n))))

    def gather(self, source, rows, out, shift=None, scale=None):
        self._note("gather" if source.dtype == np.float32 else "gather_uint8", out)

    def linear(self, x, w, b, pre):
        self._product("forward", x.shape[0], x.shape[1], w.shape[0])
        if b is not None:
            self._note("bias_identity", pre)

    def linear_activation(self, x, w, b, kind, out, pre=None):
        self._product("forward", x.shape[0], x.shape[1], w.shape[0])
        self._note(f"bias_{kind}", out)

    def bias_activation(self, kind, pre, b, out):
        self._note(f"bias_{kind}", out)

    def activation(self, kind, pre, out):
        self._note(f"bias_{kind}", out)

    def activation_backward(self, kind, da, out, pre, dz, db=None):
        self._note(f"{kind}_backward", dz)

    def linear_backward(self, dz, x, w, dw, dx=None):
        if dw is not None:
            self._product("weight", dz.shape[0], dw.shape[1], dz.shape[1])
        if dx is not None:
            self._product("input", dz.shape[0], dx.shape[1], dz.shape[1])

    def column_sum(self, dz, db):
        self._note("column_sum", dz)

    def layer_norm(self, x, gamma, beta, out, mean, rstd, eps=0.0):
        self._note("layer_norm", out)

    def layer_norm_backward(self, dout, x, gamma, mean, rstd, dx, dgamma, dbeta):
        self._note("layer_norm_backward", dx)

    def dropout_mask(self, mask, rate, seed, step, layer, first):
        self._note("dropout_mask", mask)

    def dropout(self, a, mask, rate, out):
        self._note("dropout", out)

    def add(self, a, b, out):
        self._note("add", out)

    def loss(self, kind, logits, targets, weights, dlogits, **options):
        self._note(kind, logits)
        return 1.0, float(logits.shape[0])

    def sum_squares(self, g):
        self._note("sum_squares", g)
        return 1.0

    def finite(self, g):
        self._note("finite", g)
        return True

    def checksum(self, p):
        self._note("checksum", p)
        return 0

    def add_scaled(self, p, u, factor):
        self._note("add_scaled", p)

    def scale(self, g, factor):
        self._note("scale", g)

    def sgd(self, p, g, buf, *rest):
        self._note("sgd" if buf is None else "momentum", p)

    def adam(self, p, *rest):
        self._note("adam", p)

    def adam_direction(self, p, *rest):
        self._note("adam", p)

    def rmsprop(self, p, *rest):
        self._note("rmsprop", p)

    def adagrad(self, p, *rest):
        self._note("rmsprop", p)

    def ema(self, e, p, decay):
        self._note("ema", e)


class RecordingCollective:
    """A collective that notes what is asked of it, for part `part` of `size` ranks; the rest is as in `comm`.

    `links` is (latency, seconds a byte) of the links between nodes, or None where they are not known.
    """

    narrow, threads, bytes_sent = False, False, None

    def __init__(self, events: list[Op | Transfer], part: int, workload: Workload, links: tuple[float, float] | None):
        self.events, self.part, self.links = events, part, links
        self.across, self.workload = workload.nodes, workload
        self.starts = workload.sync in ("ring", "shared")
        self._made = 0

    def least_bytes(self, delay_s: float, loss: float) -> int:
        """As the ring's, from the machine's links; 1 MiB where they are not known. Local."""
        if self.workload.sync == "shared":
            size, factor = self.across, self.workload.ranks_per_node
        else:
            size, factor = self.workload.ranks, 1
        if self.links is None:
            return 2**20
        return traffic.least_bytes(size, *self.links, delay_s, loss) * factor

    def reduce_scatter(self, array, bounds, words=None):
        self._note("run", "reduce", array, bounds, words)

    def all_gather(self, array, bounds):
        self._note("run", "gather", array, bounds, None)

    def start_reduce_scatter(self, array, bounds, words=None):
        return self._note("start", "reduce", array, bounds, words)

    def start_all_gather(self, array, bounds):
        return self._note("start", "gather", array, bounds, None)

    def all_reduce(self, array, words=None):
        self.events.append(Transfer("run", "sum", 0, array.size))

    def advance(self) -> bool:
        return True

    def _note(self, action, half, array, bounds, words) -> "_Started":
        self._made += 1
        self.events.append(Transfer(action, half, self._made, int(array.size), bounds, 0 if words is None else
                                    int(words.size)))
        return _Started(self.events, self._made, half)


class _Started:
    """What a start returns: waiting for it is noted too."""

    began = ended = 0

    def __init__(self, events: list[Op | Transfer], key: int, half: str):
        self._events, self._key, self._half = events, key, half

    def wait(self) -> None:
        self._events.append(Transfer("wait", self._half, self._key))


@dataclass
class _Batch:
    """What a step wants of a batch."""

    rows: int
    source: Any
    index: Any
    targets: Any
    weights: Any = None
    first: int = 0


class _Loss:
    """The loss of a step, without its options."""

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, ops, logits, targets, weights, dlogits):
        return ops.loss(self.kind, logits, targets, weights, dlogits)


def record(workload: Workload, rank: int = 0, links: tuple[float, float] | None = None) -> Recording:
    """Return what `rank` does in a step of `workload`, and holds. Local.

    Local steps are recorded as steps of a rank alone, which sends nothing; `meeting` is what the ranks then exchange.
    links : (latency s, s per byte) between nodes, by which overlapped buckets are sized; None: 1 MiB and up.
    """
    ops, w = RecordingOps(), workload
    layout = w.spec.layout()
    size = 1 if w.is_local else w.ranks
    collective = RecordingCollective(ops.events, 0 if size == 1 else rank, w, links)
    planned = _plan(w, collective, size)
    with ops.part("parameters"):
        params = ops.zeros((layout.size,), np.float32)
    with ops.part("gradients"):
        grads = ops.zeros((layout.size,), np.float32)
    with ops.part("activations"):
        network = Network(w.spec, ops, w.network_rows, params, grads, piece=planned.piece)
    make = make_strategy(w.whole, False, planned.overlap)
    strategy = make(collective, planned.buckets, size, params, grads, ops)
    with ops.part("optimizer"):
        optimizer = make_optimizer(w.optimizer, ops, layout, strategy.ranges, np.float32, **w.hyper)
        if w.ema:
            ops.zeros((optimizer.size,), np.float32)
    rows = w.local_rows
    with ops.part("input"):
        step = Step(network, _Loss(w.loss), optimizer, strategy, ops, rows=rows, micro_batches=w.accumulate,
                    clip_norm=w.clip_norm)
    with ops.part("backward"):      # what the first backward pass makes
        batch = _Batch(rows, blank((rows, w.spec.sizes[0]), w.x_dtype), blank(rows, np.int64), blank(rows, np.int32))
        recordings = []
        for number in range(3):     # a gathering is waited for in the step after it
            ops.events.clear()
            step.run(batch, number, 1e-3)
            recordings.append([e for e in ops.events if isinstance(e, Op) or not w.is_local])
    if w.ema:
        recordings[-1].append(Op("ema", max(1, optimizer.size)))
    return Recording(recordings[-1], recordings[-2], dict(ops.held), planned)


def meeting(w: Workload) -> list[Transfer]:
    """Return what goes between the ranks when they meet after local steps: both halves of an all-reduce. Local."""
    size = w.spec.layout().size
    words = ControlWords(w.ranks).array.size
    return [Transfer("run", half, 0, size, part_bounds(size, w.ranks), words if half == "reduce" else 0)
            for half in ("reduce", "gather")]


def _plan(w: Workload, collective: RecordingCollective, size: int) -> Plan:
    """How the gradient is cut: by the function that training calls, but for servers, which take it whole."""
    if w.sync == "server":
        total = w.spec.layout().size
        return Plan([Bucket(0, total, part_bounds(total, w.ranks))], None, False, 0.0)
    overlap = False if w.whole else w.overlap
    return plan(w.spec, collective, size, 1 if size == 1 else w.nodes, w.bucket_mb, overlap)
