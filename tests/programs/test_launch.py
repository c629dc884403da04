"""Ranks that die or hang are started again, so many times, and the run directory alone says when it is done."""

import json
import signal
import time

import pytest

from hpcmlp.programs.launch import find_launcher, finished, stamp
from hpcmlp.run import checkpoint

OPTIONS = ("--hidden", "16,16", "--global-batch-size", 32, "--steps", 60, "--checkpoint-every", 10, "--no-test")


def said(done):
    return [line.partition("launch: ")[2] for line in done.stderr.splitlines() if "hpcmlp: launch: " in line]


def test_a_killed_rank_costs_a_restart_on_the_ranks_that_remain(flowers, hpcmlp, tmp_path):
    run = tmp_path / "run"
    done = hpcmlp("launch", "-n", 2, "--backoff", 0.1, "--", "train", "--data", flowers, "--out", run, *OPTIONS,
                  env={"HPCMLP_FAULT": "rank=1,step=25,act=kill"})
    assert done.returncode == 0, done.stderr
    assert len(said(done)) == 1 and "saved up to step-00000020: it starts again on 1 rank in 0.1 s (restart 1 of 3)" \
        in said(done)[0]
    assert "resumed at step 20 of 60" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["ranks"]) == (60, 1)


def test_a_hung_rank_is_ended_and_the_job_starts_again(flowers, hpcmlp, tmp_path):
    done = hpcmlp("launch", "-n", 2, "--backoff", 0.1, "--", "train", "--data", flowers, "--out", tmp_path / "run",
                  *OPTIONS, "--watchdog", 1, env={"HPCMLP_FAULT": "rank=1,step=25,act=stop"})
    assert done.returncode == 0, done.stderr
    assert "ended a wait without end; saved up to step-00000020: it starts again on 1 rank" in said(done)[0]


def test_restarts_are_bounded(flowers, hpcmlp, tmp_path):
    done = hpcmlp("launch", "-n", 2, "--max-restarts", 1, "--min-ranks", 2, "--backoff", 0, "--", "train", "--data",
                  flowers, "--out", tmp_path / "run", *OPTIONS, env={"HPCMLP_FAULT": "rank=1,step=5,act=kill"})
    assert done.returncode != 0
    assert len(said(done)) == 2 and "nothing was saved yet: it starts again on 2 ranks" in said(done)[0]
    assert "all that --max-restarts allows" in said(done)[1]


def test_what_would_end_alike_is_not_started_again(flowers, hpcmlp, tmp_path):
    done = hpcmlp("launch", "-n", 2, "--", "train", "--data", tmp_path / "none", "--out", tmp_path / "run")
    assert done.returncode == 66 and not said(done)
    done = hpcmlp("launch", "-n", 2, "--", "train", "--data", flowers)
    assert done.returncode == 2 and "--out" in done.stderr and done.stderr.count("\n") == 1
    done = hpcmlp("launch", "-n", 2, "--launcher", "no-such-launcher", "--", "train", "--out", tmp_path / "run")
    assert done.returncode == 69 and "no-such-launcher" in done.stderr


def test_a_stop_that_was_asked_for_is_no_reason_to_start_again(flowers, start_hpcmlp, tmp_path):
    run = tmp_path / "run"
    process = start_hpcmlp("launch", "-n", 2, "--", "train", "--data", flowers, "--out", run, *OPTIONS, "--log-every",
                           1, env={"HPCMLP_FAULT": "act=sleep:0.1"})
    end = time.monotonic() + 60
    while time.monotonic() < end and b'"step"' not in ((run / "metrics.jsonl").read_bytes()
                                                       if (run / "metrics.jsonl").exists() else b""):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "starts again" not in err, err
    assert checkpoint.list_checkpoints(run)


def test_the_record_counts_only_when_it_is_new_and_says_so(tmp_path):
    assert not finished(str(tmp_path), None)
    record = tmp_path / "summary.json"
    record.write_text('{"status": "finished"}')
    before = stamp(str(tmp_path), "summary.json")
    assert finished(str(tmp_path), None) and not finished(str(tmp_path), before)
    record.unlink()
    record.write_text('{"status": "stopped"}')
    assert not finished(str(tmp_path), before)
    record.write_text('{"status": ')
    assert not finished(str(tmp_path), before)


@pytest.mark.parametrize("given, words", [("sh -c x", ["sh", "-c", "x"]), ("sh 'a b'", ["sh", "a b"])])
def test_a_launcher_is_given_as_words(given, words):
    assert find_launcher(given) == words
