"""Stop and resume: the same bits as an undisturbed run, after steps, signals, time limits and kills."""

import json
import signal
import time

import pytest

from hpcmlp.run import checkpoint

OPTIONS = ("--hidden", "16,16", "--global-batch-size", 32, "--lr", 0.01, "--dropout", 0.2, "--ema", 0.95,
           "--log-every", 10, "--replica-check-every", 10)


def parameters(run):
    return {which: checkpoint.load_model(run, which).parameters_sha256 for which in ("best", "last")}


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in lines if r["kind"] == "step"]


@pytest.fixture(scope="module", params=[1, 2, 3])
def whole(request, flowers, hpcmlp, tmp_path_factory):
    """An undisturbed run of 100 steps (an epoch has 23) and its rank count."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, "--steps", 100, ranks=request.param)
    assert done.returncode == 0, done.stderr
    return run, request.param


def test_fifty_and_fifty_steps_are_a_hundred(whole, flowers, hpcmlp, tmp_path):
    run, ranks = whole
    for steps in (50, 100):
        done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--steps", steps, "--resume",
                      ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert parameters(tmp_path / "run") == parameters(run)
    assert losses(tmp_path / "run") == losses(run)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves_and_the_rest_is_the_same(whole, flowers, hpcmlp, start_hpcmlp, tmp_path,
                                                                 number):
    run, ranks = whole
    out = tmp_path / "run"
    arguments = ("train", "--data", flowers, "--out", out, *OPTIONS, "--steps", 100, "--resume")
    slow = {"HPCMLP_FAULT": "act=sleep:0.03"}
    process = start_hpcmlp(*arguments, ranks=ranks, env=slow)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "metrics.jsonl").exists() or not losses(out):
        time.sleep(0.02)
    process.send_signal(number)
    text = process.communicate(timeout=60)
    assert process.returncode == 75, text
    assert "--resume" in text[1] and text[1].count("\n") == 1
    stopped = checkpoint.newest_good(out)[0].meta["step"]
    assert 10 <= stopped < 100
    done = hpcmlp(*arguments, ranks=ranks)
    assert done.returncode == 0 and f"resumed at step {stopped}" in done.stdout
    assert parameters(out) == parameters(run)
    assert losses(out) == losses(run)


def test_a_signal_to_one_rank_in_mid_epoch_stops_all_and_the_rest_is_the_same(whole, flowers, hpcmlp, tmp_path):
    run, ranks = whole
    arguments = ("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--steps", 100, "--resume")
    done = hpcmlp(*arguments, ranks=ranks, env={"HPCMLP_FAULT": f"rank={ranks - 1},step=31,act=signal:SIGUSR1"})
    assert done.returncode == 75 and done.stderr.count("\n") == 1, done.stderr
    assert checkpoint.newest_good(tmp_path / "run")[0].meta["step"] == 32  # the step in hand is finished
    done = hpcmlp(*arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert parameters(tmp_path / "run") == parameters(run)
    assert losses(tmp_path / "run") == losses(run)


def test_killed_at_any_moment_it_goes_on_from_the_last_checkpoint(whole, flowers, hpcmlp, start_hpcmlp, tmp_path):
    run, ranks = whole
    arguments = ("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--steps", 100, "--resume",
                 "--checkpoint-every", 7)
    process = start_hpcmlp(*arguments, ranks=ranks, env={"HPCMLP_FAULT": "rank=0,step=40,act=kill"})
    process.communicate(timeout=60)
    assert process.returncode != 0
    done = hpcmlp(*arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert parameters(tmp_path / "run")["last"] == parameters(run)["last"]


def test_a_checkpoint_opens_on_any_number_of_ranks(flowers, hpcmlp, tmp_path):
    for steps, ranks in ((30, 4), (60, 1), (100, 3)):
        done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--steps", steps, "--resume",
                      ranks=ranks)
        assert done.returncode == 0, done.stderr
    other = hpcmlp("train", "--data", flowers, "--out", tmp_path / "one", *OPTIONS, "--steps", 100)
    assert other.returncode == 0
    for (step, a), (same, b) in zip(losses(tmp_path / "run"), losses(tmp_path / "one"), strict=True):
        assert step == same and a == pytest.approx(b, rel=1e-4)


def train_narrow(hpcmlp, flowers, run, wire, steps, ranks, **env):
    return hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, "--checkpoint-every", 10, "--steps", steps,
                  "--sync", "ring", "--wire", wire, "--resume", ranks=ranks, env=env)


@pytest.mark.parametrize("wire", ["bf16", "float16", "int8"])
def test_over_a_narrow_wire_a_killed_run_goes_on_with_the_same_bits(flowers, hpcmlp, tmp_path, wire):
    """100 steps are 50, a kill and 50 more, with what the ranks had rounded away."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_narrow(hpcmlp, flowers, whole, wire, 100, 3).returncode == 0
    assert train_narrow(hpcmlp, flowers, run, wire, 100, 3, HPCMLP_FAULT="rank=0,step=57,act=kill").returncode != 0
    state = checkpoint.newest_good(run)[0]
    assert state.meta["step"] in (40, 50) and set(state.meta["carried"]) == {"master", "residual"}
    assert any(array.any() for array in state.group("sync/residual").values())
    done = train_narrow(hpcmlp, flowers, run, wire, 100, 3)
    assert done.returncode == 0, done.stderr
    assert parameters(run) == parameters(whole) and losses(run) == losses(whole)


def test_over_a_narrow_wire_a_run_goes_on_at_any_rank_count_and_with_any_wire(flowers, hpcmlp, tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    for steps, ranks, wire in ((30, 3, "int8"), (60, 2, "int8"), (80, 4, "bf16"), (100, 2, "float32")):
        done = train_narrow(hpcmlp, flowers, run, wire, steps, ranks)
        assert done.returncode == 0, done.stderr
    assert train_narrow(hpcmlp, flowers, plain, "float32", 100, 1).returncode == 0
    for (step, a), (same, b) in zip(losses(run), losses(plain), strict=True):
        assert step == same and a == pytest.approx(b, rel=0.05, abs=0.01)


def test_a_time_limit_stops_saves_and_says_75(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--epochs", 10000, "--time-limit",
                  0.05, ranks=2)
    assert done.returncode == 75 and "time limit" in done.stderr
    assert checkpoint.newest_good(tmp_path / "run")[0].meta["step"] > 0


def test_resume_with_other_options_or_data_is_refused(flowers, hpcmlp, tmp_path):
    out = tmp_path / "run"
    assert hpcmlp("train", "--data", flowers, "--out", out, "--steps", 5).returncode == 0
    done = hpcmlp("train", "--data", flowers, "--out", out, "--steps", 9, "--resume", "--hidden", "9", ranks=2)
    assert done.returncode == 78 and "hidden was [256, 128] and is [9]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_taken(flowers, hpcmlp, tmp_path):
    out = tmp_path / "run"
    arguments = ("train", "--data", flowers, "--out", out, "--checkpoint-every", 5, "--resume")
    assert hpcmlp(*arguments, "--steps", 10).returncode == 0
    newest = checkpoint.list_checkpoints(out)[0] / "state.h5"
    image = bytearray(newest.read_bytes())
    image[len(image) // 2] ^= 1
    newest.write_bytes(image)
    done = hpcmlp(*arguments, "--steps", 15, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stdout and "resumed at step 5" in done.stdout
    for path in checkpoint.list_checkpoints(out):
        (path / "state.h5").write_bytes(b"no")
    done = hpcmlp(*arguments, "--steps", 20, ranks=2)
    assert done.returncode == 65 and "no checkpoint is whole" in done.stderr and done.stderr.count("\n") == 1
