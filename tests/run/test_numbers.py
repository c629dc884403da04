"""Losses that jump are counted, ordinary ones are not; what is not finite is answered as the option says."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest

from hpcmlp.errors import RunFailed
from hpcmlp.run import numbers
from hpcmlp.run.session import Progress
from hpcmlp.run.state_file import State
from hpcmlp.sync.step import StepResult


def losses(steps, seed=0):
    """A loss that falls with noise of a tenth of it."""
    random = np.random.default_rng(seed)
    return [float(2.0 * np.exp(-k / 200) * (1 + 0.1 * random.standard_normal())) for k in range(steps)]


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_falling_loss_has_no_spikes(seed):
    progress = Progress()
    assert not any(numbers.is_spike(progress, loss) for loss in losses(2000, seed))
    assert progress.spikes == 0 and progress.losses_seen == 2000


def test_each_spike_is_counted_once_and_hides_no_later_one():
    progress, found = Progress(), []
    for step, loss in enumerate(losses(600)):
        if numbers.is_spike(progress, loss * 30 if step in (100, 101, 300, 599) else loss):
            found.append(step)
    assert found == [100, 101, 300, 599] and progress.spikes == 4


def test_a_resumed_count_goes_on_as_if_it_had_not_stopped():
    one, other = Progress(), Progress()
    for loss in losses(300):
        numbers.is_spike(one, loss)
        numbers.is_spike(other, loss)
        other = copy.deepcopy(other)
    assert one == other


def judge(action, result, skips=1, progress=None):
    return numbers.judge(action, result, skips, numbers.MOST_SKIPS, 7, "steps", progress or Progress())


def test_the_options_answers():
    fine, bad = StepResult(), StepResult(skipped=True, not_finite=2)
    for action in ("skip", "stop", "rollback"):
        assert judge(action, fine, 0) is False
    assert judge("skip", bad) is False and judge("rollback", bad) is True
    with pytest.raises(RunFailed, match="10 steps in a row, the last at step 7") as told:
        judge("skip", bad, numbers.MOST_SKIPS)
    assert told.value.agreed
    with pytest.raises(RunFailed, match="of 2 rank.s. is not finite, and --on-nonfinite is stop") as told:
        judge("stop", bad)
    assert told.value.agreed
    with pytest.raises(RunFailed, match="after going back 8 times, to 0.25 of"):
        judge("rollback", bad, progress=Progress(rollbacks=numbers.MOST_ROLLBACKS, lr_factor=0.25))


def test_a_state_to_go_back_to_holds_finite_numbers_only():
    arrays = {"params/a": np.ones(3, np.float32), "count": np.ones(2, np.int64)}
    assert numbers.why_not_good(State({}, arrays)) is None
    arrays["optimizer/m/a"] = np.array([1, np.inf], np.float32)
    assert "optimizer/m/a" in numbers.why_not_good(SimpleNamespace(arrays=arrays))
