"""The account of a run: what its steps have cost and learned, summed up by step, epoch and run."""

from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from hpcmlp.comm.messages import all_gather_bytes, sum_in_place
from hpcmlp.run.coordinator import Console, epoch_line
from hpcmlp.run.numbers import is_spike
from hpcmlp.run.parts import Parts
from hpcmlp.sync.step import StepResult, hidden_share

LAST_STEPS = 10_000  # whose times give the median step of the summary, and an epoch's communication and waiting
SLOW = 1.5           # times the usual seconds of computing and input make a rank a slow one
SLOW_SHARE, SLOW_LEAST_S = 0.1, 0.5    # of an epoch, and seconds, that a slow rank must cost to be named


class Account:
    """Counts finished steps and epochs, and logs what is due.

    Local, but for the end of an epoch. All ranks count; `log` writes on rank 0 only.

    Parameters
    ----------
    parts : of the run.
    console : `coordinator.Console`.
    log : takes one record of metrics.jsonl.
    """

    def __init__(self, parts: Parts, console: Console, log: Callable[[dict[str, Any]], None]):
        self._parts, self._console, self._log = parts, console, log
        self._spent = {"compute": 0.0, "comm": 0.0, "input": 0.0}  # seconds of this rank in this epoch
        self._since = dict.fromkeys((*self._spent, "step"), 0.0)  # seconds since the ranks last met
        self._print_due = False
        self._comm_s, self._flight_s = np.zeros(2), np.zeros(2)   # of this epoch, of this run
        self._step_times: deque[float] = deque(maxlen=LAST_STEPS)
        self._step_parts: deque[tuple[float, ...]] = deque(maxlen=LAST_STEPS)
        self._epoch_comm: deque[float] = deque(maxlen=LAST_STEPS)   # seconds of this rank, by step or round
        self._epoch_counted = 0     # steps or rounds of this epoch
        self._epoch_rows = self._epoch_s = 0.0
        self.bytes_sent: int | None = None      # by this rank in a step that did not log, where that is counted

    @property
    def last_step_s(self) -> float:
        """Seconds of the last step, 0 before the first. Local."""
        return self._step_times[-1] if self._step_times else 0.0

    @property
    def median_step_s(self) -> float:
        """Median seconds of the last steps, 0 before the first. Local."""
        return float(np.median(list(self._step_times))) if self._step_times else 0.0

    def median_parts_s(self) -> dict[str, float]:
        """Return median seconds of the parts of a step: "compute", "comm", "wait" and "input".

        Collective. Over the last steps; empty before the first. The mean over the ranks that train, but "comm", which
        is without waiting for the rank that comes last (`run.waiting`). Out of step ranks do not meet: there "comm" is
        with waiting, and without "wait", as server 0 was told.
        """
        p = self._parts
        if p.apart is not None:
            parts = np.array(list(self._step_parts))
            return dict(zip(self._spent, np.median(parts, axis=0).tolist(), strict=True)) if len(parts) else {}
        from hpcmlp.run.waiting import kept_by_all, least_over_ranks  # once the steps are done
        parts = kept_by_all(p.comm, self._step_parts)
        if not len(parts):
            return {}
        comm = least_over_ranks(p.comm, parts[:, 1])
        trains = np.array([float(p.roles is None or p.topology.rank in p.roles.workers)])
        total = parts * trains
        sum_in_place(p.comm, total)
        sum_in_place(p.comm, trains)
        compute, spent, read = (total / trains).T
        return {name: float(np.median(seconds)) for name, seconds in
                (("compute", compute), ("comm", comm), ("wait", spent - comm), ("input", read))}

    @property
    def hidden(self) -> float:
        """The share of the run's communication that was hidden behind computing, 0 to 1. Local."""
        return hidden_share(self._comm_s[1], self._flight_s[1])

    def count(self, result: StepResult, number: int, epoch: int, input_s: float, step_s: float, log: bool) -> None:
        """Count a finished step, and log it where `log` says that it is due.

        Local.

        number, epoch : of the step, from 0. input_s, step_s : seconds this rank waited for samples, and in all.
        """
        p = self._parts
        progress = p.session.progress
        progress.step = number + 1
        since = self._since
        for name, seconds in (("compute", result.compute_s), ("comm", result.comm_s), ("input", input_s)):
            self._spent[name] += seconds
            since[name] += seconds
        since["step"] += step_s
        self._comm_s += result.comm_s
        self._flight_s += result.flight_s
        self._epoch_s += step_s
        every = p.config.print_every
        self._print_due |= bool(every) and (number + 1) % every == 0
        if not result.steps:
            return
        self._epoch_comm.append(since["comm"])
        self._epoch_counted += 1
        mean = {name: seconds / result.steps for name, seconds in since.items()}
        self._since = dict.fromkeys(since, 0.0)
        self._step_times.append(mean["step"])
        self._step_parts.append(tuple(mean[name] for name in self._spent))
        if not log:
            self.bytes_sent = result.bytes_sent
        self._epoch_rows += result.rows
        if result.skips_at_end:
            progress.skipped += result.steps if result.skipped else result.skips_at_end
            self._log({"kind": "event", "event": "skipped update", "step": number + 1,
                       "reason": "loss or gradient not finite", **_again(result)})
        if not result.skipped:
            progress.loss_sum += result.loss * result.weight
            progress.weight_sum += result.weight
            spike = is_spike(progress, result.loss)
            if spike is not None:
                self._log({"kind": "event", "event": "loss spike", "step": number + 1, "loss": result.loss,
                           "mean": spike[0], "spread": spike[1], "epoch": epoch,
                           "batch": number % p.steps_per_epoch, **_again(result)})
        if result.deviants:
            ranks = ", ".join(map(str, result.deviants))
            self._console.line(f"warning: computed again, the loss of step {number + 1} has other bits on rank(s) "
                               f"{ranks}: suspect the hardware there")
        if result.round is not None and (result.round.lost_steps or result.round.left_out):
            self._log({"kind": "event", "event": "left out", "step": number + 1, "ranks": result.round.left_out,
                       "rank_steps": result.round.lost_steps, "reason": "loss, gradient or state not finite"})
        loss = result.loss if result.last_loss is None else result.last_loss
        if log:
            self._log({"kind": "step", "step": number + 1, "epoch": epoch, "loss": loss,
                       "lr": p.schedule.lr(number) * progress.lr_factor, "grad_norm": result.grad_norm,
                       "samples_per_s": result.rows / result.steps / mean["step"], "compute_s": mean["compute"],
                       "comm_s": mean["comm"], "hidden": result.hidden, "input_s": mean["input"],
                       **({"round": {"steps": result.steps, **asdict(result.round)}} if p.local else {})})
        if self._print_due:
            self._print_due = False
            self._console.line(f"Step {number + 1}, loss = {loss:.2f}")
        self._console.progress(number + 1, p.total_steps, loss)

    def count_stretch(self, came: Any, seconds: float) -> None:
        """Take over what rank 0 has counted step by step in a stretch out of step (`sync.server.Stretch`). Local."""
        progress = self._parts.session.progress
        progress.step, progress.skipped = came.version, progress.skipped + came.skipped
        progress.loss_sum += came.loss
        progress.weight_sum += came.weight
        self._epoch_rows, self._epoch_s = self._epoch_rows + came.rows, seconds

    def end_epoch(self, epoch: int, val: dict[str, Any]) -> None:
        """Print and log an epoch with its validation metrics, and what each rank spent on what; begin the next one.

        Collective.
        """
        p = self._parts
        progress, steps = p.session.progress, p.config.steps
        train_loss = progress.loss_sum / progress.weight_sum if progress.weight_sum else float("nan")
        progress.loss_sum = progress.weight_sum = 0.0
        rate = self._epoch_rows / self._epoch_s if self._epoch_s else 0.0    # survivors may begin at its end
        hidden = hidden_share(self._comm_s[0], self._flight_s[0])
        self._comm_s[0] = self._flight_s[0] = 0.0
        epoch_s = self._epoch_s
        self._epoch_rows = self._epoch_s = 0.0
        epochs = None if steps is not None else p.total_steps // p.steps_per_epoch
        comm_s = self._communication()
        spent = {"compute": self._spent["compute"], **self._apart(self._spent["comm"], comm_s),
                 "input": self._spent["input"]}
        self._console.line(epoch_line(epoch + 1, epochs, train_loss, val, rate, spent,
                                      hidden if p.plan.overlap else None))
        self._log({"kind": "epoch", "epoch": epoch + 1, "step": progress.step, "train_loss": train_loss, "val": val,
                   "samples_per_s": rate, "seconds": spent, "hidden": hidden})
        self._tell_of_ranks(epoch, epoch_s, comm_s)
        self._spent = dict.fromkeys(self._spent, 0.0)

    def _communication(self) -> float | None:
        """Seconds of the epoch's communication without waiting; None where ranks are not in step. Collective."""
        p, counted = self._parts, self._epoch_counted
        self._epoch_counted = 0
        if p.apart is not None:
            return None
        from hpcmlp.run.waiting import kept_by_all, least_over_ranks  # at the end of the first epoch
        kept = kept_by_all(p.comm, self._epoch_comm)
        self._epoch_comm.clear()
        # The last steps stand for those of an epoch that has more.
        return float(least_over_ranks(p.comm, kept).sum()) * counted / len(kept) if len(kept) else 0.0

    @staticmethod
    def _apart(spent: float, comm_s: float | None) -> dict[str, float]:
        """What a rank spent on communication in two parts, or in one where nobody can tell."""
        return {"comm": spent} if comm_s is None else {"comm": comm_s, "wait": max(0.0, spent - comm_s)}

    def _tell_of_ranks(self, epoch: int, epoch_s: float, comm_s: float | None) -> None:
        """Log every rank's seconds of the epoch, and name ranks that took much longer than the others. Collective."""
        p = self._parts
        own = np.array(list(self._spent.values()), np.float64)
        spent = np.frombuffer(b"".join(all_gather_bytes(p.comm, own.tobytes())), np.float64).reshape(-1, own.size)
        compute, comm, read = spent.round(6).T
        wait = comm if comm_s is None else np.maximum(0.0, comm - comm_s).round(6)
        busy = compute + read
        usual = np.sort(busy)[(len(busy) - 1) // 2]     # of two the faster
        slow = np.flatnonzero(busy > SLOW * usual)
        self._log({"kind": "ranks", "epoch": epoch + 1, "step": p.session.progress.step, "compute_s": compute.tolist(),
                   "input_s": read.tolist(), "comm_s": comm_s, "wait_s": wait.tolist(),
                   "slow": [int(rank) for rank in slow]})
        for rank in (r for r in slow[:3] if usual and busy[r] - usual > max(SLOW_SHARE * epoch_s, SLOW_LEAST_S)):
            self._console.line(f"rank {rank} is slow: {busy[rank]:.2f} s of computing and input this epoch, "
                               f"{busy[rank] / usual:.1f} times the usual")


def _again(result: Any) -> dict[str, Any]:
    """What an event says of ranks that have computed the loss again: whose had other bits."""
    return {} if result.deviants is None else {"deviants": result.deviants}
