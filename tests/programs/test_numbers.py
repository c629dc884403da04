"""Guards of numbers, each with its fault, and what the same fault does without the guard."""

import json

import pytest

from hpcmlp.run import checkpoint

OPTIONS = ("--hidden", "16", "--global-batch-size", 32, "--lr", 0.02, "--steps", 60, "--checkpoint-every", 10,
           "--log-every", 10)


def train(hpcmlp, data, out, *more, ranks=2, fault=None, **how):
    return hpcmlp("train", "--data", data, "--out", out, *OPTIONS, *more, ranks=ranks,
                  env={"HPCMLP_FAULT": fault} if fault else {}, **how)


def events(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [r for r in lines if r["kind"] == "event" and r["event"] != "saved"]


def summary(run):
    return json.loads((run / "summary.json").read_text())


NAN = "rank=1,step=25,act=nan"


def test_a_parameter_that_is_no_number_costs_a_rollback(flowers, hpcmlp, tmp_path):
    run = tmp_path / "run"
    done = train(hpcmlp, flowers, run, "--on-nonfinite", "rollback", fault=NAN)
    assert done.returncode == 0, done.stderr
    assert "step 26 is not finite; back to step 20 with 0.5 of the learning rate" in done.stdout
    assert [(e["event"], e["step"], e["from_step"]) for e in events(run)] == [("rollback", 20, 26)]
    told = summary(run)
    assert told["rollbacks"] == 1 and told["lr_factor"] == 0.5 and told["steps"] == 60
    assert told["test"]["accuracy"] > 0.5
    # A run that goes on keeps the rate, and its bits are those of the run that was never killed.
    again = tmp_path / "again"
    done = train(hpcmlp, flowers, again, "--on-nonfinite", "rollback", "--steps", 40, fault=NAN)
    assert done.returncode == 0, done.stderr
    done = train(hpcmlp, flowers, again, "--on-nonfinite", "rollback", "--resume")
    assert done.returncode == 0, done.stderr
    assert summary(again)["rollbacks"] == 1
    hashes = {checkpoint.load_model(path, "last").parameters_sha256 for path in (run, again)}
    assert len(hashes) == 1


def test_without_going_back_the_same_fault_ends_the_run(flowers, hpcmlp, tmp_path):
    done = train(hpcmlp, flowers, tmp_path / "skip", fault=NAN)
    assert done.returncode == 70 and "10 steps in a row" in done.stderr and done.stderr.count("\n") == 1
    assert sum(e["event"] == "skipped update" for e in events(tmp_path / "skip")) == 10
    done = train(hpcmlp, flowers, tmp_path / "stop", "--on-nonfinite", "stop", fault=NAN)
    assert done.returncode == 70 and "at step 26" in done.stderr and done.stderr.count("\n") == 1
    assert checkpoint.newest_good(tmp_path / "stop")[0].meta["step"] == 20


def test_at_the_first_step_there_is_something_to_go_back_to(flowers, hpcmlp, tmp_path):
    done = train(hpcmlp, flowers, tmp_path / "run", "--on-nonfinite", "rollback", ranks=None, fault="step=0,act=nan")
    assert done.returncode == 0 and "back to step 0" in done.stdout, done.stderr


def test_a_loss_that_jumps_is_counted_and_its_batch_named(flowers, hpcmlp, tmp_path):
    assert train(hpcmlp, flowers, tmp_path / "run", ranks=None, fault="step=40,act=scale:1000").returncode == 0
    found = [e for e in events(tmp_path / "run") if e["event"] == "loss spike"]
    assert found and found[0]["step"] == 41 and (found[0]["epoch"], found[0]["batch"]) == divmod(40, 23)
    assert all(e["deviants"] == [] for e in found)      # the same bits again: it is no hardware of a rank
    assert summary(tmp_path / "run")["loss_spikes"] == len(found)
    assert train(hpcmlp, flowers, tmp_path / "calm").returncode == 0
    assert summary(tmp_path / "calm")["loss_spikes"] == 0 and not events(tmp_path / "calm")


@pytest.mark.parametrize(("ranks", "told"), [(3, "the parameters of rank 1 differ from the others'"),
                                             (2, "ranks 0 and 1 hold different parameters")])
def test_drifted_replicas_are_named_and_nothing_of_them_is_saved(flowers, hpcmlp, tmp_path, ranks, told):
    """Where every rank updates everything a flipped bit stays: no majority of two says who is right."""
    options = ("--full-update", "--sync", "ring")
    fault = "rank=1,step=23,act=flip"
    done = train(hpcmlp, flowers, tmp_path / "run", *options, ranks=ranks, fault=fault)
    assert done.returncode == 70 and told in done.stderr and done.stderr.count("\n") == 1
    assert "at step 29" in done.stderr  # the checks come every 100 steps, and before every save
    assert checkpoint.newest_good(tmp_path / "run")[0].meta["step"] == 20
    # Without the check nobody notices.
    done = train(hpcmlp, flowers, tmp_path / "blind", *options, "--replica-check-every", 0, ranks=ranks, fault=fault)
    assert done.returncode == 0, done.stderr
