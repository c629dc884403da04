"""Ranks that die under `--elastic` cost neither a step nor the run; where the MPI cannot do that, it is said."""

import json
import os
import subprocess

import pytest

from tests.conftest import find_mpiexec

OPTIONS = ("--hidden", "16,16", "--global-batch-size", 32, "--steps", 120, "--checkpoint-every", 50, "--log-every", 1,
           "--ema", 0.9, "--clip-norm", 1.0)


def survives():
    """Whether this Python's MPI survives the death of a rank."""
    try:
        return "Open MPI) 5" in subprocess.run([find_mpiexec(), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return False


needs_ulfm = pytest.mark.skipif(not survives(), reason="needs Open MPI 5: make test-openmpi")


def losses(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "step"]


def events(run, name):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if r["kind"] == "event" and r["event"] == name]


@pytest.mark.skipif(survives(), reason="this MPI survives")
def test_it_is_refused_where_the_library_cannot(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--elastic", ranks=2)
    assert done.returncode == 78 and "--with-ft ulfm" in done.stderr and "hpcmlp launch" in done.stderr
    assert not (tmp_path / "run").exists()


def test_options_that_keep_state_on_one_rank_do_not_go_with_it(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--elastic", "--sync", "ring")
    assert done.returncode == 78 and ("--sync ring" in done.stderr or "--with-ft" in done.stderr)


@pytest.fixture(scope="module")
def plain(flowers, hpcmlp, tmp_path_factory):
    """The run that nobody disturbs, and its losses."""
    run = tmp_path_factory.mktemp("plain") / "run"
    done = hpcmlp("launch", "-n", 3, "--", "train", "--elastic", "--data", flowers, "--out", run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return losses(run)


@needs_ulfm
@pytest.mark.parametrize("ranks, fault, left", [
    (3, "rank=1,step=40,act=kill", 2),
    (3, "rank=0,step=46,act=kill", 2),      # the first step of an epoch; who logs and saves is gone
    (4, "rank=0+2,step=40,act=kill", 2),
    (3, "rank=0+1,step=119,act=kill", 1),
    (3, "rank=2,step=40,act=stop", 2),      # removed by the watchdog
])
def test_the_survivors_go_on_with_the_same_batches_and_lose_no_step(flowers, hpcmlp, plain, tmp_path, ranks, fault,
                                                                    left):
    run = tmp_path / "run"
    done = hpcmlp("launch", "-n", ranks, "--max-restarts", 0, "--", "train", "--elastic", "--data", flowers, "--out",
                  run, *OPTIONS, "--watchdog", 1, env={"HPCMLP_FAULT": fault})
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["ranks"]) == ("finished", 120, left)
    assert sum(len(event["lost"]) for event in events(run, "lost")) == ranks - left
    steps, theirs = losses(run), plain
    assert [step for step, _ in steps] == [step for step, _ in theirs]      # each step once
    for (step, loss), (_, expected) in zip(steps, theirs, strict=True):
        assert loss == pytest.approx(expected, rel=1e-3), f"step {step}"
    epochs = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()
              if '"kind": "epoch"' in line]
    assert epochs == [1, 2, 3, 4, 5]
    assert not (run / "lock").exists()
    if "stop" in fault:
        assert "late: rank 2" in done.stderr and "is stopped" in done.stderr and "is killed" in done.stderr


def train_with(fault, hpcmlp, flowers, folder):
    """Let 3 ranks train that run the code `fault` when they start, and return the run directory."""
    (folder / "sitecustomize.py").write_text(fault)
    done = hpcmlp("launch", "-n", 3, "--max-restarts", 0, "--", "train", "--elastic", "--data", flowers, "--out",
                  folder / "run", *OPTIONS, env={"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


DIES_BEFORE_IT_LOGS = """
import os, signal
from hpcmlp.run.directory import RunDirectory
log = RunDirectory.log
def dies(self, record):
    if record["kind"] == "step" and record["step"] == 46 and os.environ["OMPI_COMM_WORLD_RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, record)
RunDirectory.log = dies
"""


@needs_ulfm
def test_what_the_dead_rank_had_yet_to_log_is_in_the_log(flowers, hpcmlp, plain, tmp_path):
    """At the last step of the second epoch, whose end is due after it."""
    run = train_with(DIES_BEFORE_IT_LOGS, hpcmlp, flowers, tmp_path)
    assert len(events(run, "lost")) == 1
    assert [step for step, _ in losses(run)] == [step for step, _ in plain]
    kinds = [record["kind"] for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert kinds.count("epoch") == kinds.count("ranks") == 5


DIE_WHILE_THEY_VALIDATE = """
import os, signal
from hpcmlp.run.judge import Judge
validate, turns = Judge.validate, [0]
def dies(self):
    turns[0] += 1
    if turns[0] == {"1": 2, "2": 3}.get(os.environ["OMPI_COMM_WORLD_RANK"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return validate(self)
Judge.validate = dies
"""


@needs_ulfm
def test_a_death_in_what_is_done_again_after_another_loses_no_step(flowers, hpcmlp, plain, tmp_path):
    """Rank 1 dies in the validation after the second epoch, rank 2 when it is done again."""
    run = train_with(DIE_WHILE_THEY_VALIDATE, hpcmlp, flowers, tmp_path)
    assert [(event["step"], event["lost"]) for event in events(run, "lost")] == [(46, [1]), (46, [1])]
    for (step, loss), (same, expected) in zip(losses(run), plain, strict=True):
        assert step == same and loss == pytest.approx(expected, rel=1e-3), f"step {step}"


@needs_ulfm
def test_a_rank_that_leaves_without_a_word_and_that_mpi_does_not_miss_costs_a_restart(flowers, hpcmlp, tmp_path):
    run = tmp_path / "run"
    done = hpcmlp("launch", "-n", 3, "--max-restarts", 1, "--backoff", 0, "--", "train", "--elastic", "--data",
                  flowers, "--out", run, *OPTIONS, "--watchdog", 1, env={"HPCMLP_FAULT": "rank=2,step=60,act=exit:3"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is gone, in step 60" in done.stderr and "starts again on 2 ranks" in done.stderr
    assert json.loads((run / "summary.json").read_text())["ranks"] == 2


@needs_ulfm
def test_a_sentence_still_ends_the_run_of_survivors(flowers, hpcmlp, tmp_path):
    done = hpcmlp("launch", "-n", 3, "--max-restarts", 0, "--", "train", "--elastic", "--data", flowers, "--out",
                  tmp_path / "run", *OPTIONS, "--lr", 1e30, env={"HPCMLP_FAULT": "rank=0,step=1,act=kill"})
    assert "not finite" in done.stderr and not (tmp_path / "run" / "summary.json").exists()
