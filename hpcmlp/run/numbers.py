"""Numbers that go wrong: what a run does about a loss or gradient that is not finite, and losses that jump, counted.

All of it is decided from sums that every rank holds alike, so that all ranks decide alike. Whether a number is finite
is found before anything is summed; the update of such a step is never made.
"""

import math
from typing import Any

import numpy as np

from hpcmlp.comm.agreement import alike
from hpcmlp.errors import RunFailed

MOST_SKIPS = 10       # consecutive updates skipped
MOST_ROLLBACKS = 8    # of one run
ROLLBACK_FACTOR = 0.5  # of the learning rate, each time
SPIKE_AFTER = 20      # steps before losses are judged
SPIKE_SPREADS = 8.0   # standard deviations above the mean of the last losses
_DECAY = 0.98         # of that mean: about the last 50 steps


def judge(action: str, result: Any, skips: int, most: int, done: int, what: str, progress: Any) -> bool:
    """Return whether the run shall go back to its last good state; raise RunFailed where it cannot go on.

    Local; the same on all ranks.

    action : --on-nonfinite. result : of the step, `sync.step.StepResult`. skips, most : updates skipped in a row, and
    how many may be. done : steps counted. what : "steps" or "rounds". progress : `session.Progress`.
    """
    if result.not_finite and action != "skip":
        where = f"at step {done} the loss or gradient of {result.not_finite} rank(s) is not finite"
        if action == "stop":
            raise alike(RunFailed(f"{where}, and --on-nonfinite is stop; go on from the last checkpoint with --resume "
                                  "and --on-nonfinite skip or rollback, or lower --lr and begin anew."))
        if progress.rollbacks >= MOST_ROLLBACKS:
            raise alike(RunFailed(f"{where}, after going back {MOST_ROLLBACKS} times, to "
                                  f"{progress.lr_factor:.3g} of the learning rate; check the data, or lower --lr and "
                                  "begin anew."))
        return True
    if skips >= most:
        raise alike(RunFailed(f"{skips} {what} in a row, the last at step {done}, had a loss or gradient that is not "
                              "finite; lower --lr, add --warmup-steps or --clip-norm, or check the data."))
    return False


def why_not_good(state: Any) -> str | None:
    """Return why a saved state is none to go back to, or None; for `checkpoint.find_newest`. Local."""
    for path, array in state.arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"holds numbers that are not finite ({path})"
    return None


def is_suspect(progress: Any, result: Any) -> bool:
    """Return whether a step's result is one that faulty hardware gives, among others: no number, or a loss that jumps.

    Local; the same on all ranks, before the step is counted.
    """
    return bool(result.not_finite) or result.weight > 0.0 and _jumps(progress, result.loss)


def _spread(progress: Any) -> float:
    """The standard deviation of the last losses."""
    return math.sqrt(max(0.0, progress.loss_square - progress.loss_mean * progress.loss_mean))


def _jumps(progress: Any, loss: float) -> bool:
    return progress.losses_seen >= SPIKE_AFTER and loss > progress.loss_mean + SPIKE_SPREADS * _spread(progress)


def is_spike(progress: Any, loss: float) -> tuple[float, float] | None:
    """Take the loss of a step into the running mean and spread; return both when it jumped out of them, else None.

    Local. `progress` keeps both, so that a resumed run counts as one that went on. A spike moves the mean only as far
    as the largest loss that is none.
    """
    mean, square, seen = progress.loss_mean, progress.loss_square, progress.losses_seen
    spread, spike = _spread(progress), _jumps(progress, loss)
    taken = mean + SPIKE_SPREADS * spread if spike else loss
    weight = max(1.0 - _DECAY, 1.0 / (seen + 1))
    progress.loss_mean = mean + weight * (taken - mean)
    progress.loss_square = square + weight * (taken * taken - square)
    progress.losses_seen = seen + 1
    if not spike:
        return None
    progress.spikes += 1
    return mean, spread
