"""Local steps: each rank trains by itself for a round of steps, then the ranks meet and go on from one point.

Local SGD (S. U. Stich, "Local SGD converges fast and communicates little", ICLR 2019): the ranks' parameters are
averaged, each weighted by the samples (sum of sample weights) that it has trained on. DiLoCo (A. Douillard et al.,
"DiLoCo: distributed low-communication training of language models", 2023, arXiv:2311.08105): what the mean has moved in
a round is the gradient of an outer optimizer. Both are one thing here: the outer gradient, the anchor (the parameters
where the round began, the same on all ranks) less the weighted mean, goes through the same strategy that a synchronous
step uses, with SGD as the optimizer; plain averaging is its learning rate 1 without momentum. So a round sends what
one synchronous step sends, the outer momentum is kept in slices, and narrow wires round differences, not parameters.

Within a round no rank knows of another: gradients are means over the rank's own rows, their norm is clipped by itself,
optimizer state (all of it on every rank) is the rank's own. A rank without rows, or with a gradient that is not finite,
leaves that step out. All that ranks decide together is decided where they meet, from words summed there. A rank whose
parameters or state are not finite then is left out and takes over the others'; when no rank has trained, all go back
to the anchor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from hpcmlp.comm.wire import make_format
from hpcmlp.nn.optimizers import make_optimizer
from hpcmlp.sync.control import LOSS, NOT_FINITE, ROWS, WEIGHT, ControlWords
from hpcmlp.sync.step import Step, StepResult
from hpcmlp.sync.strategy import WholeUpdate

DILOCO = {"lr": 0.7, "momentum": 0.9}  # of its outer optimizer
PIECE = 1 << 18  # elements of state that are averaged at a time
LARGEST_WORD = 2.0**60  # words are summed exactly up to here


class RoundWords(ControlWords):
    """The control words of a round: those of a step, summed over its steps, and what the ranks' drift is told from."""

    OWN = 2

    def __init__(self, size: int):
        super().__init__(size, self.OWN)

    def add_step(self, words: ControlWords) -> None:
        """Add what one step of this rank has counted. Local."""
        for word in (ROWS, WEIGHT, LOSS, NOT_FINITE):
            self.array[word] += words.array[word]

    def put_spread(self, spread: float) -> None:
        """Put this rank's weight times the squared norm of what it has moved. Local."""
        self.array[-2] = spread

    def leave_out(self) -> None:
        """Say that this rank's parameters or state are not finite: its share of the round does not count. Local."""
        self.array[WEIGHT] = self.array[LOSS] = 0.0
        self.array[-1] = 1.0

    @property
    def spread(self) -> float:
        return float(self.array[-2])

    @property
    def left_out(self) -> int:
        """How many ranks were left out of the mean."""
        return int(self.array[-1])


@dataclass
class RoundResult:
    """What the ranks learn where they meet; the same on all of them.

    `lost_steps` counts steps of single ranks whose gradient was not finite, `left_out` ranks that were left out of
    the mean. The rest is None unless it was asked for: `outer_norm` is the norm of the outer gradient; `drift` the
    weighted root mean square of the ranks' distances from their mean, relative to the norm of the parameters; `align`
    the squared outer norm over the mean square of what the ranks have moved: 1 when all went the same way, 1 / size
    when each went its own.
    """

    lost_steps: int = 0
    left_out: int = 0
    outer_norm: float | None = None
    drift: float | None = None
    align: float | None = None


class LocalStep(Step):
    """A step of this rank alone, and at the end of a round the meeting of all ranks.

    Parameters, beside those of `Step`
    ----------
    strategy : `sync.strategy.WholeUpdate` over this rank's own parameters and gradients; it never communicates.
    optimizer, average : for all parameters, on every rank.
    outer : strategy over the anchor (perhaps common to a node) and the same gradients: they hold the outer gradient
        while the ranks meet.
    outer_optimizer : "none" averages; "nesterov" is SGD with Nesterov's momentum.
    outer_lr, outer_momentum : of nesterov; None for DiLoCo's own, 0.7 and 0.9.
    meets : tells, alike on all ranks, whether the ranks meet after the step of a number.
    """

    def __init__(self, *parts: Any, outer: Any, meets: Callable[[int], bool], outer_optimizer: str = "none",
                 outer_lr: float | None = None, outer_momentum: float | None = None, **options: Any):
        super().__init__(*parts, **options)
        self.outer, self.meets = outer, meets
        params, nesterov = self.strategy.params, outer_optimizer == "nesterov"
        self.outer_lr = (outer_lr or DILOCO["lr"]) if nesterov else 1.0
        momentum = (DILOCO["momentum"] if outer_momentum is None else outer_momentum) if nesterov else 0.0
        self.outer_optimizer = make_optimizer("sgd", self.ops, self.network.layout, outer.ranges, params.dtype,
                                              momentum=momentum, nesterov=momentum > 0.0)
        self._round = RoundWords(outer.size)
        self._steps = 0  # of this round
        self._trained = 0.0  # weight of this rank's samples since the state was last the same on all ranks
        self._settled = True
        # One rank keeps its bits: anchor - (anchor - params) would round them.
        self._alone = outer.size == 1 and not nesterov
        self._piece = outer.collective.empty(min(PIECE, params.shape[0]), np.float64)
        self._host = np.empty(self._piece.size, params.dtype)
        self._weight = np.zeros(1, np.float64)
        # Of this process, for statistics.
        self._totals = dict.fromkeys(("rounds", "steps", "lost_steps", "left_out", "measured", "drift", "align"), 0.0)
        self.take_up({})

    # ---- a step

    def run(self, batch: Any, step: int, lr: float, *, stop: bool = False, check: bool = False,
            want_norm: bool = False) -> StepResult:
        """Take one step on this rank's `batch`; at the end of a round meet the others.

        Local, but collective where `meets(step)`. Parameters are those of `Step.run`; `stop`, `check` and `want_norm`
        act where the ranks meet. The result of a step within a round holds no sums (`steps` is 0); that of its last
        step holds the sums over all ranks and all `steps` of the round.
        """
        started = perf_counter()
        self.words.clear()
        self._gradient(batch, step)
        if not self.words.not_finite and self.words.weight > 0.0:
            self._update_alone(lr, step)
        self._round.add_step(self.words)
        self._steps += 1
        self._settled = False
        if not self.meets(step):
            return StepResult(steps=0, compute_s=perf_counter() - started)
        if stop:
            self._round.ask_to_stop()
        if check:
            self._round.put_checksum(self.checksum())
        prepared = self._prepare()
        computed = perf_counter()
        result = self.meet(step, prepared, want_norm)
        result.compute_s, result.comm_s = computed - started, perf_counter() - computed
        return result

    def _update_alone(self, lr: float, step: int) -> None:
        factor = 1.0 / self.words.weight
        if self.clip_norm is not None:
            norm = self.strategy.grad_norm() * factor
            if norm > self.clip_norm:
                factor *= self.clip_norm / norm
        self.strategy.update(self.optimizer, lr, step + 1, factor)
        if self.average is not None:
            self.average.update(self.strategy.params)

    # ---- where the ranks meet

    def _prepare(self) -> bool:
        """Write this rank's share of the outer gradient over its gradients; return whether its numbers are finite."""
        words, difference, params = self._round, self.strategy.grads, self.strategy.params
        finite = all(map(self.ops.finite, (params, *self._state())))
        if finite:
            difference[...] = self.outer.params
            difference -= params
            spread = words.weight * self.ops.sum_squares(difference)
            finite = spread < LARGEST_WORD
        if finite:
            words.put_spread(spread)
            self._trained += words.weight
        else:
            words.leave_out()
        if words.weight > 0.0:
            difference *= words.weight
        else:
            difference[...] = 0
        return finite

    def meet(self, step: int, finite: bool, want_norm: bool = False) -> StepResult:
        """Join the rounds of all ranks: sum the outer gradient, move the anchor, and go on from there.

        Collective. `finite`: whether this rank's parameters and state are. Returns the sums over the round.
        """
        words, outer = self._round, self.outer
        # Before the sum: after it, ranks of a node that share the anchor may be moving their parts of it.
        size = math.sqrt(self.ops.sum_squares(outer.params)) if want_norm else 0.0
        outer.reduce(words.array)
        result = StepResult(steps=self._steps, rows=words.rows, weight=words.weight, stop=words.stop,
                            loss=words.loss / words.weight if words.weight else 0.0,
                            replicas_agree=words.replicas_agree, skipped=words.weight == 0.0,
                            not_finite=words.not_finite + words.left_out,
                            round=RoundResult(words.not_finite, words.left_out))
        if not result.replicas_agree:
            return result
        if not result.skipped:
            if want_norm:
                self._measure(result.round, size)
            self._move_anchor(step)
        if not (self._alone and finite):
            self.strategy.params[...] = outer.params
        if words.left_out:
            if not finite:
                self._restart_state()
            self.settle()
        self._count(result.round)
        words.clear()
        return result

    def _count(self, result: RoundResult) -> None:
        measured = result.drift is not None
        for name, value in (("rounds", 1), ("steps", self._steps), ("lost_steps", result.lost_steps),
                            ("left_out", result.left_out), ("measured", measured),
                            ("drift", result.drift or 0.0), ("align", result.align or 0.0)):
            self._totals[name] += value
        self._steps = 0

    def _move_anchor(self, step: int) -> None:
        if self._alone:
            self.outer.params[...] = self.strategy.params
        else:
            self.outer.update(self.outer_optimizer, self.outer_lr, step + 1, 1.0 / self._round.weight)
            self.outer.share()

    def _measure(self, result: RoundResult, size: float) -> None:
        """Fill in the norms; `size` is that of the parameters. Collective: one scalar is summed.

        The mean square distance from a mean is the mean square less the square of the mean: one scalar per rank in
        the words, and the norm of the sum, tell the drift, down to 1e-3 or so of what the ranks have moved.
        """
        moved = self._round.spread / self._round.weight
        result.outer_norm = self.outer.grad_norm() / self._round.weight
        together = result.outer_norm**2
        apart = max(0.0, moved - together) if self.outer.size > 1 else 0.0
        result.drift = math.sqrt(apart) / size if size else 0.0
        result.align = together / moved if moved else 1.0

    # ---- state that differs between the ranks

    def _state(self) -> list[Any]:
        """The vectors that each rank has moved by itself, beside the parameters."""
        return [*self.optimizer.state.values(), *([] if self.average is None else [self.average.array])]

    def _restart_state(self) -> None:
        """Take numbers that are not finite out of this rank's state; its weight in the next mean is zero."""
        self._trained = 0.0
        for array in self.optimizer.state.values():
            array[...] = 0
        if self.average is not None:
            self.average.start(self.outer.params)

    def settle(self) -> None:
        """Replace optimizer state and averaged weights by their mean over the ranks, weighted as the parameters are.

        Collective, where the ranks have just met; nothing is done when the state is the same everywhere already. A
        run settles before it saves and before averaged weights are used, so that one that resumes, on as many ranks,
        has the bits of the one that saved.
        """
        if self._settled:
            return
        self._weight[0] = self._trained
        self.outer.collective.all_reduce(self._weight)
        total, trained = float(self._weight[0]), self._trained
        if not total:  # nobody has trained since: all count alike
            total, trained = float(self.outer.size), 1.0
        for array in self._state():
            self._average(array, trained, total)
        self._trained, self._settled = 0.0, True

    def _average(self, array: Any, weight: float, total: float) -> None:
        # In float64, which no wire narrows and which gives float32 numbers back that are equal on all ranks.
        for start in range(0, array.shape[0], self._piece.size):
            part = array[start:start + self._piece.size]
            piece, host = self._piece[:part.shape[0]], self._host[:part.shape[0]]
            self.ops.to_host(part, host)
            piece[...] = host
            piece *= weight
            self.outer.collective.all_reduce(piece)
            piece /= total
            host[...] = piece
            self.ops.from_host(host, part)

    # ---- for people

    def describe(self) -> str:
        """Return in words how the ranks meet. Local."""
        momentum = self.outer_optimizer.hyper["momentum"]
        plain = self.outer_lr == 1.0 and not momentum
        return "parameters averaged" if plain else f"outer nesterov lr {self.outer_lr:g} momentum {momentum:g}"

    def report(self, wire: str) -> str:
        """Return the statistics as one line. Local."""
        s = self.statistics(wire)
        share = s["bytes_per_step"] / (s["bytes_per_step_synchronous"] or 1.0)
        drift = "" if s["drift"] is None else \
            f"; drift {100 * s['drift']:.2g} % of the parameters' norm, alignment {s['align']:.2f}"
        return (f"{s['rounds']:,} rounds for {s['steps']:,} steps, {s['bytes_per_step'] / 2**20:.3g} MiB a step and "
                f"rank, {100 * share:.2g} % of synchronous steps{drift}")

    def statistics(self, wire: str) -> dict[str, Any]:
        """Return what this process has counted: rounds, drift (mean over the measured rounds), bytes a step. Local.

        Bytes are those that the ring sends as `wire`, mean over the ranks; ranks that share memory read as many from
        their neighbours'.
        """
        t, elements, size = self._totals, self.outer.params.shape[0], self.outer.size
        narrow = 4 * elements if wire == "float32" else make_format(wire, 1).num_bytes(elements)
        back = 4 * elements if isinstance(self.outer, WholeUpdate) else narrow
        exchange = (narrow + back) * (size - 1) / size
        counts = {name: int(t[name]) for name in ("rounds", "steps", "lost_steps", "left_out")}
        means = {name: t[name] / t["measured"] if t["measured"] else None for name in ("drift", "align")}
        return {**counts, **means, "bytes_per_step_synchronous": exchange,
                "bytes_per_step": exchange * t["rounds"] / t["steps"] if t["steps"] else 0.0}

    # ---- for checkpoints and checks

    def checksum(self) -> int:
        """Return the checksum of what must be the same on all ranks: the anchor. Local."""
        return self.ops.checksum(self.outer.params)

    def carried(self, keep: bool = True) -> dict[str, np.ndarray]:
        """Return what the exchanges still owe, as `sync.strategy.SlicedUpdate.carried` does. Collective."""
        return self.outer.carried(keep)

    def take_up(self, carried: dict[str, np.ndarray]) -> None:
        """Begin a round where this rank's parameters are, the same on all ranks, and with `carried`. Local."""
        self._trained, self._settled = 0.0, True
        self.outer.params[...] = self.strategy.params
        self.outer.take_up(carried)
        self.strategy.params[...] = self.outer.params

    def outer_state(self) -> dict[str, tuple[Any, Any]]:
        """Return the outer optimizer's vectors by name, each with the strategy that makes it whole. Local."""
        return {f"outer/{name}": (self.outer, array) for name, array in self.outer_optimizer.state.items()}
