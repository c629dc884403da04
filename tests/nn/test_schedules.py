"""Tests of nn/schedules.py: PyTorch's learning rates, warm-up, ends, and checks."""

from pathlib import Path

import numpy as np
import pytest

from hpcmlp.errors import ConfigError
from hpcmlp.nn.schedules import DEFAULTS, Schedule

ORACLE = Path(__file__).parents[1] / "oracle" / "nn.npz"


@pytest.mark.parametrize(("case", "kind", "options"), [
    ("step", "step", {"step_size": 13, "gamma": 0.5}), ("exponential", "exponential", {"gamma": 0.93}),
    ("cosine", "cosine", {"min_lr": 0.001}), ("cosine-warmup", "cosine", {"min_lr": 0.001, "warmup_steps": 10}),
    ("one_cycle", "one_cycle", {}),
    ("one_cycle-options", "one_cycle", {"pct_start": 0.41, "div_factor": 7.0, "final_div_factor": 50.0})])
def test_learning_rates_are_those_of_pytorch(case, kind, options):
    with np.load(ORACLE) as file:
        wanted = file[f"schedule/{case}"]
    schedule = Schedule(kind, 0.1, 60, **options)
    np.testing.assert_allclose([schedule.lr(step) for step in range(60)], wanted, rtol=1e-9)


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize(("total", "warmup"), [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (7, 2), (7, 7),
                                              (1000, 0), (1000, 1), (1000, 7)])
def test_every_step_has_a_positive_rate_up_to_the_peak_whatever_was_asked_before(kind, total, warmup):
    schedule = Schedule(kind, 0.1, total, warmup)
    rates = [schedule.lr(step) for step in range(total)]
    assert all(type(rate) is float and 0.0 < rate <= 0.1 + 1e-15 for rate in rates)
    assert rates == [schedule.lr(step) for step in reversed(range(total))][::-1]
    assert 0.0 <= schedule.lr(total) <= 0.1 and 0.0 <= schedule.lr(10 * total + 5) <= 0.1
    if warmup:
        assert np.all(np.diff(rates[:warmup]) > 0) and rates[warmup - 1] == pytest.approx(0.1)


def test_warm_up_is_linear_and_the_schedule_starts_after_it():
    schedule = Schedule("step", 1.0, 100, 4, step_size=10, gamma=0.5)
    assert [schedule.lr(step) for step in (0, 1, 2, 3, 4, 13, 14)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.5]
    cosine = Schedule("cosine", 1.0, 104, 4, min_lr=0.2)
    assert cosine.lr(4) == 1.0 and cosine.lr(54) == pytest.approx(0.6) and cosine.lr(104) == 0.2 == cosine.lr(1000)


def test_exponential_falls_by_gamma_in_an_interval():
    schedule = Schedule("exponential", 1.0, 100, gamma=0.25, interval=10)
    assert [schedule.lr(step) for step in (0, 5, 10, 20)] == pytest.approx([1.0, 0.5, 0.25, 0.0625])


@pytest.mark.parametrize(("arguments", "options", "text"), [
    (("linear", 0.1, 10), {}, "'linear' is not known"), (("constant", 0.1, 10, 11), {}, "warmup_steps = 11"),
    (("constant", 0.1, 10), {"gamma": 0.1}, "constant has no option gamma"),
    (("cosine", 0.1, 10), {"min_lr": 0.2}, "min_lr = 0.2 is above"),
    (("step", 0.1, 10), {"step_size": 0}, "step_size = 0"), (("one_cycle", 0.1, 10), {"pct_start": 1.5}, "pct_start")])
def test_numbers_that_cannot_work_are_refused(arguments, options, text):
    with pytest.raises(ConfigError, match=text):
        Schedule(*arguments, **options)
