"""prepare: the same bytes at any rank count, every row once; bad input is one sentence and leaves nothing behind."""

import json
import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmlp.config import PrepareConfig
from hpcmlp.data.manifest import read_manifest
from hpcmlp.data.preprocess import Preprocessor
from hpcmlp.data.readers import open_table
from hpcmlp.data.shards import ShardReader, check_values
from hpcmlp.data.statistics import BLOCK_ROWS
from hpcmlp.errors import CannotWrite, ConfigError, DataError, HpcmlpError, InputMissing
from hpcmlp.programs import prepare


def self_comm():
    from mpi4py import MPI
    return MPI.COMM_SELF


def run(comm=None, **options):
    config = PrepareConfig(**{"source": "", "out": "", **{k: str(v) if isinstance(v, Path) else v
                                                         for k, v in options.items()}})
    assert prepare.main(config, comm or self_comm()) == 0
    return read_manifest(config.out)


def read(directory, split="train"):
    manifest = read_manifest(directory)
    parts = []
    for entry in manifest.splits.get(split, ()):
        with ShardReader(Path(directory) / entry.file, entry) as reader:
            reader.check(manifest)
            reader.verify_sha256()
            parts.append(reader.read(0, entry.rows))
            check_values(entry.file, parts[-1][0], parts[-1][1], manifest.num_outputs if manifest.classes else None)
    return [np.concatenate(arrays) if arrays[0] is not None else None for arrays in zip(*parts, strict=True)]


def write_csv(path, n, seed=0, missing=True):
    """Mixed columns, more rows than a block when n says so; column `id` numbers the rows."""
    random = np.random.default_rng(seed)
    size, kind = random.normal(50, 9, n), random.choice(["red", "green", "blue, deep"], n)
    lines = ["id,size,kind,rank,weight,label"]
    for i in range(n):
        empty = missing and i % 11 == 3
        lines.append(f'{i},{"" if empty else repr(float(size[i]))},"{"" if missing and i % 13 == 5 else kind[i]}",'
                     f'{i % 7},{1 + i % 3},{"yes" if (i * i) % 5 < 2 else "no"}')
    path.write_text("\n".join(lines) + "\n")
    return path


def write_pixels(path, n=50, test=20):
    random = np.random.default_rng(1)
    np.savez(path, x_train=random.integers(0, 256, (n, 4, 4)).astype(np.uint8), y_train=np.arange(n) % 3,
             x_test=random.integers(0, 256, (test, 4, 4)).astype(np.uint8), y_test=np.arange(test) % 3)
    return path


def write_numbers(path, n=60):
    random = np.random.default_rng(2)
    x = random.normal(size=(n, 5)).astype(np.float32)
    x[3, 2] = np.nan
    with h5py.File(path, "w") as file:
        file["features"], file["targets"], file["weights"] = x, random.normal(size=(n, 2)), np.ones(n)
    return path


CASES = {
    "mixed csv": lambda p: dict(source=write_csv(p / "d.csv", 2 * BLOCK_ROWS + 77), target="label", weight="weight"),
    "dropping": lambda p: dict(source=write_csv(p / "d.csv", BLOCK_ROWS + 9), target="label", missing="drop",
                               normalize="robust", categorical=("rank",)),
    "regression": lambda p: dict(source=write_csv(p / "d.csv", 900), target="size", missing="drop", shards=3,
                                 normalize="min-max", compression="gzip"),
    "pixels": lambda p: dict(source=write_pixels(p / "d.npz"), normalize="standard", shards=5),
    "numbers": lambda p: dict(source=write_numbers(p / "d.h5"), invalid="missing", normalize="robust", shards=50),
    "three rows": lambda p: dict(source=write_csv(p / "d.csv", 3), target="label", val_fraction=0.0, test_fraction=0.3),
}


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes_at_any_rank_count(comm, mpi_tmp_path, case):
    if comm.rank == 0:
        options = CASES[case](mpi_tmp_path)
        run(out=mpi_tmp_path / "alone", **options)
    options = comm.bcast(options if comm.rank == 0 else None)
    run(comm, out=mpi_tmp_path / "together", **options)
    alone, together = (mpi_tmp_path / name for name in ("alone", "together"))
    assert sorted(os.listdir(alone)) == sorted(os.listdir(together))
    for name in os.listdir(alone):
        assert (alone / name).read_bytes() == (together / name).read_bytes(), name
    comm.Barrier()


@pytest.mark.mpi
def test_a_fault_in_one_ranks_rows_is_raised_on_all_ranks_and_leaves_nothing(comm, mpi_tmp_path):
    path = mpi_tmp_path / "d.csv"
    row = 3 * BLOCK_ROWS + 5
    if comm.rank == 0:
        lines = ["a,b,label"] + [f"{i},{i % 9},{i % 2}" for i in range(4 * BLOCK_ROWS)]
        lines[row + 1] = "1,inf,0"
        path.write_text("\n".join(lines))
    comm.Barrier()
    with pytest.raises(DataError, match=rf"row {row} \(line {row + 2}\), column 'b' is inf") as error:
        run(comm, source=path, out=mpi_tmp_path / "out", target="label")
    assert error.value.agreed
    comm.Barrier()
    assert os.listdir(mpi_tmp_path) == ["d.csv"]


def test_every_row_lands_once_with_its_own_values(tmp_path):
    n = 1000
    manifest = run(source=write_csv(tmp_path / "d.csv", n), out=tmp_path / "out", target="label", weight="weight",
                   normalize="none", val_fraction=0.25, shards=4)
    assert {s: manifest.rows(s) for s in manifest.splits} == {"train": 600, "val": 200, "test": 200}
    assert [e.rows for e in manifest.splits["train"]] == [150] * 4 and manifest.classes == ["no", "yes"]
    assert manifest.feature_names == ["id", "size", "kind=blue, deep", "kind=green", "kind=red", "rank"]
    ids = []
    for split in manifest.splits:
        x, y, weight = read(tmp_path / "out", split)
        row = x[:, 0].astype(int)
        assert np.array_equal(y, (row * row) % 5 < 2) and np.array_equal(weight, 1 + row % 3)
        assert np.array_equal(x[:, 5], row % 7) and (x[:, 2:5].sum(axis=1) == 1).all()
        ids += row.tolist()
        counts = np.bincount(y, minlength=2)
        assert manifest.class_counts[split] == counts.tolist() and abs(counts[1] / len(y) - 0.6) < 0.01
    assert sorted(ids) == list(range(n)) and ids[:600] != sorted(ids[:600])


def test_training_rows_alone_decide_the_scale(tmp_path):
    manifest = run(source=write_csv(tmp_path / "d.csv", 700), out=tmp_path / "out", target="rank", task="regression")
    x, y, _ = read(tmp_path / "out")
    names = manifest.feature_names
    np.testing.assert_allclose(x[:, names.index("id")].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(x[:, names.index("id")].std(), 1, rtol=1e-6)
    assert y.shape == (x.shape[0], 1) and abs(y.mean()) < 1e-6 and abs(y.std() - 1) < 1e-6
    raw = y.astype(float) * manifest.target_scale[0] + manifest.target_shift[0]
    np.testing.assert_allclose(raw, np.round(raw), atol=1e-5)
    test_x, _, _ = read(tmp_path / "out", "test")
    assert abs(test_x[:, names.index("id")].mean()) > 1e-6


def test_prediction_gives_the_bits_of_preparation(tmp_path):
    for case, make in CASES.items():
        place = tmp_path / case.replace(" ", "-")
        place.mkdir()
        options = make(place)
        manifest = run(out=place / "out", **options)
        preprocessor = Preprocessor.from_dict(manifest.preprocessing)
        x = "x_train" if case == "pixels" else None
        table = open_table(options["source"], x=x, text=preprocessor.text_columns)
        prepared = {row.tobytes() for split in manifest.splits for row in read(place / "out", split)[0]}
        count = 0
        for start in range(0, min(table.num_rows, 300), 7):
            rows = table.read(start, min(start + 7, table.num_rows))
            if options.get("missing") == "drop":       # one row at a time, so that one that was dropped stays alone
                rows = {k: v[1:2] for k, v in rows.items()}
                if case == "regression" and np.isnan(rows["size"]).any():
                    continue
            try:
                got = preprocessor.transform(rows, table, start)
            except DataError:
                assert options.get("missing") == "drop"
                continue
            assert {row.tobytes() for row in got} <= prepared
            count += len(got)
        assert count >= 3


def test_pixels_stay_pixels_and_the_sources_test_rows_stay_test_rows(tmp_path):
    source = write_pixels(tmp_path / "d.npz")
    manifest = run(source=source, out=tmp_path / "out", test_fraction=0.5)
    x, y, _ = read(tmp_path / "out", "test")
    raw = np.load(source)
    assert x.dtype == np.uint8 and sorted(map(bytes, x)) == sorted(map(bytes, raw["x_test"].reshape(20, 16)))
    train, _, _ = read(tmp_path / "out")
    assert manifest.rows("val") == 5 and len(train) == 45
    scaled = (train - np.array(manifest.load_shift)) * np.array(manifest.load_scale)
    assert abs(scaled.mean()) < 1e-12 and abs(scaled.std() - 1) < 1e-12 and len(set(manifest.load_scale)) == 1


def test_the_seed_decides(tmp_path):
    source = write_csv(tmp_path / "d.csv", 200)
    one, again, other = (run(source=source, out=tmp_path / str(k), target="label", seed=seed).digest()
                         for k, seed in enumerate((1, 1, 2)))
    assert one == again != other


def test_rows_are_taken_from_the_start(tmp_path):
    run(source=write_csv(tmp_path / "d.csv", 200), out=tmp_path / "out", target="label", rows=50, normalize="none",
        test_fraction=0.0, val_fraction=0.0)
    assert sorted(read(tmp_path / "out")[0][:, 0]) == list(range(50))
    assert list(read_manifest(tmp_path / "out").splits) == ["train"]


def test_the_summary_says_what_was_done(tmp_path, capsys):
    run(source=write_csv(tmp_path / "d.csv", 130), out=tmp_path / "out", target="label", weight="weight", shards=200)
    said = capsys.readouterr().out
    for words in ("130 rows, 6 inputs, classification of 2 classes", "kind (3 levels)", "missing values: 22", "size 12",
                  "median", "train", "per class", "classes: no, yes", "standard", "94 training shards instead of 200"):
        assert words in said, said


def test_named_sets_from_a_directory(tmp_path):
    place = tmp_path / "raw"
    place.mkdir()
    random = np.random.default_rng(0)
    for split, n in (("train", 40), ("t10k", 10)):
        for what, values in (("images", random.integers(0, 256, (n, 3, 3))), ("labels", np.arange(n) % 10)):
            values = values.astype(np.uint8)
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (place / f"{split}-{what}-idx{values.ndim}-ubyte").write_bytes(head + values.tobytes())
    manifest = run(source="mnist", out=tmp_path / "mnist", from_dir=place)
    assert manifest.classes == list("0123456789") and manifest.rows("test") == 10 and manifest.x_dtype == "uint8"
    labels = place / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x0c")
    with pytest.raises(DataError, match="row 39: target y is '12'; the classes are 0, 1, 2"):
        run(source="mnist", out=tmp_path / "wrong", from_dir=place)


def put(path, text):
    path.write_text(text)
    return path


def arrays(path, **named):
    np.savez(path, **named)
    return path


X = np.arange(20.0).reshape(10, 2)
MALFORMED = {
    "no target": (lambda p: dict(source=put(p / "d.csv", "a,b\n1,2\n")), ConfigError, "--target; its columns are a, b"),
    "unknown target": (lambda p: dict(source=put(p / "d.csv", "a,b\n1,2\n"), target="c"), DataError, "no column 'c'"),
    "target as input": (lambda p: dict(source=put(p / "d.csv", "a,b\n1,2\n"), target="b", columns=("a", "b")),
                        ConfigError, "it is a target"),
    "only the target": (lambda p: dict(source=put(p / "d.csv", "b\n1\n"), target="b"), DataError, "no column left"),
    "no rows": (lambda p: dict(source=put(p / "d.csv", "a,b\n"), target="b"), DataError, "no rows"),
    "all dropped": (lambda p: dict(source=put(p / "d.csv", "a,b\n,1\n,2\n"), target="b", missing="drop"), DataError,
                    "no row is left"),
    "nothing to train": (lambda p: dict(source=put(p / "d.csv", "a,b\n1,2\n"), target="b", test_fraction=0.9),
                         ConfigError, "no training rows"),
    "infinite": (lambda p: dict(source=put(p / "d.csv", "a,b\n1,2\n1e999,3\n"), target="b"), DataError,
                 r"row 1 \(line 3\), column 'a' is inf"),
    "missing refused": (lambda p: dict(source=put(p / "d.csv", "a,b\n1,2\n,3\n"), target="b", missing="error"),
                        DataError, r"row 1 \(line 3\), column 'a'.*missing"),
    "NaN in numbers": (lambda p: dict(source=arrays(p / "d.npz", x=np.where(X == 7, np.nan, X), y=np.arange(10) % 2)),
                       DataError, "array x: row 3, column 'x1' is nan"),
    "missing target": (lambda p: dict(source=put(p / "d.csv", "a,b\n1,2\n4,\n"), target="b"), DataError,
                       r"row 1 \(line 3\): target b is missing"),
    "fraction as class": (lambda p: dict(source=arrays(p / "d.npz", x=X, y=np.arange(10) / 2), task="classification"),
                          DataError, "row 1: target is 0.5"),
    "negative class": (lambda p: dict(source=arrays(p / "d.npz", x=X, y=np.arange(10) % 3 - 1), task="classification"),
                       DataError, "row 0: target is -1"),
    "NaN as class": (lambda p: dict(source=arrays(p / "d.npz", x=X, y=np.where(np.arange(10) == 4, np.nan, 1.0))),
                     DataError, "row 4: target y is missing or NaN"),
    "text to regress": (lambda p: dict(source=put(p / "d.csv", "a,b\n1,2\n4,five\n"), target="b", task="regression"),
                        DataError, r"row 1 \(line 3\): target 'five' is no number"),
    "labels not 0 or 1": (lambda p: dict(source=arrays(p / "d.npz", x=X, y=X), task="multilabel"), DataError,
                          "must be 0 or 1"),
    "two targets as classes": (lambda p: dict(source=arrays(p / "d.npz", x=X, y=X), task="classification"), ConfigError,
                               "one target column, not 2"),
    "many levels": (lambda p: dict(source=put(p / "d.csv", "a,b\n" + "".join(f"t{i},1\n" for i in range(40))),
                                   target="b", max_levels=8), DataError, "29 different texts; at most 8"),
    "one text among numbers": (lambda p: dict(source=put(p / "d.csv", "a,b\n" + "".join(f"{i},1\n" for i in range(40))
                                                         + "oops,2\n"), target="b", max_levels=8), DataError,
                               r"row 40 \(line 42\), column 'a': 'oops' is no number"),
    "negative weight": (lambda p: dict(source=put(p / "d.csv", "a,b,w\n1,2,1\n3,4,-1\n"), target="b", weight="w"),
                        DataError, r"row 1 \(line 3\): the weight is -1"),
    "unequal lengths": (lambda p: dict(source=arrays(p / "d.npz", x=X, y=np.arange(9))), DataError, "10 rows.*has 9"),
    "no targets": (lambda p: dict(source=arrays(p / "d.npz", x=X)), DataError, "--y"),
    "nowhere": (lambda p: dict(source=p / "nothere.csv", target="b"), InputMissing, "nothere.csv"),
    "misspelt set": (lambda p: dict(source="mnits"), InputMissing, "mnits.*mnist"),
    "option without use": (lambda p: dict(source="mnist", target="label"), ConfigError, "--target is for files"),
    "other option": (lambda p: dict(source=put(p / "d.csv", "a,b\n1,2\n"), target="b", from_dir="/"), ConfigError,
                     "--from-dir is for named"),
    "columns of a matrix": (lambda p: dict(source=arrays(p / "d.npz", x=X, y=X), columns=("x0",)), ConfigError,
                            "--columns needs"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, case):
    make, kind, words = MALFORMED[case]
    options = make(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(kind, match=words) as error:
        run(out=tmp_path / "out", **options)
    assert type(error.value) is kind and isinstance(error.value, HpcmlpError) and "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_taken_place_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(CannotWrite, match="not empty"):
        run(source=tmp_path / "nothere.csv", out=tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]
    (tmp_path / "empty").mkdir()
    run(source=write_csv(tmp_path / "d.csv", 30), out=tmp_path / "empty", target="label")
    assert "dataset.json" in os.listdir(tmp_path / "empty")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    source = write_csv(tmp_path / "d.csv", 300)
    real, calls = os.write, [0]
    for limit in range(0, 14, 3):
        def write(handle, data, limit=limit):
            calls[0] += 1
            if calls[0] > limit:
                raise OSError(28, "No space left on device")
            return real(handle, data)
        calls[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            try:
                run(source=source, out=tmp_path / "out", target="label")
            except CannotWrite as error:
                assert "No space" in str(error)
            else:
                assert limit >= 11
                continue
        assert os.listdir(tmp_path) == ["d.csv"]


def test_the_manifest_is_plain_json_for_other_programs(tmp_path):
    manifest = run(source=write_csv(tmp_path / "d.csv", 60), out=tmp_path / "out", target="label")
    values = json.loads((tmp_path / "out" / "dataset.json").read_text("ascii"))
    assert values["splits"]["train"][0]["file"] == "train-00000-of-00008.h5"
    assert replace(manifest).digest() == manifest.digest()
