"""Steps on devices as the loop knows them: of one rank alone, of several GPUs by themselves, or with hosts between."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from hpcmlp.comm.messages import sum_in_place
from hpcmlp.sync.control import ControlWords
from hpcmlp.sync.planned import PlannedSteps
from hpcmlp.sync.step import Step, StepResult


class AloneStep:
    """The steps of the only rank: queued one after the other, and read back where something is due.

    Local. `due(number)` says whether something that needs the results follows step `number`.
    """

    def __init__(self, steps: PlannedSteps, due: Callable[[int], bool]):
        self.takes_batches = steps.fed
        self.steps, self.network, self.device, self._due = steps, steps.network, steps.device, due
        self._first = self._count = self._sent = self._room = 0     # of the steps asked for since the last results
        self._stop = False

    def run(self, batch: Any, step: int, lr: float, *, stop: bool = False, check: bool = False,
            want_norm: bool = False) -> StepResult:
        """Take one step; where something is due, return the results of all steps since the last ones.

        Local. Parameters are those of `sync.step.Step.run`; the batch is wanted where `takes_batches` says so, else it
        is found on the device; `lr` is in the tables. A result without sums has 0 `steps`.
        """
        started = perf_counter()
        if not self._count:
            # The parameters may have been changed by others meanwhile, on another stream.
            self.device.settle()
            self.device.run(self.network.narrow_params())
            self._first, self._sent, self._room, self._stop = step, 0, self.steps.room(step), False
        self._count += 1
        self._stop |= stop
        if self.steps.fed:
            self.steps.feed(batch)
        due = self._is_due(step)
        waiting = self._count - self._sent
        if due or waiting >= self.steps.graph_steps:
            self.steps.queue(self._first + self._sent, waiting)
            self._sent = self._count
        if not due:
            return StepResult(steps=0, compute_s=perf_counter() - started)
        result = self._result(self.steps.results())
        self._agree(result, check)
        self._count = 0
        result.compute_s = perf_counter() - started
        return result

    def _is_due(self, step: int) -> bool:
        return self._stop or self._count == self._room or self._due(step)

    def _agree(self, result: StepResult, check: bool) -> None:
        """Let all ranks see the same; here is one."""

    def _result(self, records: np.ndarray) -> StepResult:
        good, last = records["skipped"] == 0, records[-1]
        weight = float(records["weight"][good].sum())
        skips = len(records) if not good.any() else int(np.argmax(good[::-1]))
        return StepResult(
            steps=len(records), rows=int(records["rows"].sum()), weight=weight, stop=self._stop,
            loss=float(records["loss"][good].sum()) / weight if weight else 0.0, skipped=not good.any(), skips=skips,
            not_finite=int(not np.isfinite(records["loss"] + records["square"]).all()),
            last_loss=float(last["loss"] / last["weight"]) if last["weight"] else 0.0,
            grad_norm=float(np.sqrt(last["square"]) / last["weight"]) if last["weight"] else None)


class TogetherStep(AloneStep):
    """The steps of several ranks whose GPUs speak with each other: hosts meet only where something is due.

    Collective over `comm` where something is due, at the same steps on all ranks. In bf16 ranks hold the exact
    parameters of the others then; in between their bf16 copies, which is what they compute with.
    """

    def __init__(self, steps: PlannedSteps, due: Callable[[int], bool], comm: Any, ops: Any):
        super().__init__(steps, due)
        self._comm, self._ops = comm, ops
        self.words = ControlWords(comm.size)

    def _is_due(self, step: int) -> bool:
        return self._count == self._room or self._due(step)     # a signal on one rank is not known to the others

    def _agree(self, result: StepResult, check: bool) -> None:
        self.steps.complete()
        words = self.words
        words.clear()
        rows = result.rows
        words.add_loss(rows, 0.0, 0.0)
        if self._stop:
            words.ask_to_stop()
        if check:
            words.put_checksum(self.checksum())
        sum_in_place(self._comm, words.array)
        result.rows, result.stop, result.replicas_agree = words.rows, words.stop, words.replicas_agree

    def checksum(self) -> int:
        """Return the checksum of the parameters, and of the copy that steps read. Local."""
        copy = self.network.copy
        return self._ops.checksum(self.network.params) ^ (0 if copy is None else self._ops.checksum(copy))


class StagedStep(Step):
    """The steps of several ranks: the gradient is computed on the device, summed and shared as the strategy does it,
    through host memory or straight from the device's.

    Collective, as `sync.step.Step`, whose order of things it keeps.

    steps : `PlannedSteps`, not alone. strategy : over the device's flat vectors.
    """

    def __init__(self, steps: PlannedSteps, strategy: Any, ops: Any, clip_norm: float | None):
        self.steps, self.network, self.device, self.takes_batches = steps, steps.network, steps.device, steps.fed
        self.strategy, self.ops, self.clip_norm, self.average = strategy, ops, clip_norm, None
        self.optimizer = _Update(steps)
        self.words = ControlWords(strategy.size)

    def _gradient(self, batch: Any, step: int) -> None:
        self.device.settle()    # what came from the other ranks has arrived
        if self.steps.fed:
            self.steps.feed(batch)
        control = self.steps.take(step)
        if control["bad"]:
            self.strategy.grads[...] = 0
            self.device.settle()
            self.words.mark_not_finite()
        else:
            self.words.add_loss(int(self.steps.line(step)["rows"]), float(control["weight"]), float(control["loss"]))


class _Update:
    """The device's update, as a strategy calls it."""

    needs_norms = False

    def __init__(self, steps: PlannedSteps):
        self._steps = steps

    def update(self, params: Any, grads: Any, lr: float, step: int, grad_scale: float, all_reduce: Any = None) -> None:
        """Update this rank's ranges; the learning rate is that of the tables. Local."""
        self._steps.device.settle()     # the sums have arrived
        self._steps.update(step - 1, grad_scale)
