"""`train --overlap` through the command line: the bits of --no-overlap, through stops, resumptions and validations."""

import json

import numpy as np
import pytest

from hpcmlp.comm import agreement
from hpcmlp.comm.ring import Ring
from hpcmlp.config import TrainConfig, build
from hpcmlp.data.manifest import Manifest, write_manifest
from hpcmlp.data.shards import shard_name, write_shard
from hpcmlp.programs import train
from hpcmlp.run import account, checkpoint
from hpcmlp.sync.overlap import Overlapped

OPTIONS = ("--hidden", "16,16", "--global-batch-size", 32, "--lr", 0.01, "--dropout", 0.2, "--ema", 0.95,
           "--log-every", 10, "--replica-check-every", 10, "--accumulate", 2, "--clip-norm", 1.0, "--bucket-mb", 0.0002,
           "--sync", "ring")


def parameters(run):
    return {which: checkpoint.load_model(run, which).parameters_sha256 for which in ("best", "last")}


def records(run, kind):
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


@pytest.mark.parametrize("wire", ["float32", "bf16"])
def test_overlapped_runs_have_the_bits_of_the_others_also_when_stopped_and_resumed(flowers, hpcmlp, tmp_path, wire):
    def train(name, *more, **env):
        return hpcmlp("train", "--data", flowers, "--out", tmp_path / name, *OPTIONS, "--wire", wire, "--steps", 60,
                      "--checkpoint-every", 31, *more, ranks=3, env=env)

    plain, whole = train("plain", "--no-overlap"), train("whole", "--overlap")
    assert plain.returncode == 0 and whole.returncode == 0, plain.stderr + whole.stderr
    assert "overlapped in 3 buckets of 0.0002 MiB" in whole.stdout and "of communication hidden" in whole.stdout
    assert "overlapped in" not in plain.stdout and "hidden)" not in plain.stdout
    stopped = train("cut", "--overlap", HPCMLP_FAULT="rank=2,step=30,act=signal:SIGUSR1")
    assert stopped.returncode == 75, stopped.stderr
    resumed = train("cut", "--overlap", "--resume")
    assert resumed.returncode == 0 and "resumed at step 31" in resumed.stdout, resumed.stderr
    expected = parameters(tmp_path / "plain")
    assert parameters(tmp_path / "whole") == expected and parameters(tmp_path / "cut") == expected
    losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in records(tmp_path / name, "step")]
              for name in ("plain", "whole", "cut")]
    assert losses[0] == losses[1] == losses[2]
    for name, overlaps in (("plain", False), ("whole", True)):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["overlap"] is overlaps and summary["buckets"] == 3 and summary["bucket_mb"] == 0.0002
        logged = [r["hidden"] for kind in ("step", "epoch") for r in records(tmp_path / name, kind)]
        hidden = [summary["hidden"], *logged]
        assert all(0.0 <= share <= 1.0 for share in hidden) and (overlaps or not any(hidden))


def test_overlap_that_cannot_take_effect_is_an_error(flowers, refusals, tmp_path):
    cases = [("--sync", "native"), ("--full-update",), ("--local-steps", 4)]
    said = refusals([["train", "--data", flowers, "--out", tmp_path / "run", "--overlap", *extra] for extra in cases])
    for extra, (codes, text) in zip(cases, said, strict=True):
        sentence = f"--overlap has no effect with {' '.join(map(str, extra)).removesuffix(' 4')}"
        assert codes == {78} and sentence in text and text.count("\n") == 1, text


def test_one_rank_says_that_it_has_nothing_to_overlap(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--overlap", "--steps", 3, "--no-test")
    assert done.returncode == 0 and "overlap has nothing to act on" in done.stdout


def test_bench_step_tells_what_was_hidden(hpcmlp):
    for extra, overlaps in (("--overlap", True), ("--no-overlap", False)):
        done = hpcmlp("bench", "step", "--sizes", "20,30,30,3", "--steps", 10, "--sync", "ring", "--bucket-mb", 0.0002,
                      "--json", extra, ranks=2)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["overlap"] is overlaps and result["buckets"] == 3 and 0.0 <= result["hidden"] <= 1.0
        assert set(result["parts"]) == {"compute", "comm", "flight"} and result["step_ms"] > 0
    done = hpcmlp("bench", "comm", "--overlap")
    assert done.returncode == 78 and "it belongs to bench step" in done.stderr


@pytest.mark.mpi(min_size=2)
def test_nobody_calls_mpi_while_a_thread_drives_parameters(comm, mpi_tmp_path, monkeypatch):
    """Epochs end and checkpoints are saved with nothing under way, also where nothing is validated, which would wait.

    Two threads in an MPI library that grants one at a time end in its own faults, once in some hundred saves.
    """
    if comm.rank == 0:
        random = np.random.default_rng(0)
        entries = tuple(write_shard(mpi_tmp_path / shard_name("train", k, 2),
                                    random.integers(0, 255, (24, 7), np.uint8),
                                    random.integers(0, 3, 24).astype(np.int32), None, {"split": "train"})
                        for k in range(2))
        write_manifest(mpi_tmp_path, Manifest("flowers", "classification", 7, "uint8", [f"f{i}" for i in range(7)],
                                              {"train": entries}, ["red", "green", "blue"]))
    comm.Barrier()
    strategies, calls = [], []
    share = Overlapped.share

    def sharing(strategy):
        if isinstance(strategy.collective, Ring):   # and not what `plan` records steps with
            strategies[:] = [strategy]
        share(strategy)

    def watched(function):
        def call(*args):
            calls.append(any(strategy._gathers for strategy in strategies))
            return function(*args)
        return call

    monkeypatch.setattr(Overlapped, "share", sharing)
    monkeypatch.setattr(agreement, "agree", watched(agreement.agree))
    monkeypatch.setattr(account, "all_gather_bytes", watched(account.all_gather_bytes))
    config = build(TrainConfig, {"data": str(mpi_tmp_path), "out": str(mpi_tmp_path / "run"), "hidden": (16, 16),
                                 "global_batch_size": 12, "steps": 12, "sync": "ring", "overlap": True,
                                 "checkpoint_every": 3, "progress": False})
    assert train.main(config, comm) == 0
    assert strategies and len(calls) > 4 and not any(calls)
    strategies[0].collective.free()     # a program ends with its process
