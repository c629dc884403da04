"""`train --local-steps` through the command line: rounds, statistics, stop and resume, wrong usage."""

import json

import pytest

from hpcmlp.run import checkpoint

# An epoch has 23 steps: rounds end after steps 4, 8, 12, 16, 20, 23 of each.
OPTIONS = ("--hidden", "16,16", "--global-batch-size", 32, "--lr", 0.01, "--dropout", 0.2, "--log-every", 10,
           "--replica-check-every", 10, "--local-steps", 4)
DILOCO = ("--outer-optimizer", "nesterov")


def records(run, kind):
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def summary(run):
    return json.loads((run / "summary.json").read_text())


def parameters(run):
    return {which: checkpoint.load_model(run, which).parameters_sha256 for which in ("best", "last")}


@pytest.fixture(scope="module")
def whole(flowers, hpcmlp, tmp_path_factory):
    """An undisturbed DiLoCo run of 100 steps on 3 ranks that saves every 7 steps."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, *DILOCO, "--ema", 0.9, "--steps", 100,
                  "--checkpoint-every", 7, ranks=3)
    assert done.returncode == 0, done.stderr
    return run


# The outer optimizer lengthens every way by 0.7 / (1 - 0.9): the steps within must be shorter.
@pytest.mark.parametrize("outer", [(), (*DILOCO, "--lr", 0.003)], ids=["average", "diloco"])
def test_it_learns_and_tells_rounds_bytes_and_drift(flowers, hpcmlp, tmp_path, outer):
    run = tmp_path / "run"
    done = hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, *outer, "--epochs", 6, ranks=3)
    assert done.returncode == 0, done.stderr
    assert "rounds    of up to 4 local steps, then " + ("outer nesterov lr 0.7 momentum 0.9" if outer else
                                                         "parameters averaged") in done.stdout
    assert "36 rounds for 138 steps" in done.stdout and "26 % of synchronous steps" in done.stdout
    result = summary(run)
    local = result["local"]
    assert result["steps"] == 138 and result["test"]["accuracy"] > 0.8
    assert local["rounds"] == 36 and local["steps"] == 138 and local["lost_steps"] == local["left_out"] == 0
    assert local["bytes_per_step"] == pytest.approx(local["bytes_per_step_synchronous"] * 36 / 138)
    assert 0 < local["drift"] < 1 and 1 / 3 - 1e-6 < local["align"] <= 1
    steps = records(run, "step")
    # Due at 10, 20, ...: written where the ranks meet next.
    assert [r["step"] for r in steps][:5] == [12, 20, 31, 43, 50] and all(r["round"]["outer_norm"] > 0 for r in steps)
    assert all(r["round"]["steps"] in (3, 4) and r["loss"] > 0 for r in steps)
    epochs = records(run, "epoch")
    assert [e["step"] for e in epochs] == [23, 46, 69, 92, 115, 138]
    assert epochs[-1]["train_loss"] < 0.6 * epochs[0]["train_loss"]


def test_one_rank_has_the_bits_of_plain_training(flowers, hpcmlp, tmp_path):
    for name, options in (("plain", ("--local-steps", 1)), ("local", ("--local-steps", 6))):
        done = hpcmlp("train", "--data", flowers, "--out", tmp_path / name, *OPTIONS, "--ema", 0.9, "--epochs", 2,
                      *options)
        assert done.returncode == 0, done.stderr
    assert parameters(tmp_path / "plain") == parameters(tmp_path / "local")
    losses = [[r["train_loss"] for r in records(tmp_path / name, "epoch")] for name in ("plain", "local")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert "local" not in summary(tmp_path / "plain")


def test_killed_it_goes_on_with_the_bits_of_the_run_that_saved(whole, flowers, hpcmlp, tmp_path):
    arguments = ("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, *DILOCO, "--ema", 0.9, "--steps", 100,
                 "--checkpoint-every", 7, "--resume")
    done = hpcmlp(*arguments, ranks=3, env={"HPCMLP_FAULT": "rank=0,step=40,act=kill"})
    assert done.returncode != 0
    stopped = checkpoint.newest_good(tmp_path / "run")[0]
    step = stopped.meta["step"]  # the last save may still have been on its way to the disk
    assert step in (28, 35) and stopped.group("outer/momentum")
    done = hpcmlp(*arguments, ranks=3)
    assert done.returncode == 0 and f"resumed at step {step}" in done.stdout, done.stderr
    assert parameters(tmp_path / "run")["last"] == parameters(whole)["last"]


def test_a_signal_to_one_rank_within_a_round_stops_all_where_they_meet(flowers, hpcmlp, tmp_path):
    arguments = ("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--steps", 60, "--resume")
    done = hpcmlp(*arguments, ranks=3, env={"HPCMLP_FAULT": "rank=2,step=28,act=signal:SIGUSR1"})
    assert done.returncode == 75 and done.stderr.count("\n") == 1, done.stderr
    assert checkpoint.newest_good(tmp_path / "run")[0].meta["step"] == 31     # step 8 of epoch 2
    done = hpcmlp(*arguments, ranks=3)
    assert done.returncode == 0 and "resumed at step 31" in done.stdout, done.stderr
    assert summary(tmp_path / "run")["steps"] == 60


def test_a_checkpoint_opens_on_any_number_of_ranks(flowers, hpcmlp, tmp_path):
    for steps, ranks in ((46, 3), (92, 1), (138, 2)):
        done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, *DILOCO, "--steps", steps,
                      "--resume", ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run")["steps"] == 138 and summary(tmp_path / "run")["test"]["accuracy"] > 0.8


@pytest.mark.parametrize("extra", [("--full-update",), ("--sync", "native"), ("--wire", "int8", "--sync", "ring"),
                                   ("--clip-norm", 0.5, "--accumulate", 3, "--optimizer", "lamb"),
                                   ("--outer-optimizer", "nesterov", "--outer-momentum", 0, "--outer-lr", 1),
                                   ("--local-steps", 1, "--outer-optimizer", "nesterov")])
def test_it_goes_with_other_options(flowers, hpcmlp, tmp_path, extra):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--epochs", 2, *extra, ranks=2)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run")["local"]["rounds"] == (46 if extra[0] == "--local-steps" else 12)


def test_a_timeline_shows_where_the_ranks_meet(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--epochs", 2, "--trace", ranks=2)
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert {"forward layer 0", "update", "meet", "outer reduce", "reduce bucket 0", "outer share"} <= set(names)
    assert names.count("step") == 41 and names.count("meet") == 11


def test_numbers_that_are_not_finite_end_the_run_with_70(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--optimizer", "sgd", "--lr", 1e30,
                  "--epochs", 3, ranks=2)
    assert done.returncode == 70 and "rounds in a row" in done.stderr and done.stderr.count("\n") == 1
    events = [r["event"] for r in records(tmp_path / "run", "event")]
    assert "left out" in events and "skipped update" in events


def test_options_that_cannot_act_are_refused(flowers, refusals, tmp_path):
    cases = [(("--outer-lr", 0.5), "--outer-lr has no effect with --outer-optimizer none"),
             (("--outer-momentum", 0.5), "--outer-momentum has no effect with --outer-optimizer none"),
             (("--local-steps", 0), "at least 1"),
             (("--outer-optimizer", "adam"), "legal: none, nesterov")]
    said = refusals([["train", "--data", flowers, "--out", tmp_path / "run", "--local-steps", 4, *options]
                     for options, _ in cases], ranks=2)
    for (_, words), (codes, text) in zip(cases, said, strict=True):
        assert codes == {78} and words in text and text.count("\n") == 1, text
    assert not (tmp_path / "run").exists()


def test_a_time_limit_stops_where_the_ranks_meet(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, "--epochs", 10000, "--time-limit",
                  0.05, ranks=2)
    assert done.returncode == 75 and "time limit" in done.stderr
    step = checkpoint.newest_good(tmp_path / "run")[0].meta["step"]
    assert step % 23 in (0, 4, 8, 12, 16, 20)
