"""A run directory has one owner, and its log never holds half a line or a step from the future."""

import errno
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from hpcmlp.errors import CannotWrite, ConfigError
from hpcmlp.run.directory import RunDirectory, check_same_run, to_json


def test_a_second_run_is_refused_and_told_by_whom(tmp_path):
    first = RunDirectory(tmp_path / "run", False)
    with pytest.raises(CannotWrite, match=f"in use by {socket.gethostname()}, pid {os.getpid()}"):
        RunDirectory(tmp_path / "run", False)
    first.release()
    RunDirectory(tmp_path / "run", False).release()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": int(child.stdout), "job": None}))
    RunDirectory(tmp_path, False).release()


def test_the_lock_of_a_dead_process_that_nobody_has_collected_is_taken_over(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)     # it has ended, and stays in the table
    (tmp_path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": child.pid, "job": None}))
    RunDirectory(tmp_path, False).release()
    child.wait()


def test_of_two_that_see_the_same_stale_lock_one_takes_over(tmp_path, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": dead.pid, "job": None}))
    real, looks = RunDirectory._check_stale, []

    def look(self):
        stale = real(self)
        looks.append(stale)
        if len(looks) == 1:                            # right after our look the other one has it
            lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "job": None}))
        return stale
    monkeypatch.setattr(RunDirectory, "_check_stale", look)
    with pytest.raises(CannotWrite, match=f"in use by .*pid {os.getppid()}"):
        RunDirectory(tmp_path, True)
    assert looks == [True] and json.loads(lock.read_text())["pid"] == os.getppid()
    assert os.listdir(tmp_path) == ["lock"]


def test_who_was_killed_taking_over_holds_nobody_up_for_long(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 5, "job": None}))
    (tmp_path / "lock.takeover").write_bytes(b"")
    with pytest.raises(CannotWrite, match="just now"):
        RunDirectory(tmp_path, True)
    os.utime(tmp_path / "lock.takeover", (time.time() - 60,) * 2)
    RunDirectory(tmp_path, True).release()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("age, taken", [(1.0, False), (1000.0, True)])
def test_the_lock_of_another_host_counts_while_it_shows_signs_of_life(tmp_path, age, taken):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": "17"}))
    os.utime(lock, (time.time() - age,) * 2)
    if taken:
        RunDirectory(tmp_path, False).release()
    else:
        with pytest.raises(CannotWrite, match="job 17 on elsewhere"):
            RunDirectory(tmp_path, False)


def test_a_requeued_job_takes_its_own_lock(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": "17"}))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    RunDirectory(tmp_path, False).release()


def test_resuming_drops_lines_past_the_step_and_the_torn_last_line(tmp_path):
    lines = [{"kind": "step", "step": s, "loss": 1.0} for s in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(to_json(r) + "\n" for r in lines) + '{"kind": "st')
    directory = RunDirectory(tmp_path, True)
    directory.open_log(20)
    directory.log({"kind": "event", "step": 20, "loss": float("nan")})
    directory.release()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [*lines[:2], {"kind": "event", "step": 20, "loss": None}]


def test_a_log_that_cannot_be_opened_is_said_to_be_one_that_cannot_be_written(tmp_path, monkeypatch):
    directory, real = RunDirectory(tmp_path, False), open

    def fails(path, mode="r", **options):
        if mode == "ab":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, mode, **options)
    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(CannotWrite, match="metrics.jsonl"):
        directory.open_log(None)
    directory.release()


def test_what_others_know_is_added_once_where_the_log_lacks_it(tmp_path):
    def step(number, loss):
        return {"kind": "step", "step": number, "loss": loss}

    (tmp_path / "metrics.jsonl").write_text("".join(to_json(step(s, 1.0)) + "\n" for s in (10, 20)) + '{"kind": "st')
    epoch = {"kind": "epoch", "step": 30, "epoch": 1}
    known = [step(20, 2.0), step(30, 2.0), {"kind": "event", "event": "loss spike", "step": 30}, epoch]
    directory = RunDirectory(tmp_path, True)
    for redo, more in ((True, []), (False, [epoch])):
        directory.open_log(30, redo, [*known, step(30, 3.0), step(40, 3.0)])
        kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert kept == [step(10, 1.0), step(20, 1.0), *known[1:3], *more]
    directory.release()


def test_differences_between_runs_are_listed():
    check_same_run({"a": 1, "b": 2}, {"a": 1, "b": 3}, {"b"}, {})
    with pytest.raises(ConfigError, match="b was 2 and is 3"):
        check_same_run({"a": 1, "b": 2}, {"a": 1, "b": 3}, set(), {"b": 3})


def test_an_option_younger_than_the_checkpoint_had_its_default():
    check_same_run({"a": 1}, {"a": 1, "young": "float32"}, set(), {"young": "float32"})
    with pytest.raises(ConfigError, match="young was 'float32' and is 'bf16'"):
        check_same_run({"a": 1}, {"a": 1, "young": "bf16"}, set(), {"young": "float32"})


def test_a_directory_made_for_nothing_goes_again(tmp_path):
    RunDirectory(tmp_path / "new", False).release()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    RunDirectory(tmp_path / "old", False).release()
    assert (tmp_path / "old").exists()
    kept = RunDirectory(tmp_path / "used", False)
    kept.write("config.toml", "lr = 1.0\n")
    kept.release()
    assert (tmp_path / "used" / "config.toml").exists()
