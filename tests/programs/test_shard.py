"""Runs with --shard params as a user starts them: the losses of unsharded ones, checkpoints that open either way."""

import json
from dataclasses import replace

import pytest

from hpcmlp.config import TrainConfig
from hpcmlp.data.manifest import read_manifest
from hpcmlp.errors import ConfigError, flag
from hpcmlp.run import checkpoint
from hpcmlp.run.options import check_fits

OPTIONS = ("--hidden", "24,40,24", "--global-batch-size", 50, "--lr", 0.01, "--log-every", 3, "--ema", 0.9,
           "--clip-norm", 1.0, "--dropout", 0.1)


def train(hpcmlp, data, out, *options, ranks=3, fault=None):
    env = {"HPCMLP_FAULT": fault} if fault else None
    return hpcmlp("train", "--data", data, "--out", out, *OPTIONS, *options, ranks=ranks, env=env)


def losses(out):
    with open(out / "metrics.jsonl") as file:
        return [r["loss"] for r in map(json.loads, file) if r["kind"] == "step"]


def summary(out):
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(hpcmlp, flowers, tmp_path_factory):
    """An unsharded run of 30 steps whose buckets are its layers, so that its sums have the same order."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = train(hpcmlp, flowers, out, "--steps", 30, "--bucket-mb", 1e-6, "--sync", "ring")
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_in_slices_has_the_numbers_of_one_without(whole, hpcmlp, flowers, tmp_path):
    out = tmp_path / "run"
    done = train(hpcmlp, flowers, out, "--steps", 30, "--shard", "params", "--recompute", "--sync", "ring")
    assert done.returncode == 0 and "parameters in slices" in done.stdout, done.stderr
    assert losses(out) == losses(whole)
    told, wanted = summary(out), summary(whole)
    for key in ("parameters_sha256", "val", "test", "best_step"):
        assert told[key] == wanted[key]
    assert (told["shard"], wanted["shard"]) == ("params", "none")
    sent = told["plan"]["sent_bytes_per_rank_and_step"]     # foretold with the layers that recomputation gathers again
    assert sent["foretold"] == sent["measured"] > 0
    ours, theirs = (checkpoint.newest_good(run)[0].arrays for run in (out, whole))
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name
    shown = [json.loads(hpcmlp("evaluate", run, "--json").stdout) for run in (out, whole)]
    assert {**shown[0], "run": ""} == {**shown[1], "run": ""}
    assert hpcmlp("inspect", out).returncode == 0


@pytest.mark.parametrize("sync, there, back", [("auto", 4, 2), ("native", 3, 1)])
def test_checkpoints_open_sharded_and_not_at_any_rank_count(whole, hpcmlp, flowers, tmp_path, sync, there, back):
    out = tmp_path / "run"
    for number, (steps, shard, ranks) in enumerate(((10, "params", there), (20, "none", back), (30, "params", 2))):
        done = train(hpcmlp, flowers, out, "--steps", steps, "--shard", shard, "--sync", sync, "--resume", ranks=ranks)
        assert done.returncode == 0 and ("resumed" in done.stdout) == (number > 0), done.stderr
    assert losses(out) == pytest.approx(losses(whole), rel=1e-3)
    assert summary(out)["test"]["accuracy"] == pytest.approx(summary(whole)["test"]["accuracy"], abs=0.02)


def test_a_killed_run_resumes_with_the_same_bits(whole, hpcmlp, flowers, tmp_path):
    out = tmp_path / "run"
    options = ("--steps", 30, "--shard", "params", "--sync", "ring", "--checkpoint-every", 8)
    done = train(hpcmlp, flowers, out, *options, fault="rank=1,step=20,act=kill")
    assert done.returncode != 0 and not (out / "summary.json").exists()
    newest = checkpoint.list_checkpoints(out)[0]
    with open(newest / "state.h5", "r+b") as file:      # and the newest checkpoint is damaged
        file.seek(-40, 2)
        file.write(b"damaged")
    done = train(hpcmlp, flowers, out, *options, "--resume")
    assert done.returncode == 0 and "is damaged" in done.stdout and "resumed at step" in done.stdout, done.stderr
    assert summary(out)["parameters_sha256"] == summary(whole)["parameters_sha256"]


def test_one_rank_has_nothing_to_share_out(hpcmlp, flowers, tmp_path):
    done = train(hpcmlp, flowers, tmp_path / "run", "--steps", 2, "--shard", "params", ranks=1)
    assert done.returncode == 0 and "shard params has nothing to act on: there is one rank" in done.stdout


def test_what_does_not_go_with_slices_is_one_sentence(hpcmlp, flowers, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--shard", "params", "--full-update")
    assert done.returncode == 78 and "--full-update does not go" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, value", [
    ("full_update", True), ("local_steps", 4), ("outer_optimizer", "nesterov"), ("wire", "bf16"), ("sync", "server"),
    ("overlap", True), ("overlap", False), ("bucket_mb", 1.0), ("trace", True), ("device", "gpu"), ("elastic", True)])
def test_every_option_that_would_need_whole_vectors_is_refused(flowers, name, value):
    given = TrainConfig(data=str(flowers), out="run", shard="params")
    check_fits(given, read_manifest(flowers), 2)
    with pytest.raises(ConfigError, match=f"{flag(name)}.* does not go with --shard params"):
        check_fits(replace(given, **{name: value}), read_manifest(flowers), 2)
