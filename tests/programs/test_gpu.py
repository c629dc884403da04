"""`train --device gpu` through the command line on the emulated GPU: the numbers of the CPU, restarts, errors."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmlp.errors import Unavailable
from hpcmlp.ops.emulated import compile_kernels
from hpcmlp.run import checkpoint

OPTIONS = ("--hidden", "24,16", "--global-batch-size", 48, "--lr", 0.005, "--schedule", "cosine", "--dropout", 0.2,
           "--ema", 0.95, "--clip-norm", 1.0, "--log-every", 7, "--steps", 40, "--checkpoint-every", 16)
EMULATED = {"HPCMLP_GPU": "emulated"}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def needs_compiler():
    try:
        compile_kernels()
    except Unavailable as reason:
        pytest.skip(str(reason))


def train(hpcmlp, data, out, *more, ranks=None, **env):
    return hpcmlp("train", "--data", data, "--out", out, *OPTIONS, *more, ranks=ranks, env=EMULATED | env)


def parameters(run):
    model = checkpoint.load_model(run, "last")
    return np.concatenate([np.ravel(a) for a in model.params.values()]), model.parameters_sha256


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in lines if r["kind"] == "step"]


@pytest.fixture(scope="module")
def on_cpu(flowers, hpcmlp, tmp_path_factory):
    run = tmp_path_factory.mktemp("cpu") / "run"
    done = train(hpcmlp, flowers, run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("ranks", (None, 2, 3))
def test_float32_on_the_device_gives_the_numbers_of_the_cpu(flowers, hpcmlp, tmp_path, on_cpu, ranks):
    done = train(hpcmlp, flowers, tmp_path / "run", "--device", "gpu", ranks=ranks)
    assert done.returncode == 0, done.stderr
    how = "whole steps on the device" if ranks is None else "gradients through host memory"
    assert f"emulated: planned steps in float32, samples on the device, {how}" in done.stdout
    wanted, got = parameters(on_cpu)[0], parameters(tmp_path / "run")[0]
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-5
    assert np.allclose(losses(tmp_path / "run"), losses(on_cpu), rtol=1e-4)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (on_cpu, tmp_path / "run")]
    assert summaries[0]["num_params"] == summaries[1]["num_params"]
    assert abs(summaries[0]["test"]["accuracy"] - summaries[1]["test"]["accuracy"]) < 0.01


@pytest.mark.parametrize("ranks", (2, 3))
def test_whole_steps_of_several_devices_give_the_numbers_of_the_cpu(flowers, hpcmlp, tmp_path, on_cpu, ranks):
    done = train(hpcmlp, flowers, tmp_path / "run", "--device", "gpu", "--sync", "nccl", "--replica-check-every", 5,
                 ranks=ranks)
    assert done.returncode == 0 and "whole steps on the devices, by NCCL" in done.stdout, done.stderr
    wanted, got = parameters(on_cpu)[0], parameters(tmp_path / "run")[0]
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-5
    assert np.allclose(losses(tmp_path / "run"), losses(on_cpu), rtol=1e-4)


LIMIT = "--memory-limit", 0.012     # MiB: less than the samples


@pytest.fixture(scope="module", params=(None, 2))
def streamed_on_cpu(request, flowers, hpcmlp, tmp_path_factory):
    """A run on the CPU whose samples are streamed, and its ranks."""
    run = tmp_path_factory.mktemp("streamed") / "run"
    done = train(hpcmlp, flowers, run, *LIMIT, "--device", "cpu", ranks=request.param)
    assert done.returncode == 0, done.stderr
    return run, request.param


@pytest.mark.parametrize("sync", ("auto", "nccl"))
def test_batches_that_are_sent_give_the_numbers_of_the_cpu(flowers, hpcmlp, tmp_path, streamed_on_cpu, sync):
    on_cpu, ranks = streamed_on_cpu
    if sync == "nccl" and ranks is None:
        pytest.skip("one rank has nobody to send to")
    done = train(hpcmlp, flowers, tmp_path / "gpu", *LIMIT, "--device", "gpu", "--sync", sync, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "streamed" in done.stdout and "samples sent batch by batch" in done.stdout
    wanted, got = parameters(on_cpu)[0], parameters(tmp_path / "gpu")[0]
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-5
    assert np.allclose(losses(tmp_path / "gpu"), losses(on_cpu), rtol=1e-4)


@pytest.mark.parametrize("precision, bound", (("tf32", 1e-2), ("bf16", 5e-2)))
def test_lower_precisions_stay_near(flowers, hpcmlp, tmp_path, on_cpu, precision, bound):
    done = train(hpcmlp, flowers, tmp_path / "run", "--device", "gpu", "--precision", precision)
    assert done.returncode == 0 and f"planned steps in {precision}" in done.stdout, done.stderr
    wanted, got = parameters(on_cpu)[0], parameters(tmp_path / "run")[0]
    assert 1e-6 < np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < bound


@pytest.mark.parametrize("ranks, sync", ((None, "auto"), (2, "auto"), (2, "nccl")))
def test_a_run_on_the_device_stops_and_goes_on_with_the_same_bits(flowers, hpcmlp, tmp_path, ranks, sync):
    more = "--device", "gpu", "--precision", "bf16", "--sync", sync
    whole = train(hpcmlp, flowers, tmp_path / "whole", *more, ranks=ranks)
    stopped = train(hpcmlp, flowers, tmp_path / "cut", *more, ranks=ranks,
                    HPCMLP_FAULT="rank=0,step=22,act=signal:SIGUSR1")
    assert whole.returncode == 0 and stopped.returncode == 75, whole.stderr + stopped.stderr
    resumed = train(hpcmlp, flowers, tmp_path / "cut", *more, "--resume", ranks=ranks)
    # Where the devices go on by themselves a signal is seen when a line of the log is due.
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed at step {28 if sync == 'nccl' else 23}" in resumed.stdout
    assert parameters(tmp_path / "cut")[1] == parameters(tmp_path / "whole")[1]
    assert checkpoint.newest_good(tmp_path / "cut")[0].meta["algorithms"]


def test_what_was_trained_on_the_device_goes_on_and_is_used_on_the_cpu(flowers, hpcmlp, tmp_path, on_cpu):
    first = train(hpcmlp, flowers, tmp_path / "run", "--device", "gpu",
                  HPCMLP_FAULT="rank=0,step=20,act=signal:SIGUSR1")
    assert first.returncode == 75, first.stderr
    second = train(hpcmlp, flowers, tmp_path / "run", "--resume", "--device", "cpu")
    assert second.returncode == 0, second.stderr
    wanted, got = parameters(on_cpu)[0], parameters(tmp_path / "run")[0]
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-5
    judged = [hpcmlp("evaluate", tmp_path / "run", "--json", "--device", device, env=EMULATED)
              for device in ("cpu", "gpu")]
    on_host, on_device = (json.loads(done.stdout) for done in judged)
    assert on_host["accuracy"] == on_device["accuracy"] and np.isclose(on_host["loss"], on_device["loss"], rtol=1e-5)
    for device in ("cpu", "gpu"):
        done = hpcmlp("predict", tmp_path / "run", flowers, "--split", "test", "--out", tmp_path / f"{device}.h5",
                      "--device", device, ranks=2 if device == "gpu" else None, env=EMULATED)
        assert done.returncode == 0, done.stderr
    with h5py.File(tmp_path / "cpu.h5") as host, h5py.File(tmp_path / "gpu.h5") as there:
        assert np.allclose(host["probability"][:], there["probability"][:], atol=1e-5)
        assert np.array_equal(host["label"][:], there["label"][:])


def test_options_outside_the_plan_take_plain_operations_and_say_so(flowers, hpcmlp, tmp_path):
    done = train(hpcmlp, flowers, tmp_path / "run", "--device", "gpu", "--layer-norm")
    assert done.returncode == 0 and "plain operations of CuPy (--layer-norm)" in done.stdout, done.stderr
    judged = hpcmlp("evaluate", tmp_path / "run", "--json", "--device", "gpu", env=EMULATED)
    assert judged.returncode == 0 and json.loads(judged.stdout)["accuracy"] > 0.5, judged.stderr


def test_precision_that_cannot_take_effect_is_an_error(flowers, refusals, tmp_path):
    cases = [(("--precision", "bf16"), "--precision bf16 has no effect with --device cpu"),
             (("--sync", "nccl"), "--sync nccl has no effect with --device cpu"),
             (("--sync", "direct"), "--sync direct has no effect with --device cpu"),
             (("--device", "gpu", "--sync", "direct", "--layer-norm"), "--sync direct has no effect with --layer-norm"),
             (("--device", "gpu", "--sync", "nccl", "--residual"), "--sync nccl has no effect with --residual"),
             (("--device", "gpu", "--precision", "tf32", "--optimizer", "lamb"),
              "--precision tf32 has no effect with --optimizer lamb")]
    said = refusals([["train", "--data", flowers, "--out", tmp_path / "run", *OPTIONS, *more] for more, _ in cases],
                    env=EMULATED)
    for (_, sentence), (codes, text) in zip(cases, said, strict=True):
        assert codes == {78} and sentence in text and text.count("\n") == 1, text


def test_without_a_gpu_one_sentence_and_69(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--device", "gpu", env={"HPCMLP_GPU": "",
                  "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 69 and done.stderr.count("\n") == 1 and "--device gpu" in done.stderr, done.stderr


def test_a_number_that_is_not_finite_ends_the_run_in_one_sentence(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--hidden", "8", "--activation", "identity",
                  "--loss", "softmax_cross_entropy", "--optimizer", "sgd", "--lr", "1e38", "--steps", 40, "--device",
                  "gpu", env=EMULATED)
    assert done.returncode == 70 and "not finite" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("ranks", (None, 2))
def test_bench_step_times_planned_steps(hpcmlp, ranks):
    done = hpcmlp("bench", "step", "--sizes", "20,16,4", "--global-batch-size", 64, "--steps", 10, "--device", "gpu",
                  "--precision", "bf16", "--json", ranks=ranks, env=EMULATED)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device"] == "emulated" and result["precision"] == "bf16" and result["ranks"] == (ranks or 1)
    assert result["step_ms"] > 0.0 and result["num_params"] == 20 * 16 + 16 + 16 * 4 + 4


@pytest.mark.parametrize("more", (("--bucket-mb", 0.001), ("--full-update",)))
def test_messages_straight_from_the_device_give_the_bits_of_the_ring_of_hosts(flowers, hpcmlp, tmp_path, fake_cupy,
                                                                               more):
    """Where MPI claims it and a child has proven it; a claim that is false is said, and the hosts send."""
    claim = {"MV2_USE_CUDA": "1", "PYTHONPATH": f"{REPOSITORY}:{fake_cupy}"}
    said = {}
    for name, sync, env in (("host", "ring", {}), ("auto", "auto", claim), ("asked", "direct", claim),
                            ("false", "auto", claim | {"FAKE_WRONG": "1024"})):
        done = train(hpcmlp, flowers, tmp_path / name, "--device", "gpu", "--sync", sync, *more, ranks=3, **env)
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    assert "gradients through host memory (--" in said["host"]
    assert "claims that MPI can, proven in a child process of every rank" in said["auto"]
    assert "gradients straight from GPU memory (--" in said["asked"] and "sync direct" in said["asked"]
    assert "gradients through host memory" in said["false"]
    assert "tried in a child process of rank 0, it ends with 1: AssertionError: other numbers arrive" in said["false"]
    bits = {name: parameters(tmp_path / name)[1] for name in said}
    assert bits["host"] == bits["auto"] == bits["asked"]
    assert json.loads((tmp_path / "auto" / "summary.json").read_text())["sync"] == "direct"


def test_a_run_that_sends_straight_from_the_device_stops_and_goes_on_with_the_same_bits(flowers, hpcmlp, tmp_path,
                                                                                        fake_cupy):
    more = "--device", "gpu", "--precision", "bf16", "--sync", "direct"
    env = {"PYTHONPATH": f"{REPOSITORY}:{fake_cupy}"}
    whole = train(hpcmlp, flowers, tmp_path / "whole", *more, ranks=2, **env)
    stopped = train(hpcmlp, flowers, tmp_path / "cut", *more, ranks=2, **env,
                    HPCMLP_FAULT="rank=0,step=22,act=signal:SIGUSR1")
    resumed = train(hpcmlp, flowers, tmp_path / "cut", *more, "--resume", ranks=2, **env)
    assert (whole.returncode, stopped.returncode, resumed.returncode) == (0, 75, 0), resumed.stderr
    assert "--sync direct; proven in a child process of every rank" in whole.stdout
    assert parameters(tmp_path / "cut")[1] == parameters(tmp_path / "whole")[1]


def test_what_was_asked_for_and_is_not_proven_is_refused_in_one_sentence(flowers, hpcmlp, tmp_path, fake_cupy):
    (tmp_path / "cupy.py").write_text("import os; os.abort()")
    for folder, words in ((tmp_path, "tried in a child process of rank 0, it ends with -6: no word"),
                          (fake_cupy, "no such GPU")):
        done = train(hpcmlp, flowers, tmp_path / "run", "--device", "gpu", "--sync", "direct", ranks=2,
                     PYTHONPATH=f"{REPOSITORY}:{folder}", FAKE_GPUS="0")
        assert done.returncode == 78 and done.stderr.count("\n") == 1, done.stderr
        assert "--sync direct cannot work here: not straight from GPU memory" in done.stderr and words in done.stderr


@pytest.mark.parametrize("sync", ("nccl", "direct"))
def test_one_rank_has_nobody_to_send_to(flowers, hpcmlp, tmp_path, sync):
    done = train(hpcmlp, flowers, tmp_path / "run", "--device", "gpu", "--sync", sync)
    assert done.returncode == 0 and "whole steps on the device" in done.stdout, done.stderr


def test_ranks_that_share_a_gpu_are_named_with_the_cure(flowers, hpcmlp, tmp_path):
    shared = EMULATED["HPCMLP_GPU"] + ":the only one"
    done = train(hpcmlp, flowers, tmp_path / "run", "--device", "gpu", ranks=2, HPCMLP_GPU=shared, MV2_USE_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert "ranks 0-1 (" in done.stdout and "share a GPU; faster is one rank per GPU" in done.stdout
    assert "not straight from GPU memory, though MV2_USE_CUDA=1 claims that MPI can" in done.stdout
    judged = hpcmlp("evaluate", tmp_path / "run", "--json", "--device", "gpu", ranks=2, env={"HPCMLP_GPU": shared})
    assert "share a GPU" in judged.stderr and json.loads(judged.stdout)["rows"]
    refused = train(hpcmlp, flowers, tmp_path / "nccl", "--device", "gpu", "--sync", "nccl", ranks=2, HPCMLP_GPU=shared)
    assert refused.returncode == 78 and "ranks 0 and 1 share a GPU" in refused.stderr
    assert refused.stderr.count("\n") == 1
    own = train(hpcmlp, flowers, tmp_path / "own", "--device", "gpu", "--sync", "nccl", ranks=2,
                HPCMLP_GPU=EMULATED["HPCMLP_GPU"] + ":one,another")     # both ranks see both
    assert own.returncode == 0 and "share a GPU" not in own.stdout, own.stderr
