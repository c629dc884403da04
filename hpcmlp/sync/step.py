"""One optimizer step over all ranks, from the rows of a local batch to equal updated parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from hpcmlp.sync.control import ControlWords


@dataclass
class StepResult:
    """What one step tells: sums over all ranks, and this rank's seconds.

    `not_finite` counts ranks with a loss or gradient that is not finite (in a round: their steps, and ranks left out).
    `loss` is the weighted mean over the global batch; `grad_norm` is None unless it was asked for or needed. `steps`
    says over how many steps the sums go, and `round` (`sync.local.RoundResult`) what was learned from those between
    two meetings: 1 and None but for local steps. `comm_s` is the time in which the computing thread worked on or waited
    for communication, `flight_s` that in which messages were under way: `comm_s` itself where nothing overlaps. With
    overlap a gathering counts in the step that waits for it. `bytes_sent` are this rank's; None where nobody counts.
    Where several steps are read back at once `last_loss` is the loss of the last one, `skipped` says that all of them
    changed nothing, `skips` how many at their end. `deviants` are the ranks whose loss had other bits when it was
    computed again, None where it was not.
    """

    rows: int = 0
    weight: float = 0.0
    loss: float = 0.0
    grad_norm: float | None = None
    skipped: bool = False
    not_finite: int = 0
    stop: bool = False
    replicas_agree: bool = True
    compute_s: float = 0.0
    comm_s: float = 0.0
    flight_s: float = 0.0
    bytes_sent: int | None = None
    steps: int = 1
    round: Any = None
    last_loss: float | None = None
    skips: int | None = None
    deviants: list[int] | None = None

    @property
    def skips_at_end(self) -> int:
        """How many steps, the last one and those right before it, changed nothing."""
        return int(self.skipped) if self.skips is None else self.skips

    @property
    def hidden(self) -> float:
        """The share of the time with messages under way in which the computing thread computed, 0 to 1."""
        return hidden_share(self.comm_s, self.flight_s)


def hidden_share(comm_s: float, flight_s: float) -> float:
    """Return 1 - comm_s / flight_s, not below 0; 0 where nothing was under way. Local."""
    return max(0.0, 1.0 - comm_s / flight_s) if flight_s > 0.0 else 0.0


class Step:
    """The step on arrays: every buffer is made here, once.

    Parameters
    ----------
    network, loss, optimizer, strategy, ops : the parts; `strategy` holds the flat vectors of `network`.
    rows : largest local batch, in samples.
    micro_batches : pieces that a local batch is cut into.
    shift, scale : (d,) arrays for `ops.gather`, or None.
    clip_norm : largest global gradient norm, or None.
    seed : seed of dropout.
    average : `nn.optimizers.Average` of the weights, or None.

    Attributes
    ----------
    suspects : of which results, alike on all ranks, the ranks compute their losses again before anything is updated;
        None: of none. The same rows and parameters give the same bits, unless a rank's hardware errs.
    """

    takes_batches = True    # `run` wants the rank's batch
    suspects: Callable[[StepResult], bool] | None = None
    _own_loss = 0.0         # the sum over this rank's batch

    def __init__(self, network: Any, loss: Any, optimizer: Any, strategy: Any, ops: Any, *, rows: int,
                 micro_batches: int = 1, shift: Any = None, scale: Any = None, clip_norm: float | None = None,
                 seed: int = 0, average: Any = None):
        self.network, self.loss, self.optimizer, self.strategy, self.ops = network, loss, optimizer, strategy, ops
        self.shift, self.scale, self.clip_norm, self.seed, self.average = shift, scale, clip_norm, seed, average
        sizes, dtype = network.spec.sizes, strategy.params.dtype
        self.micro_rows = max(1, -(-rows // micro_batches))
        self._x = ops.empty((self.micro_rows, sizes[0]), dtype)
        self._dlogits = ops.empty((self.micro_rows, sizes[-1]), dtype)
        self.words = ControlWords(strategy.size)
        self._sent_before: int | None = None

    def run(self, batch: Any, step: int, lr: float, *, stop: bool = False, check: bool = False,
            want_norm: bool = False) -> StepResult:
        """Take one step on this rank's `batch` (`data.loader.Batch`, perhaps empty) and return its result.

        Collective.

        Parameters
        ----------
        step : updates done before this one; it also keys the dropout masks.
        lr : learning rate.
        stop : this rank asks all ranks to stop after the step.
        check : compare the parameters of all ranks before the update.
        want_norm : compute the gradient's global norm even when it is not clipped (all ranks alike).
        """
        started = perf_counter()
        self._sent_before = self.strategy.collective.bytes_sent
        if self.strategy.overlaps:
            self.strategy.progress.spent()      # between two steps: no part of this one
        words, self._own_loss = self.words, 0.0
        words.clear()
        if stop:
            words.ask_to_stop()
        if check:
            self.strategy.finish()
            words.put_checksum(self.checksum())
        self._gradient(batch, step)
        computed = perf_counter()
        self.strategy.reduce(words.array)
        reduced = perf_counter()
        result = StepResult(rows=words.rows, weight=words.weight, stop=words.stop,
                            replicas_agree=words.replicas_agree, not_finite=words.not_finite,
                            loss=words.loss / words.weight if words.weight else 0.0)
        if self.suspects is not None and self.suspects(result):
            result.deviants = self._compute_again(batch, step)
        if words.not_finite or words.weight == 0.0 or not result.replicas_agree:
            result.skipped = True
            if words.not_finite and self.strategy.overlaps:
                # It was on its way already; backward writes all of this anew, but for the gaps between tensors.
                self.strategy.grads[...] = 0
            self._put_times(result, started, reduced - computed)
            return result
        factor = 1.0 / words.weight
        if self.clip_norm is not None or want_norm:
            result.grad_norm = self.strategy.grad_norm() * factor
            if self.clip_norm is not None and result.grad_norm > self.clip_norm:
                factor *= self.clip_norm / result.grad_norm
        self.strategy.update(self.optimizer, lr, step + 1, factor)
        if self.average is not None:
            self.average.update(self.strategy.params)
        updated = perf_counter()
        self.strategy.share()
        shared = perf_counter()
        self._put_times(result, started, reduced - computed + shared - updated)
        return result

    def _put_times(self, result: StepResult, started: float, comm_s: float) -> None:
        """Share out the time since `started`; `comm_s` of it were spent in reduce and share."""
        flight_s = comm_s
        if self.strategy.overlaps:
            comm_s, flight_s = self.strategy.progress.spent()
        result.comm_s, result.flight_s = comm_s, flight_s
        if self._sent_before is not None:
            result.bytes_sent = self.strategy.collective.bytes_sent - self._sent_before
        result.compute_s = perf_counter() - started - comm_s

    def checksum(self) -> int:
        """Return the checksum of what must be the same on all ranks: the parameters. Local."""
        return self.ops.checksum(self.strategy.params)

    def _gradient(self, batch: Any, step: int) -> None:
        """Write the gradient of the weighted loss sum over this rank's batch, and its control words."""
        ops, words, strategy = self.ops, self.words, self.strategy
        need = strategy.need if strategy.overlaps else None
        for start in range(0, max(batch.rows, 1), self.micro_rows):
            dlogits = self._forward(batch, start, min(start + self.micro_rows, batch.rows), step, need=need)
            last = start + self.micro_rows >= batch.rows
            self.network.backward(dlogits, self._close if strategy.overlaps and last else None, add=start > 0)
        # One pass over the gradient costs less than finding out a step later on one rank only.
        if not strategy.overlaps and not (math.isfinite(words.loss) and ops.finite(strategy.grads)):
            words.mark_not_finite()
            strategy.grads[...] = 0

    def _compute_again(self, batch: Any, step: int) -> list[int]:
        """Compute this rank's loss again; return the ranks that get other bits than before.

        Collective: no rank updates parameters of the node that another still reads.
        """
        first, sums, self._own_loss = self._own_loss, self.words.array.copy(), 0.0
        for start in range(0, max(batch.rows, 1), self.micro_rows):
            self._forward(batch, start, min(start + self.micro_rows, batch.rows), step)
        self.words.array[...] = sums
        found = np.zeros(self.strategy.size)
        same = self._own_loss == first or math.isnan(self._own_loss) and math.isnan(first)
        found[self.strategy.collective.rank] = not same
        self.strategy.collective.all_reduce(found)
        return [int(rank) for rank in np.flatnonzero(found)]

    def _forward(self, batch: Any, start: int, stop: int, step: int, **calls: Any) -> Any:
        """Take rows of the batch through the network and the loss; return the gradient of the logits."""
        ops = self.ops
        x, dlogits = self._x[:stop - start], self._dlogits[:stop - start]
        ops.gather(batch.source, batch.index[start:stop], x, self.shift, self.scale)
        logits = self.network.forward(x, training=True, seed=self.seed, step=step, first=batch.first + start, **calls)
        weights = None if batch.weights is None else batch.weights[start:stop]
        loss, weight = self.loss(ops, logits, ops.bring(batch.targets[start:stop]), ops.bring(weights), dlogits)
        self.words.add_loss(stop - start, weight, loss)
        self._own_loss += loss
        return dlogits

    def _close(self, start: int, stop: int) -> None:
        """Look at the gradient of a range, which is final, and let it go."""
        self._look_at(self.strategy.grads[start:stop])
        self.strategy.close(start, self.words.array)

    def _look_at(self, grads: Any) -> None:
        """Note in the control words when what is about to be added up is not finite."""
        if not (math.isfinite(self.words.loss) and self.ops.finite(grads)):
            self.words.mark_not_finite()
