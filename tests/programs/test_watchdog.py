"""A rank that the others wait for is named, with its line, and the wait ends."""

import json
import re
import time

import pytest

# Limits leave room for a loaded machine: what comes late under load is the line itself, never its content.
OPTIONS = ("--hidden", "16,16", "--global-batch-size", 32, "--steps", 60, "--checkpoint-every", 10, "--no-test")


def said(done):
    return [line.partition("watchdog: ")[2] for line in done.stderr.splitlines() if "watchdog: " in line]


@pytest.mark.parametrize("act, rank, what, line", [
    ("stop", 1, "is stopped, in step 40", "hpcmlp/"),
    ("stop", 0, "is stopped, in step 40", "hpcmlp/"),   # who speaks for its node and holds the run directory
    ("spin", 2, "is alive in step 40", "hpcmlp/run/faults.py:"),
    ("hold", 1, "in C code that holds the interpreter", "hpcmlp/run/faults.py:"),
])
def test_a_late_rank_is_named_and_the_job_ends_with_75(flowers, hpcmlp, tmp_path, act, rank, what, line):
    run = tmp_path / "run"
    done = hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, "--watchdog", 1, ranks=3,
                  env={"HPCMLP_FAULT": f"rank={rank},step=40,act={act}"})
    first = said(done)[0]
    assert re.match(r"\w+ of step 40: ranks? [012, ]+ ha(s|ve) waited for \d+\.\d s; late: rank "
                    rf"{rank} \(host \S+, pid \d+\) ", first), done.stderr
    assert what in first and f" at {line}" in first
    assert "ends with 75" in said(done)[-1] and done.returncode == 75
    stacks = next(run.glob("stacks-*.txt")).read_text()
    assert all(f"\nrank {r} (host" in stacks for r in range(3))
    assert stacks.count("Current thread") == (2 if act == "stop" else 3)    # a stopped process writes nothing
    if act != "stop":
        assert re.search(r"faults\.py\", line \d+ in strike", stacks)
    if rank:
        return
    done = hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, "--resume", ranks=2)
    # The save of step 40 may still have been on its way.
    assert done.returncode == 0 and re.search("resumed at step (30|40) of", done.stdout), done.stderr


def test_a_wait_that_ends_by_itself_costs_nothing(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--watchdog", 1, ranks=2,
                  env={"HPCMLP_FAULT": "rank=1,step=40,act=sleep:3"})
    assert done.returncode == 0, done.stderr
    assert any("late: rank 1" in text and "faults.py" in text for text in said(done)), done.stderr
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_slow_rank_is_no_alarm_and_every_epoch_tells_of_the_ranks(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--hidden", "16", "--epochs", 2,
                  "--global-batch-size", 32, "--watchdog", 5, "--no-test", ranks=2,
                  env={"HPCMLP_FAULT": "rank=1,act=sleep:0.02"})
    assert done.returncode == 0 and not said(done), done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ranks = [record for record in records if record["kind"] == "ranks"]
    assert [record["epoch"] for record in ranks] == [1, 2]
    for record in ranks:
        assert all(len(record[key]) == 2 and min(record[key]) >= 0 for key in ("compute_s", "input_s", "wait_s"))
        # It sleeps while it should load; the other one waits for it.
        assert record["wait_s"][0] > 20 * 0.02
        # What the sleeping rank sees is the exchange; the other's waiting is no part of it.
        assert record["comm_s"] + record["wait_s"][1] < 0.5 * record["wait_s"][0]
    epochs = [record for record in records if record["kind"] == "epoch"]
    for record, epoch in zip(ranks, epochs, strict=True):
        seconds = epoch["seconds"]
        assert list(seconds) == ["compute", "comm", "wait", "input"] and seconds["comm"] == record["comm_s"]
        assert seconds["wait"] == pytest.approx(record["wait_s"][0], abs=1e-5)
    assert re.search(r"comm \d+ % wait [5-9]\d %", done.stdout)
    parts = json.loads((tmp_path / "run" / "summary.json").read_text())["step_parts_s"]
    assert parts["wait"] > 0.3 * 0.02 and parts["comm"] < 0.5 * parts["wait"]   # a mean: one of the two waits


def test_a_rank_that_goes_without_a_word_ends_the_job_soon(flowers, hpcmlp, tmp_path):
    begin = time.monotonic()
    hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, ranks=3,
           env={"HPCMLP_FAULT": "rank=2,step=40,act=exit:0"})
    assert time.monotonic() - begin < 30    # 2 where the machine is quiet; whatever the launcher returns
    assert not (tmp_path / "run" / "summary.json").exists()


def test_nobody_is_watched_with_a_limit_of_zero(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--watchdog", 0, ranks=2,
                  env={"HPCMLP_FAULT": "rank=1,step=40,act=sleep:2"})
    assert done.returncode == 0 and not said(done)
