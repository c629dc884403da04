"""Prediction through the command line: input order, names and units, whole files or none, any rank count."""

import csv
import json
import os

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from hpcmlp.config import PredictConfig
from hpcmlp.errors import CannotWrite, DataError, InputMissing
from hpcmlp.programs import predict
from hpcmlp.run.checkpoint import load_model


@pytest.fixture(scope="module")
def run(flowers, hpcmlp, tmp_path_factory):
    out = tmp_path_factory.mktemp("predict") / "run"
    done = hpcmlp("train", "--data", flowers, "--out", out, "--hidden", 8, "--epochs", 3, "--global-batch-size", 64,
                  "--lr", 0.03)
    assert done.returncode == 0, done.stderr
    return out


def alone(run, input, out, **options):
    """The program in this process: what the command line does, without its start."""
    return predict.main(PredictConfig(str(run), str(input), str(out), **options), MPI.COMM_SELF)


def read(path):
    with h5py.File(path) as file:
        return {name: data[...] for name, data in file.items()}, dict(file.attrs)


def probabilities(table, run):
    """The network in float64 NumPy, from the raw table and the numbers stored in the run."""
    model = load_model(run)
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    raw = np.array([[float(row[name]) for name in model.feature_names] for row in rows])
    a = (raw - np.array(model.preprocessing["shift"])) * np.array(model.preprocessing["scale"])
    layers = len(model.spec.sizes) - 1
    for layer in range(layers):
        a = a @ model.params[f"layers.{layer}.weight"].T.astype(float) + model.params[f"layers.{layer}.bias"]
        a = np.maximum(a, 0) if layer < layers - 1 else a
    e = np.exp(a - a.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True), [row["kind"] for row in rows]


@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_stand_in_input_order_with_names(run, flowers, hpcmlp, tmp_path, ranks):
    table = flowers.parent / "table.csv"
    done = hpcmlp("predict", run, table, "--out", tmp_path / "out.h5", "--rows-per-batch", 101, ranks=ranks)
    assert done.returncode == 0, done.stderr
    wanted, kinds = probabilities(table, run)
    data, attributes = read(tmp_path / "out.h5")
    np.testing.assert_allclose(data["probability"], wanted, rtol=1e-4, atol=1e-6)
    assert data["probability"].dtype == np.float32 and data["label"].dtype == np.int32
    np.testing.assert_array_equal(data["label"], wanted.argmax(axis=1))
    names = [b"ant", b"bee", b"cat"]
    assert data["classes"].tolist() == names
    assert data["label_name"].tolist() == [names[k] for k in data["label"]]
    assert np.mean([a.decode() == b for a, b in zip(data["label_name"], kinds, strict=True)]) > 0.8
    model = load_model(run)
    assert attributes["parameters_sha256"] == model.parameters_sha256 and attributes["step"] == model.step
    assert os.listdir(tmp_path) == ["out.h5"]


def test_a_split_of_the_data_set_gives_the_accuracy_of_the_evaluation(run, flowers, hpcmlp, tmp_path):
    done = hpcmlp("predict", run, flowers, "--split", "test", "--out", tmp_path / "out.h5", ranks=2)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((flowers / "dataset.json").read_text())
    targets = np.concatenate([read(flowers / entry["file"])[0]["y"] for entry in manifest["splits"]["test"]])
    accuracy = np.mean(read(tmp_path / "out.h5")[0]["label"] == targets)
    assert accuracy == json.loads((run / "summary.json").read_text())["test"]["accuracy"]


def test_fewer_rows_than_ranks_and_none_at_all(run, flowers, hpcmlp, tmp_path):
    lines = (flowers.parent / "table.csv").read_text().splitlines(keepends=True)
    for rows, ranks in ((0, None), (2, 3)):
        (tmp_path / "few.csv").write_text("".join(line.rpartition(",")[0] + "\n" for line in lines[:rows + 1]))
        out = tmp_path / f"{rows}.h5"
        done = hpcmlp("predict", run, tmp_path / "few.csv", "--out", out, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert read(out)[0]["probability"].shape == (rows, 3)


def test_an_existing_file_stays_unless_forced(run, flowers, hpcmlp, tmp_path):
    out = tmp_path / "out.h5"
    out.write_bytes(b"mine")
    done = hpcmlp("predict", run, flowers, "--out", out, ranks=2)
    assert done.returncode == 73 and "--force" in done.stderr and len(done.stderr.splitlines()) == 1
    assert out.read_bytes() == b"mine"
    assert alone(run, flowers, out, force=True) == 0
    assert h5py.is_hdf5(out)


def bad_tables(flowers):
    """Texts of tables that cannot be used, and what the sentence must name."""
    lines = (flowers.parent / "table.csv").read_text().splitlines(keepends=True)[:20]
    odd = "oops" + lines[17][lines[17].index(","):]
    yield "".join([*lines[:17], odd, *lines[18:]]), "row 16 "
    yield "".join(line.partition(",")[2] for line in lines), "'f0'"


def test_bad_rows_are_named_and_leave_no_file(run, flowers, hpcmlp, tmp_path):
    (tmp_path / "out").mkdir()
    for text, where in bad_tables(flowers):
        (tmp_path / "table.csv").write_text(text)
        with pytest.raises(DataError, match=where):
            alone(run, tmp_path / "table.csv", tmp_path / "out" / "x.h5")
        assert not os.listdir(tmp_path / "out")
    (tmp_path / "table.csv").write_text(next(bad_tables(flowers))[0])  # a row that only the last rank reads
    done = hpcmlp("predict", run, tmp_path / "table.csv", "--out", tmp_path / "out" / "x.h5", ranks=2)
    assert done.returncode == 65 and "row 16 " in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout == "" and not os.listdir(tmp_path / "out")


def test_wrong_places_are_named(run, flowers, tmp_path):
    for arguments, error in (((run, flowers, tmp_path / "no" / "x.h5"), CannotWrite),
                             ((run, tmp_path / "nothing.csv", tmp_path / "x.h5"), InputMissing),
                             ((tmp_path / "no-run", flowers, tmp_path / "x.h5"), InputMissing)):
        with pytest.raises(error):
            alone(*arguments)
    assert not os.listdir(tmp_path)


def test_quantiles_are_in_physical_units_and_in_order(hpcmlp, tmp_path):
    random = np.random.default_rng(1)
    x = random.uniform(-1, 1, 400)
    y = 1e4 + 100 * x + 20 * random.standard_normal(400)
    with open(tmp_path / "table.csv", "w") as file:
        file.write("x,y\n" + "".join(f"{a:.6f},{b:.4f}\n" for a, b in zip(x, y, strict=True)))
    for command in (("prepare", tmp_path / "table.csv", "--target", "y", "--out", tmp_path / "data"),
                    ("train", "--data", tmp_path / "data", "--out", tmp_path / "run", "--loss", "quantile", "--hidden",
                     "16", "--quantiles", "0.1,0.5,0.9", "--epochs", 15, "--lr", 0.02, "--global-batch-size", 32,
                     "--checkpoint-every", 1000, "--validate-every", 15),
                    ("predict", tmp_path / "run", tmp_path / "table.csv", "--out", tmp_path / "out.h5")):
        done = hpcmlp(*command)
        assert done.returncode == 0, done.stderr
    data, attributes = read(tmp_path / "out.h5")
    assert attributes["quantiles"].tolist() == [0.1, 0.5, 0.9] and data["target_names"].tolist() == [b"y"]
    assert data["quantile"].shape == (400, 1, 3) and data["prediction"].shape == (400, 1)
    np.testing.assert_array_equal(data["prediction"], data["quantile"][:, :, 1])
    assert (data["quantile"][:, 0, 0] < data["quantile"][:, 0, 2]).all()
    assert np.corrcoef(data["prediction"][:, 0], y)[0, 1] > 0.9 and abs(data["prediction"].mean() - 1e4) < 20
    covered = np.mean((y > data["quantile"][:, 0, 0]) & (y < data["quantile"][:, 0, 2]))
    assert 0.65 < covered < 0.95
