"""Training through the command line: results, rank counts, the run directory, wrong usage."""

import json
import tomllib

import numpy as np
import pytest

from hpcmlp.run import checkpoint


def summary(run):
    return json.loads((run / "summary.json").read_text())


def records(run, kind):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


SMALL = ("--hidden", "16,16", "--epochs", 6, "--global-batch-size", 32, "--lr", 0.01, "--log-every", 1)


@pytest.fixture(scope="module")
def runs(flowers, hpcmlp, tmp_path_factory):
    """The same training at 1, 2, 3 and 4 ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2, 3, 4):
        done = hpcmlp("train", "--data", flowers, "--out", folder / str(ranks), *SMALL, ranks=ranks)
        assert done.returncode == 0, done.stderr
        (folder / f"{ranks}.txt").write_text(done.stdout)
    return folder


def test_any_number_of_ranks_gives_the_same_losses_and_accuracy(runs):
    losses = {n: [r["loss"] for r in records(runs / str(n), "step")] for n in (1, 2, 3, 4)}
    assert len(losses[1]) >= 100
    for n in (2, 3, 4):
        np.testing.assert_allclose(losses[n][:100], losses[1][:100], rtol=1e-5)
        accuracy = [summary(runs / str(k))["test"]["accuracy"] for k in (1, n)]
        assert abs(accuracy[0] - accuracy[1]) <= 0.003
    assert summary(runs / "1")["test"]["accuracy"] > 0.8
    assert losses[1][-1] < 0.5 * losses[1][0]


def test_the_run_directory_holds_what_the_design_promises(runs, flowers):
    run = runs / "2"
    assert {p.name for p in run.iterdir()} >= {"config.toml", "metrics.jsonl", "checkpoints", "summary.json"}
    assert not (run / "lock").exists()
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["hidden"] == [16, 16] and config["lr"] == 0.01
    result = summary(run)
    assert result["status"] == "finished" and result["ranks"] == 2 and result["num_params"] == 8 * 16 + 16 + 272 + 51
    model = checkpoint.load_model(run)
    assert model.parameters_sha256 == result["parameters_sha256"] and model.classes == ["ant", "bee", "cat"]
    epochs = records(run, "epoch")
    assert [e["epoch"] for e in epochs] == [1, 2, 3, 4, 5, 6] and "accuracy" in epochs[0]["val"]
    assert len(checkpoint.list_checkpoints(run)) == 2


def test_the_console_says_what_runs_where(runs):
    text = (runs / "2.txt").read_text()
    for words in ("ranks     2 on 1 node", "network   8-16-16-3 relu, 467 parameters", "epoch   6/6", "samples/s"):
        assert words in text
    assert "\r" not in text


@pytest.mark.parametrize("wire", ["bf16", "float16", "int8"])
def test_narrow_wires_train_like_float32(runs, flowers, hpcmlp, tmp_path, wire):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *SMALL, "--wire", wire, "--sync", "ring",
                  ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"sync ring, {wire} on the wire" in done.stdout
    got, expected = summary(tmp_path / "run"), summary(runs / "2")
    assert got["wire"] == wire and got["sync"] == "ring" and expected["wire"] == "float32"
    assert abs(got["test"]["accuracy"] - expected["test"]["accuracy"]) <= 0.02
    losses = [np.array([r["train_loss"] for r in records(run, "epoch")]) for run in (tmp_path / "run", runs / "2")]
    np.testing.assert_allclose(*losses, rtol=0.02)


def test_a_resumed_run_may_change_its_wire(flowers, hpcmlp, tmp_path):
    for steps, wire in ((10, "float32"), (20, "int8"), (30, "bf16")):
        done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--steps", steps, "--resume", "--wire",
                      wire, "--sync", "ring", "--replica-check-every", 1, ranks=2)
        assert done.returncode == 0, done.stderr
        assert summary(tmp_path / "run")["steps"] == steps and summary(tmp_path / "run")["wire"] == wire


def test_every_narrow_wire_reads_digits_as_well_as_float32(hpcmlp, tmp_path):
    """Real data, both halves narrow: 360 test images at 64 pixels, of which float32 reads 97 to 98 %."""
    pytest.importorskip("sklearn")
    done = hpcmlp("prepare", "digits", "--out", tmp_path / "digits")
    assert done.returncode == 0, done.stderr
    accuracy = {}
    for wire in ("float32", "bf16", "float16", "int8"):
        done = hpcmlp("train", "--data", tmp_path / "digits", "--out", tmp_path / wire, "--hidden", 64, "--epochs", 20,
                      "--global-batch-size", 64, "--lr", 0.003, "--schedule", "cosine", "--sync", "ring", "--wire",
                      wire, ranks=2)
        assert done.returncode == 0, done.stderr
        accuracy[wire] = summary(tmp_path / wire)["test"]["accuracy"]
    assert min(accuracy.values()) > 0.95 and min(accuracy.values()) > accuracy["float32"] - 0.012, accuracy


def test_a_narrow_wire_that_mpi_would_have_to_add_is_refused(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--wire", "int8", "--sync", "native", ranks=2)
    assert done.returncode == 78 and len(done.stderr.splitlines()) == 1
    assert "--wire int8 has no effect with --sync native" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_narrow_wire_on_one_node_is_noted_and_changes_nothing(flowers, hpcmlp, tmp_path):
    digests = []
    for wire in ("float32", "bf16"):
        done = hpcmlp("train", "--data", flowers, "--out", tmp_path / wire, "--steps", 20, "--wire", wire, ranks=2)
        assert done.returncode == 0, done.stderr
        assert ("wire bf16 has nothing to act on: all ranks share one node" in done.stdout) == (wire == "bf16")
        assert summary(tmp_path / wire)["wire"] == "float32"
        digests.append(summary(tmp_path / wire)["parameters_sha256"])
    assert digests[0] == digests[1]


def test_printed_losses_have_the_form_of_the_article(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--steps", 20, "--print-every", 10)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("Step ")]
    assert [line.split(",")[0] for line in lines] == ["Step 10", "Step 20"]
    assert all(len(line.split("loss = ")[1].split(".")[1]) == 2 for line in lines)


def test_options_come_from_toml_and_the_command_line_wins(flowers, hpcmlp, tmp_path):
    toml = tmp_path / "a.toml"
    toml.write_text(f'data = "{flowers}"\nhidden = [5]\nsteps = 3\nlr = 0.5\n')
    done = hpcmlp("train", "--config", toml, "--out", tmp_path / "run", "--lr", 0.25)
    assert done.returncode == 0, done.stderr
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert config["hidden"] == [5] and config["lr"] == 0.25 and config["steps"] == 3


@pytest.mark.parametrize("options", [
    ("--full-update",), ("--sync", "native"), ("--ema", 0.9), ("--clip-norm", 0.5), ("--accumulate", 3),
    ("--optimizer", "lamb"), ("--optimizer", "lars"), ("--schedule", "one_cycle"), ("--dropout", 0.3),
    ("--layer-norm", "--residual"), ("--label-smoothing", 0.1, "--class-weights", "balanced"),
    ("--memory-limit", 0.01), ("--hidden", "none")])
def test_options_act_and_runs_finish(flowers, hpcmlp, tmp_path, options):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--epochs", 2, "--global-batch-size", 50,
                  *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run")["status"] == "finished"


def test_early_stopping_keeps_the_best_state(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--epochs", 60, "--lr", 0.05,
                  "--early-stopping", 2)
    assert done.returncode == 0, done.stderr
    epochs = records(tmp_path / "run", "epoch")
    values = [e["val"]["accuracy"] for e in epochs]
    best = int(np.argmax(values))
    assert len(epochs) < 60 and len(epochs) == best + 3
    result = summary(tmp_path / "run")
    assert result["best_step"] == epochs[best]["step"] and result["val"]["accuracy"] == max(values)


WRONG = [
    (("--hiden", "3"), 2, "did you mean '--hidden'"),
    (("--lr", "fast"), 2, "not a number"),
    (("--lr", "-1"), 78, "above 0"),
    (("--activation", "rleu"), 78, "did you mean 'relu'"),
    (("--global-batch-size", "0"), 78, "at least 1"),
    (("--hidden", "0"), 78, "at least 1"),
    (("--epochs", 1, "--steps", 1), 78, "one of them"),
    (("--min-lr", "0.1"), 78, "--min-lr has no effect with --schedule constant"),
    (("--momentum", "0.1"), 78, "--momentum has no effect with --optimizer adamw"),
    (("--loss", "mean_squared"), 78, "does not fit classification"),
    (("--warmup-steps", "100000"), 78, "does not fit"),
    (("--monitor", "happiness"), 78, "not a validation metric"),
    (("--hidden", "16777216,16777216"), 69, "are missing"),
    (("--device", "gpu"), 69, "--device gpu"),
    (("--data", "/nowhere"), 66, "no such file"),
]


@pytest.fixture(scope="module", params=[None, 2])
def refused(request, flowers, refusals, tmp_path_factory):
    """What the ranks said to all of WRONG, and where they should have run."""
    folder = tmp_path_factory.mktemp("wrong")
    commands = [["train", "--data", flowers, "--out", folder / f"run-{k}", *words] for k, (words, _, _) in
                enumerate(WRONG)]
    return refusals(commands, request.param), folder


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[" ".join(map(str, words)) for words, _, _ in WRONG])
def test_wrong_options_end_with_one_sentence_and_no_run(refused, number):
    (said, folder), (_, code, words) = refused, WRONG[number]
    codes, text = said[number]
    assert codes == {code}, text
    assert words.lower() in text.lower() and text.startswith("hpcmlp: ") and text.count("\n") == 1
    assert not (folder / f"run-{number}" / "summary.json").exists()


@pytest.mark.parametrize("ranks", [None, 2])
def test_the_code_of_a_refusal_is_that_of_the_launcher(flowers, hpcmlp, tmp_path, ranks):
    for number in (0, 2):       # before MPI has started, and after
        words, code, _ = WRONG[number]
        done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", *words, ranks=ranks)
        assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr


def test_toml_keys_are_checked(flowers, hpcmlp, tmp_path):
    for text, code, words in (("hiden = [3]\n", 78, "did you mean 'hidden'"), ("lr = true\n", 78, "must be a float"),
                              ("lr = [", 78, "not a TOML file")):
        (tmp_path / "a.toml").write_text(text)
        done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "-c", tmp_path / "a.toml")
        assert done.returncode == code and words in done.stderr and done.stderr.count("\n") == 1
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "-c", tmp_path / "none.toml")
    assert done.returncode == 66


def test_a_run_directory_is_not_overwritten_nor_shared(flowers, hpcmlp, tmp_path):
    run = tmp_path / "run"
    assert hpcmlp("train", "--data", flowers, "--out", run, "--steps", 2).returncode == 0
    again = hpcmlp("train", "--data", flowers, "--out", run, "--steps", 2, ranks=2)
    assert again.returncode == 73 and "--resume" in again.stderr and again.stderr.count("\n") == 1
    (tmp_path / "file").write_text("")
    bad = hpcmlp("train", "--data", flowers, "--out", tmp_path / "file" / "run", "--steps", 2)
    assert bad.returncode == 73 and bad.stderr.count("\n") == 1


def test_missing_and_damaged_shards_are_named_by_one_sentence(flowers, hpcmlp, tmp_path):
    import shutil
    data = tmp_path / "data"
    shutil.copytree(flowers, data)
    victim = sorted(data.glob("train-*.h5"))[2]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-100])
    done = hpcmlp("train", "--data", data, "--out", tmp_path / "run", "--steps", 2, ranks=2)
    assert done.returncode == 65 and victim.name in done.stderr and done.stderr.count("\n") == 1
    victim.unlink()
    done = hpcmlp("train", "--data", data, "--out", tmp_path / "run", "--steps", 2, ranks=2)
    assert done.returncode == 66 and victim.name in done.stderr and done.stderr.count("\n") == 1
    done = hpcmlp("train", "--data", tmp_path / "nothing", "--out", tmp_path / "run2", "--steps", 2, ranks=2)
    assert done.returncode == 66 and done.stderr.count("\n") == 1


def test_numbers_that_are_not_finite_end_the_run_with_70(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--optimizer", "sgd", "--lr", 1e30,
                  "--epochs", 3, ranks=2)
    assert done.returncode == 70 and "not finite" in done.stderr and done.stderr.count("\n") == 1


def test_help_shows_defaults_and_starts_no_mpi(hpcmlp):
    done = hpcmlp("train", "--help", env={"MPI4PY_LIBMPI": "/nonexistent"})
    assert done.returncode == 0 and "--global-batch-size" in done.stdout and "default: 256" in done.stdout
    for program in ("prepare", "evaluate", "predict", "inspect", "bench", "report"):
        assert hpcmlp(program, "--help").returncode == 0


def test_a_drifted_replica_ends_the_run_and_is_named(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--steps", 30, "--sync", "ring",
                  "--replica-check-every", 5, ranks=3, env={"HPCMLP_FAULT": "rank=2,step=10,act=flip"})
    assert done.returncode == 70 and "parameters of rank 2 differ" in done.stderr and done.stderr.count("\n") == 1


def test_a_fault_of_ours_ends_all_ranks_with_a_traceback_of_the_rank(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--steps", 30, ranks=3,
                  env={"HPCMLP_FAULT": "rank=1,step=4,act=raise"}, timeout=30)
    assert done.returncode == 70 and "[rank 1 " in done.stderr and "fault on purpose at step 4" in done.stderr
    assert done.stderr.count("Traceback") == 1
