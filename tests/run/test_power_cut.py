"""The short form of benchmarks/faults/power_cut.py, and every n-th file operation of a save failing."""

import errno
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "faults"
sys.path.insert(0, str(FAULTS))
try:
    import power_cut
    from file_calls import FileCalls, Killed
finally:
    sys.path.remove(str(FAULTS))

from hpcmlp.errors import CannotWrite  # noqa: E402
from hpcmlp.run import checkpoint  # noqa: E402
from hpcmlp.run.state_file import State  # noqa: E402


def test_no_state_of_the_disk_loses_what_was_acknowledged(monkeypatch):
    monkeypatch.setattr(power_cut, "ALL", 7)
    monkeypatch.setattr(power_cut, "SAMPLE", 30)
    for seed in range(4):
        states, wrong = power_cut.cut(seed, 250)
        assert states > 50 and wrong == []


def test_what_comes_back_of_a_deletion_that_was_not_certain_is_no_loss():
    """In this life the newest turns bad while the deletion of the one before may still be undone; the best is older."""
    states, wrong = power_cut.cut(22, 8000)
    assert states > 900 and wrong == []


@pytest.mark.parametrize("name", power_cut.MUTANTS)
def test_a_writer_that_leaves_out_one_kind_of_fsync_is_caught(name):
    assert power_cut.caught(name, 1, 4, 600)


def state(step):
    return State({"step": step}, {"params/a": power_cut.np.arange(300, dtype=power_cut.np.float32) + step})


def save_with(tmp_path, decide):
    """Two good checkpoints, then a save of a third with faults; return the number of operations."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    with FileCalls(tmp_path, decide) as calls:
        try:
            checkpoint.save(tmp_path, 3, state(3))
        except (CannotWrite, Killed) as error:
            return calls.number, error
    return calls.number, None


def check(tmp_path, error):
    found, notes = checkpoint.newest_good(tmp_path)
    assert notes == [] and found.meta["step"] in ((3,) if error is None else (2, 3))
    checkpoint.remove_leftovers(tmp_path)
    checkpoint.save(tmp_path, 4, state(4))
    assert checkpoint.newest_good(tmp_path)[0].meta["step"] == 4 and checkpoint.newest_good(tmp_path)[1] == []
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, "kill"])
def test_whichever_file_operation_fails_or_is_the_last_a_good_checkpoint_loads(tmp_path, fault):
    total, _ = save_with(tmp_path / "whole", None)
    assert total > 15
    failed = 0
    for last in range(total):
        def decide(number, name, path, last=last):
            if number == last:
                raise Killed if fault == "kill" else OSError(fault, "on purpose")

        _, error = save_with(tmp_path / f"{fault}-{last}", decide)
        failed += error is not None
        check(tmp_path / f"{fault}-{last}", error)
    assert failed > 12
