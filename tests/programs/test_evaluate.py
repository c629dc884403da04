"""Evaluation through the command line: one result at any rank count, every sample once, models that do not fit."""

import csv
import json

import h5py
import numpy as np
import pytest


@pytest.fixture(scope="module")
def run(flowers, hpcmlp, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    done = hpcmlp("train", "--data", flowers, "--out", out, "--hidden", 8, "--epochs", 2, "--global-batch-size", 64,
                  "--lr", 0.005, ranks=2)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def regression(hpcmlp, tmp_path_factory):
    """A run on two targets far from 0, and its data set."""
    folder = tmp_path_factory.mktemp("regression")
    random = np.random.default_rng(0)
    x = random.standard_normal((300, 3))
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "c", "mass", "size"])
        for row in x:
            writer.writerow([*(f"{v:.6g}" for v in row), f"{5000 + 100 * row[0]:.8g}", f"{row[1] - row[2]:.8g}"])
    done = hpcmlp("prepare", folder / "table.csv", "--target", "mass,size", "--out", folder / "data", "--shards", 3)
    assert done.returncode == 0, done.stderr
    done = hpcmlp("train", "--data", folder / "data", "--out", folder / "run", "--hidden", 16, "--epochs", 15, "--lr",
                  0.01, "--global-batch-size", 32, "--checkpoint-every", 1000, "--validate-every", 15)
    assert done.returncode == 0, done.stderr
    return folder


def evaluate(hpcmlp, *arguments, ranks=None):
    done = hpcmlp("evaluate", *arguments, "--json", ranks=ranks)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_any_number_of_ranks_gives_one_result(run, hpcmlp, flowers):
    manifest = json.loads((flowers / "dataset.json").read_text())
    alone = evaluate(hpcmlp, run)
    assert alone["rows"] == sum(entry["rows"] for entry in manifest["splits"]["test"])
    assert np.sum(alone["confusion"]) == alone["rows"]
    assert [entry["rows"] for entry in alone["classes"].values()] == manifest["class_counts"]["test"]
    together = evaluate(hpcmlp, run, "--rows-per-batch", 7, ranks=3)
    assert together["confusion"] == alone["confusion"] and together["accuracy"] == alone["accuracy"]
    assert together["auc"] == pytest.approx(alone["auc"], abs=1e-6)
    assert together["log_loss"] == pytest.approx(alone["log_loss"], rel=1e-5)


def test_the_figures_are_those_of_the_training_summary(run, hpcmlp):
    summary = json.loads((run / "summary.json").read_text())
    result = evaluate(hpcmlp, run)
    assert result["accuracy"] == summary["test"]["accuracy"]
    assert result["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)
    assert result["parameters_sha256"] == summary["parameters_sha256"]
    assert evaluate(hpcmlp, run, "--split", "val")["accuracy"] == summary["val"]["accuracy"]


def test_the_table_shows_the_figures_and_nothing_is_written(run, hpcmlp):
    before = sorted(run.rglob("*"))
    done = hpcmlp("evaluate", run, "--split", "train")
    assert done.returncode == 0 and done.stderr == ""
    for word in ("accuracy", "auc", "f1 macro", "target \\ prediction", "bee"):
        assert word in done.stdout
    assert sorted(run.rglob("*")) == before


def test_physical_units_are_the_scale_of_the_targets(regression, hpcmlp):
    result = evaluate(hpcmlp, regression / "run")
    manifest = json.loads((regression / "data" / "dataset.json").read_text())
    assert list(result["outputs"]) == ["mass", "size"]
    for entry, scale in zip(result["outputs"].values(), manifest["target_scale"], strict=True):
        assert entry["rmse_physical"] == pytest.approx(entry["rmse"] * scale, rel=1e-9)
        assert entry["r2"] > 0.9
    predicted = regression / "predicted.h5"
    assert hpcmlp("predict", regression / "run", regression / "data", "--out", predicted, ranks=2).returncode == 0
    targets = []
    for shard in manifest["splits"]["test"]:
        with h5py.File(regression / "data" / shard["file"]) as file:
            targets.append(file["y"][...].astype(np.float64) * manifest["target_scale"] + manifest["target_shift"])
    with h5py.File(predicted) as file:
        error = file["prediction"][...] - np.concatenate(targets)
    np.testing.assert_allclose([entry["rmse_physical"] for entry in result["outputs"].values()],
                               np.sqrt(np.mean(error**2, axis=0)), rtol=1e-5)
    assert "rmse physical" in hpcmlp("evaluate", regression / "run").stdout


def test_a_model_that_does_not_fit_the_data_is_refused_naming_the_difference(run, regression, hpcmlp, tmp_path):
    done = hpcmlp("evaluate", run, "--data", regression / "data", ranks=2)
    assert done.returncode == 78 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "classification" in done.stderr and "regression" in done.stderr
    other = tmp_path / "other"  # the same columns, other rows: other statistics
    table = regression / "table.csv"
    (tmp_path / "half.csv").write_text("".join(table.read_text().splitlines(keepends=True)[:150]))
    assert hpcmlp("prepare", tmp_path / "half.csv", "--target", "mass,size", "--out", other).returncode == 0
    done = hpcmlp("evaluate", regression / "run", "--data", other)
    assert done.returncode == 78 and "does not fit" in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_is_not_there_is_one_sentence(run, hpcmlp, tmp_path):
    for arguments, ranks in (((tmp_path / "no-run",), 2), ((run, "--data", tmp_path / "no-data"), None)):
        done = hpcmlp("evaluate", *arguments, ranks=ranks)
        assert done.returncode == 66 and done.stdout == "" and len(done.stderr.splitlines()) == 1
