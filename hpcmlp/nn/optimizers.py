"""Update rules in place on the ranges of the flat vector that a rank owns, and the average of the weights.

State (moments, momentum buffers) is kept only for the owned ranges, one after the other in one array per name. A range
is updated in one pass of one kernel of `ops`. All rules but LAMB and LARS work element by element, so any cut into
ranges gives the same bits; these two scale the step of every weight matrix by a ratio of norms: each rank sums the
squares of its parts in float64, one `all_reduce` adds them.

Conventions. SGD, Adam, AdamW, RMSprop, Adagrad are those of torch.optim, defaults included: Adam's eps is added after
the bias correction; weight decay acts on all tensors, biases and norms too, and is added to the gradient, or, for
adamw only, decoupled (p -= lr * weight_decay * p).
  lamb  You et al. 2020, arXiv:1904.00962, algorithm 2 with phi(z) = z:
        r = m_hat / (sqrt(v_hat) + eps) + weight_decay * p;  p -= lr * |p| / |r| * r
  lars  You, Gitman, Ginsburg 2017, arXiv:1708.03888, algorithm 1:
        local = trust * |p| / (|g| + weight_decay * |p|)
        buffer = momentum * buffer + lr * local * (g + weight_decay * p);  p -= buffer
Their ratio is 1 for one-dimensional tensors (biases, norms), as in the authors' own programs, and where a norm is 0.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from hpcmlp.errors import ConfigError
from hpcmlp.nn.layout import Layout

HYPER: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    "rmsprop": {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "weight_decay": 0.0},
    "adagrad": {"lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0},
    "lamb": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.0},
    "lars": {"momentum": 0.9, "trust": 0.001, "weight_decay": 0.0},
}
BELOW_ONE = ("momentum", "dampening", "beta1", "beta2", "alpha")  # 0 <= value < 1
ABOVE_ZERO = ("eps", "trust")
NOT_NEGATIVE = ("weight_decay", "lr_decay")


class Optimizer:
    """What all update rules share: the owned ranges and their state.

    Local. Made by `make_optimizer`.

    Attributes
    ----------
    ranges : owned (start, stop), adjacent ones merged.
    size : number of owned elements, padding included.
    state : name -> (size,) array over the concatenated ranges, where `ops` works.
    hyper : the rule's constants.
    needs_norms : whether `update` sums norms over ranks with `all_reduce`.
    """

    needs_norms = False

    def __init__(self, ops: Any, layout: Layout, ranges: Iterable[tuple[int, int]], dtype: Any,
                 hyper: dict[str, Any]) -> None:
        self.ops, self.layout, self.hyper = ops, layout, hyper
        self.ranges = merge(ranges)
        assert not self.ranges or self.ranges[-1][1] <= layout.size
        self.size = sum(stop - start for start, stop in self.ranges)
        self.state = {name: ops.zeros((self.size,), dtype) for name in self.state_names()}
        self._bound: tuple[Any, Any, list[tuple]] = (None, None, [])

    def state_names(self) -> tuple[str, ...]:
        """Return the names of the state arrays. Local."""
        return ()

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over saved host state of the same ranges. Local. Raises ValueError when names or lengths differ."""
        given = {name: a.shape for name, a in state.items()}
        wanted = {name: a.shape for name, a in self.state.items()}
        if given != wanted:
            raise ValueError(f"optimizer state {given} does not fit; wanted is {wanted}")
        for name, array in self.state.items():
            self.ops.from_host(np.ascontiguousarray(state[name], array.dtype), array)

    def update(self, params: Any, grads: Any, lr: float, step: int, grad_scale: float = 1.0,
               all_reduce: Callable[[np.ndarray], None] | None = None) -> None:
        """Update the owned ranges of `params` in place.

        Local; with `needs_norms` collective over the ranks of `all_reduce`, also for a rank that owns nothing.

        Parameters
        ----------
        params, grads : (layout.size,) flat vectors; elsewhere than in the owned ranges neither is touched. Or (size,)
            vectors that hold the owned ranges alone, one after the other.
        step : number of this update, from 1; passed in, so that it can come from a checkpoint.
        grad_scale : factor of the gradient (1 / weight sum, clipping), applied on the way; `grads` is not written.
        all_reduce : sums a float64 host array over the ranks in place; None where this rank owns everything.
        """
        lr, grad_scale = float(lr), float(grad_scale)  # a NumPy float64 would turn float32 into float64
        for p, g, *state in self._bind(params, grads):
            self._kernel(p, g, state, lr, step, grad_scale)

    def _kernel(self, p: Any, g: Any, state: list[Any], lr: float, step: int, grad_scale: float) -> None:
        raise NotImplementedError

    def _bind(self, params: Any, grads: Any) -> list[tuple]:
        """Views of the owned ranges, made anew only when the vectors change."""
        if self._bound[0] is not params or self._bound[1] is not grads:
            pieces, at = [], 0
            for start, stop in self.ranges:
                after = at + stop - start
                own = (self._cut(vector, start, stop, at) for vector in (params, grads))
                pieces.append((*own, *(a[at:after] for a in self.state.values())))
                at = after
            self._bound = (params, grads, pieces)
        return self._bound[2]

    def _cut(self, vector: Any, start: int, stop: int, at: int) -> Any:
        """The elements [start, stop) of a flat vector, or of one that holds the owned ranges alone: there from `at`."""
        return vector[start:stop] if vector.shape[0] == self.layout.size else vector[at:at + stop - start]


class Sgd(Optimizer):
    """Stochastic gradient descent, with momentum and Nesterov's form of it."""

    def state_names(self) -> tuple[str, ...]:
        return ("momentum",) if self.hyper["momentum"] else ()

    def _kernel(self, p: Any, g: Any, state: list[Any], lr: float, step: int, grad_scale: float) -> None:
        h = self.hyper
        self.ops.sgd(p, g, state[0] if state else None, lr, h["momentum"], h["dampening"], h["nesterov"],
                     h["weight_decay"], grad_scale, step == 1)


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980), weight decay added to the gradient."""

    decoupled = False

    def state_names(self) -> tuple[str, ...]:
        return ("m", "v")

    def _kernel(self, p: Any, g: Any, state: list[Any], lr: float, step: int, grad_scale: float) -> None:
        h = self.hyper
        self.ops.adam(p, g, state[0], state[1], lr, h["beta1"], h["beta2"], h["eps"], h["weight_decay"],
                      self.decoupled, step, grad_scale)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    decoupled = True


class RmsProp(Optimizer):
    """RMSprop (Hinton 2012), not centred."""

    def state_names(self) -> tuple[str, ...]:
        return ("v", "momentum") if self.hyper["momentum"] else ("v",)

    def _kernel(self, p: Any, g: Any, state: list[Any], lr: float, step: int, grad_scale: float) -> None:
        h = self.hyper
        self.ops.rmsprop(p, g, state[0], state[1] if len(state) > 1 else None, lr, h["alpha"], h["eps"],
                         h["momentum"], h["weight_decay"], grad_scale)


class Adagrad(Optimizer):
    """Adagrad (Duchi, Hazan and Singer 2011)."""

    def state_names(self) -> tuple[str, ...]:
        return ("s",)

    def _kernel(self, p: Any, g: Any, state: list[Any], lr: float, step: int, grad_scale: float) -> None:
        h = self.hyper
        self.ops.adagrad(p, g, state[0], lr, h["eps"], h["lr_decay"], h["weight_decay"], step, grad_scale)


class Layerwise(Optimizer):
    """An update rule whose step is scaled, per weight matrix, by a ratio of norms over all ranks."""

    needs_norms = True

    def __init__(self, ops: Any, layout: Layout, ranges: Iterable[tuple[int, int]], dtype: Any,
                 hyper: dict[str, Any]) -> None:
        super().__init__(ops, layout, ranges, dtype, hyper)
        self._adapted = [len(shape) > 1 for shape in layout.shapes]
        self._norms = np.zeros((2, len(layout.tensors)), np.float64)  # weights; gradients or directions
        self._places = []  # (tensor, start, stop, place in the state) of every owned piece of a tensor
        at = 0
        for start, stop in self.ranges:
            self._places += [(tensor, a, b, at + a - start) for tensor, a, b in layout.parts([(start, stop)])]
            at += stop - start

    def _sum_norms(self, pieces: list[tuple], all_reduce: Callable[[np.ndarray], None] | None) -> list[list[float]]:
        """Return per tensor the norms of the weights and of what `pieces` (tensor, p, u, ...) hold, over all ranks."""
        self._norms.fill(0.0)
        for tensor, p, u, *_ in pieces:
            if self._adapted[tensor]:
                self._norms[0, tensor] += self.ops.sum_squares(p)
                self._norms[1, tensor] += self.ops.sum_squares(u)
        if all_reduce is not None:
            all_reduce(self._norms.reshape(-1))
        return np.sqrt(self._norms).tolist()


class Lamb(Layerwise):
    """LAMB: Adam's direction, with steps in proportion to the norm of each weight matrix."""

    def __init__(self, ops: Any, layout: Layout, ranges: Iterable[tuple[int, int]], dtype: Any,
                 hyper: dict[str, Any]) -> None:
        super().__init__(ops, layout, ranges, dtype, hyper)
        self._direction = ops.zeros((self.size,), dtype)

    def state_names(self) -> tuple[str, ...]:
        return ("m", "v")

    def update(self, params: Any, grads: Any, lr: float, step: int, grad_scale: float = 1.0,
               all_reduce: Callable[[np.ndarray], None] | None = None) -> None:
        h, at, lr, grad_scale = self.hyper, 0, float(lr), float(grad_scale)
        for p, g, m, v in self._bind(params, grads):
            u = self._direction[at:at + p.shape[0]]
            at += p.shape[0]
            self.ops.adam_direction(p, g, m, v, u, h["beta1"], h["beta2"], h["eps"], h["weight_decay"], step,
                                    grad_scale)
        pieces = [(tensor, self._cut(params, a, b, at), self._direction[at:at + b - a])
                  for tensor, a, b, at in self._places]
        weights, directions = self._sum_norms(pieces, all_reduce)
        for tensor, p, u in pieces:
            ratio = 1.0
            if self._adapted[tensor] and weights[tensor] > 0.0 and directions[tensor] > 0.0:
                ratio = weights[tensor] / directions[tensor]
            self.ops.add_scaled(p, u, -lr * ratio)


class Lars(Layerwise):
    """LARS: momentum SGD, with steps in proportion to the norm of each weight matrix over that of its gradient."""

    def state_names(self) -> tuple[str, ...]:
        return ("momentum",) if self.hyper["momentum"] else ()

    def update(self, params: Any, grads: Any, lr: float, step: int, grad_scale: float = 1.0,
               all_reduce: Callable[[np.ndarray], None] | None = None) -> None:
        h, momentum, lr, grad_scale = self.hyper, self.state.get("momentum"), float(lr), float(grad_scale)
        pieces = [(tensor, self._cut(params, a, b, at), self._cut(grads, a, b, at),
                   None if momentum is None else momentum[at:at + b - a]) for tensor, a, b, at in self._places]
        weights, gradients = self._sum_norms(pieces, all_reduce)
        for tensor, p, g, v in pieces:
            rate = lr
            if self._adapted[tensor] and weights[tensor] > 0.0 and gradients[tensor] > 0.0:
                rate *= h["trust"] * weights[tensor] / (abs(grad_scale) * gradients[tensor]
                                                        + h["weight_decay"] * weights[tensor])
            # The rate stands inside the momentum: it goes with the gradient, and the kernel's own rate is 1.
            self.ops.sgd(p, g, v, 1.0, h["momentum"], 0.0, False, rate * h["weight_decay"], rate * grad_scale,
                         step == 1)


RULES: dict[str, type[Optimizer]] = {"sgd": Sgd, "adam": Adam, "adamw": AdamW, "rmsprop": RmsProp, "adagrad": Adagrad,
                                     "lamb": Lamb, "lars": Lars}


def make_optimizer(name: str, ops: Any, layout: Layout, ranges: Iterable[tuple[int, int]], dtype: Any = np.float32,
                   **hyper: Any) -> Optimizer:
    """Return the optimizer `name` for the owned `ranges`, its state zero.

    Local. Raises ConfigError for an unknown name or constant, or a value out of range.

    Parameters
    ----------
    ranges : ascending, disjoint (start, stop) element ranges of the flat vector; may be empty.
    hyper : constants of the rule, with the defaults of `HYPER[name]`.
    """
    if name not in RULES:
        raise ConfigError(f"optimizer = {name!r} is not known (legal: {', '.join(RULES)}).")
    odd = sorted(set(hyper) - set(HYPER[name]))
    if odd:
        raise ConfigError(f"optimizer {name} has no option {', '.join(odd)} (it has: {', '.join(HYPER[name])}).")
    hyper = HYPER[name] | hyper
    for key, value in hyper.items():
        legal = {**dict.fromkeys(BELOW_ONE, (0.0 <= value < 1.0, "at least 0 and below 1")),
                 **dict.fromkeys(ABOVE_ZERO, (0.0 < value < math.inf, "above 0")),
                 **dict.fromkeys(NOT_NEGATIVE, (0.0 <= value < math.inf, "at least 0"))}
        if key in legal and not legal[key][0]:
            raise ConfigError(f"{key} = {value} is out of range for {name}; it must be {legal[key][1]}.")
    if hyper.get("nesterov") and (hyper["momentum"] == 0.0 or hyper["dampening"] != 0.0):
        raise ConfigError("nesterov needs a momentum above 0 and a dampening of 0.")
    return RULES[name](ops, layout, ranges, dtype, hyper)


class Average:
    """The exponential moving average of the weights over the owned ranges.

    Local. `start` takes the parameters as they are; each `update` is average = decay * average + (1 - decay) * params.
    Parameters come as the flat vector, or as a vector of the owned ranges alone.

    Attributes
    ----------
    ranges : owned (start, stop), adjacent ones merged.
    array : (size,) the averaged slice over the concatenated ranges, where `ops` works.
    """

    def __init__(self, ops: Any, ranges: Iterable[tuple[int, int]], decay: float, dtype: Any = np.float32) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"ema = {decay} is out of range; it must be at least 0 and below 1.")
        self.ops, self.decay, self.ranges = ops, float(decay), merge(ranges)
        self.array = ops.zeros((sum(stop - start for start, stop in self.ranges),), dtype)
        self._places = []  # (place in `array`, its end, start, stop)
        at = 0
        for start, stop in self.ranges:
            self._places.append((at, at + stop - start, start, stop))
            at += stop - start

    def start(self, params: Any) -> None:
        """Set the average to `params`. Local."""
        for at, end, part in self._parts(params):
            self.array[at:end] = part

    def update(self, params: Any) -> None:
        """Move the average towards `params`. Local."""
        for at, end, part in self._parts(params):
            self.ops.ema(self.array[at:end], part, self.decay)

    def _parts(self, params: Any) -> Iterator[tuple[int, int, Any]]:
        """Yield the places of the owned ranges in the average, and their parameters."""
        alone = params.shape == self.array.shape
        for at, end, start, stop in self._places:
            yield at, end, params[at:end] if alone else params[start:stop]

    def copy_to(self, params: Any) -> None:
        """Write the average into its ranges of the flat vector `params`. Local."""
        for at, end, start, stop in self._places:
            params[start:stop] = self.array[at:end]

    def load(self, array: np.ndarray) -> None:
        """Take over a saved host average of the same ranges. Local. Raises ValueError when the length differs."""
        if array.shape != self.array.shape:
            raise ValueError(f"average of {array.shape} elements does not fit; wanted is {self.array.shape}")
        self.ops.from_host(np.ascontiguousarray(array, self.array.dtype), self.array)


def merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ascending, disjoint ranges with adjacent ones joined and empty ones left out. Local."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        assert start <= stop and (not merged or start >= merged[-1][1]), "ranges must be ascending and disjoint"
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], int(stop))
        elif start < stop:
            merged.append((int(start), int(stop)))
    return merged
