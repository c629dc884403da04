"""Runs with --sync server as a user starts them: losses, stops, kills, resumes, and what is told of them."""

import json
import re
import time
from pathlib import Path

import pytest

TRAIN = ("--hidden", "19,19", "--global-batch-size", 50, "--log-every", 5, "--checkpoint-every", 5)
MODES = [("--staleness", 0), ("--staleness", 2), ("--staleness", "async")]
STEPS_PER_EPOCH = 15      # of the 720 or so training rows


def train(hpcmlp, data, out, *options, ranks=3, epochs=2, servers=1, fault=None):
    env = {"HPCMLP_FAULT": fault} if fault else None
    return hpcmlp("train", "--data", data, "--out", out, "--epochs", epochs, "--sync", "server", "--servers", servers,
                  *TRAIN, *options, ranks=ranks, env=env)


def records(out, kind):
    with open(out / "metrics.jsonl") as file:
        return [r for r in map(json.loads, file) if r["kind"] == kind]


def summary(out):
    return json.loads((out / "summary.json").read_text())


def left_behind(out):
    """Processes that still run with this run directory on their command line, after a while for the launcher."""
    give_up = time.monotonic() + 20
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found += [path.parent.name] if str(out).encode() in path.read_bytes() else []
            except OSError:
                pass    # it has just ended
        if not found or time.monotonic() > give_up:
            return found
        time.sleep(0.1)


@pytest.mark.parametrize("act", ["stop", "leave"])
def test_a_lost_worker_costs_its_share_only(hpcmlp, flowers, tmp_path, act):
    out = tmp_path / "run"
    done = train(hpcmlp, flowers, out, "--staleness", 2, "--worker-timeout", 1.0, ranks=4, epochs=3,
                 fault=f"rank=3,step=17,act={act}")
    assert done.returncode == 0, done.stderr
    assert not left_behind(out)
    assert "rank 3 " in done.stdout and "is lost" in done.stdout
    told = summary(out)
    assert told["status"] == "finished" and told["steps"] == 3 * STEPS_PER_EPOCH and told["ranks"] == 3
    assert not (out / "lock").exists()
    events = [r for r in records(out, "event") if r["event"] == "lost"]
    assert len(events) == 1 and "2 workers left" in events[0]["reason"]
    # Every task of every epoch counted once: three slices of each global batch, whoever took them.
    assert [sum(r["staleness"].values()) for r in records(out, "server")] == [3 * STEPS_PER_EPOCH] * 3
    last = records(out, "server")[-1]
    assert {w["rank"] for w in last["workers"]} == {1, 2}
    # Out of step nobody can tell waiting from communication.
    assert all(r["comm_s"] is None and len(r["wait_s"]) == len(r["compute_s"]) for r in records(out, "ranks"))


def test_when_all_workers_are_lost_the_run_is_saved_and_resumes(hpcmlp, flowers, tmp_path):
    out = tmp_path / "run"
    done = train(hpcmlp, flowers, out, "--staleness", "async", fault="step=17,act=leave")
    assert done.returncode == 75, done.stderr
    assert "every worker was lost" in done.stderr and "--resume" in done.stderr
    done = train(hpcmlp, flowers, out, "--resume", ranks=3, servers=3)
    assert done.returncode == 0 and summary(out)["steps"] == 2 * STEPS_PER_EPOCH, done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_resumes_on_other_servers_and_by_the_ring(hpcmlp, flowers, tmp_path, mode):
    out = tmp_path / "run"
    done = train(hpcmlp, flowers, out, *mode, fault="rank=2,step=22,act=kill")
    assert done.returncode != 0 and not (out / "summary.json").exists() and not left_behind(out)
    done = train(hpcmlp, flowers, out, *mode, "--resume", ranks=4, servers=2, epochs=2)
    assert done.returncode == 0 and not left_behind(out), done.stderr
    assert re.search(r"resumed at step (15|20) of 30", done.stdout)
    done = hpcmlp("train", "--data", flowers, "--out", out, "--epochs", 3, *TRAIN, "--sync", "ring", "--resume",
                  ranks=2)
    assert done.returncode == 0 and summary(out)["steps"] == 3 * STEPS_PER_EPOCH, done.stderr


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_stop_signal_to_any_rank_saves_and_ends_with_75(hpcmlp, flowers, tmp_path, mode, rank):
    if rank == 0 and mode[1] != 0:
        pytest.skip("a server out of step has no tasks at which a fault could strike")
    out = tmp_path / "run"
    done = train(hpcmlp, flowers, out, *mode, fault=f"rank={rank},step=17,act=signal:SIGUSR1")
    assert done.returncode == 75, done.stderr
    stopped = records(out, "event")[-1]["step"]
    assert 17 < stopped < 30
    done = train(hpcmlp, flowers, out, *mode, "--resume")
    assert done.returncode == 0 and summary(out)["steps"] == 30, done.stderr
    assert f"resumed at step {stopped} of 30" in done.stdout


def test_in_step_a_stop_and_a_resume_leave_no_trace(hpcmlp, flowers, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train(hpcmlp, flowers, straight, epochs=2).returncode == 0
    assert train(hpcmlp, flowers, stopped, epochs=2, fault="rank=1,step=17,act=signal:SIGUSR1").returncode == 75
    assert train(hpcmlp, flowers, stopped, "--resume", epochs=2).returncode == 0
    assert summary(straight)["parameters_sha256"] == summary(stopped)["parameters_sha256"]


def test_inspect_and_report_tell_of_the_servers(hpcmlp, flowers, tmp_path):
    out = tmp_path / "run"
    done = train(hpcmlp, flowers, out, "--staleness", 2, ranks=4, servers=2, epochs=1)
    assert done.returncode == 0 and "servers  staleness 0:" in done.stdout, done.stderr
    shown = hpcmlp("inspect", out)
    assert shown.returncode == 0
    assert re.search(r"rank 0 stores elements 0 to [\d,]+ at version 15: [\d,]+ bytes", shown.stdout)
    assert re.search(r"rank 1 stores elements \d+ to [\d,]+ at version 15", shown.stdout)
    assert "by ranks 2 to 3" in shown.stdout
    told = summary(out)["server"]
    assert sum(told["staleness"].values()) == 30 and sum(w["pushes"] for w in told["workers"]) == 30
    drawn = hpcmlp("report", out)
    if drawn.returncode == 0:       # pictures need an optional package
        assert re.search(r"staleness +pushes", drawn.stdout) and "rank 3" in drawn.stdout


def test_options_that_cannot_take_effect_are_refused(refusals, flowers, tmp_path):
    cases = [(("--sync", "ring", "--servers", 2), "--servers has no effect with --sync ring"),
             (("--staleness", 2), "--staleness has no effect with --sync auto"),
             (("--sync", "server", "--wire", "bf16"), "--wire bf16 has no effect with --sync server"),
             (("--sync", "server", "--staleness", 2), "needs dedicated servers")]
    said = refusals([["train", "--data", flowers, "--out", tmp_path / "run", *options] for options, _ in cases])
    for (_, words), (codes, text) in zip(cases, said, strict=True):
        assert codes == {78} and words in text and text.count("\n") == 1, text
    assert not (tmp_path / "run").exists()
