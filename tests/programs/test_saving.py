"""Saving and stopping as a user meets them: a write that fails, a file and a clock that stop, the second interrupt."""

import json
import os
import signal
import time

import pytest

from hpcmlp.run import checkpoint

OPTIONS = ("--hidden", "8", "--global-batch-size", 32, "--log-every", 1)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_write_that_fails_beside_the_training_ends_all_ranks_with_one_sentence(flowers, hpcmlp, tmp_path, ranks):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("in the way")
    done = hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, "--checkpoint-every", 3, "--epochs", 1000,
                  ranks=ranks)
    assert done.returncode == 73, done.stderr
    assert done.stderr.count("\n") == 1 and "cannot make a checkpoint here" in done.stderr
    assert not (run / "summary.json").exists() and not (run / "lock").exists()


def test_every_save_is_told_with_its_seconds_and_the_last_ones_are_on_disk(flowers, hpcmlp, tmp_path):
    run = tmp_path / "run"
    done = hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, "--checkpoint-every", 1, "--steps", 30, ranks=2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saved = [r for r in lines if r["kind"] == "event" and r["event"] == "saved"]
    assert [r["step"] for r in saved] == list(range(1, 31))  # every one of them, though each came too soon
    assert all(r["written_s"] > 0 for r in saved)
    found, notes = checkpoint.newest_good(run)
    assert found.meta["step"] == 30 and notes == []


def start_slow(start_hpcmlp, flowers, run, ranks, seconds):
    """Start a run whose steps last `seconds`, and wait until some are done."""
    process = start_hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, "--checkpoint-every", 1, "--steps", 500,
                           ranks=ranks, env={"HPCMLP_FAULT": f"act=sleep:{seconds}"})
    until = time.monotonic() + 60
    while time.monotonic() < until and len(checkpoint.list_checkpoints(run)) < 1:
        time.sleep(0.02)
    return process


def test_the_file_stop_stops_the_run_and_is_gone(flowers, start_hpcmlp, tmp_path):
    process = start_slow(start_hpcmlp, flowers, tmp_path / "run", 2, 0.05)
    (tmp_path / "run" / "stop").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by the file" in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "stop").exists()


def test_the_end_of_a_slurm_job_stops_the_run_before(flowers, hpcmlp, tmp_path):
    end = int(time.time()) + 6
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--epochs", 100000,
                  "--time-limit", 60, env={"SLURM_JOB_ID": "12", "SLURM_JOB_END_TIME": str(end)})
    assert done.returncode == 75 and "stopped by the end of the SLURM job" in done.stderr, done.stderr
    assert time.time() < end + 20 and checkpoint.newest_good(tmp_path / "run")[0].meta["step"] > 0


def test_one_interrupt_saves_and_the_second_ends_at_once(flowers, start_hpcmlp, tmp_path):
    process = start_slow(start_hpcmlp, flowers, tmp_path / "once", None, 0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGINT" in err
    process = start_slow(start_hpcmlp, flowers, tmp_path / "twice", None, 3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # within the step: nothing can be saved in between
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "second SIGINT" in err and time.monotonic() - begin < 2.5
    assert checkpoint.newest_good(tmp_path / "twice")[0].meta["step"] >= 1
    assert os.path.exists(tmp_path / "twice" / "lock")  # left behind by a dead process: --resume takes it over
