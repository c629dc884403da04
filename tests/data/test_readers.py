"""Every format and layout reads as the same table, and unsound files are one sentence."""

import gzip
import os
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest

from hpcmlp.data.readers import expand, open_parts, open_table
from hpcmlp.errors import DataError, InputMissing

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(11, 3)).astype(np.float32), np.arange(11) % 3
IMAGES, LABELS = RANDOM.integers(0, 256, (7, 4, 5)).astype(np.uint8), (np.arange(7) % 3).astype(np.uint8)


def write_idx(path, values, code=8):
    data = bytes([0, 0, code, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    data += values.astype(values.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values


NAMES = [("x", "y"), ("X", "Y"), ("features", "labels"), ("data", "label"), ("inputs", "targets"), ("images", "target")]


@pytest.mark.parametrize("x, y", NAMES)
@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_arrays_are_found_by_habit_and_read_by_range(tmp_path, suffix, x, y):
    path = tmp_path / f"d{suffix}"
    arrays = {x: X, y: Y, "weights": np.ones(11)}
    np.savez(path, **arrays) if suffix == ".npz" else write_hdf5(path, arrays)
    table = open_table(path)
    assert table.matrix and table.num_rows == 11 and table.columns == ("x0", "x1", "x2")
    for start, stop in ((0, 11), (3, 8), (11, 11)):
        rows = table.read(start, stop)
        assert np.array_equal(rows["x"], X[start:stop]) and np.array_equal(rows["y"], Y[start:stop])
        assert rows["weight"].shape == (stop - start,) and rows["x"].dtype == np.float32


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_arrays_are_chosen_by_name(tmp_path, suffix):
    path = tmp_path / f"d{suffix}"
    arrays = {"alpha": X.reshape(11, 3, 1), "beta": np.stack([Y, -Y], axis=1), "x": X * 2, "gamma": X[:, 0]}
    np.savez_compressed(path, **arrays) if suffix == ".npz" else write_hdf5(path, arrays)
    rows = open_table(path, x="alpha", y="beta", weight="gamma").read(0, 11)
    assert np.array_equal(rows["x"], X) and rows["y"].shape == (11, 2) and np.array_equal(rows["weight"], X[:, 0])
    with pytest.raises(DataError, match=r"no array 'delta'; it holds .*beta \(11, 2\)"):
        open_table(path, x="delta")


@pytest.mark.parametrize("spelling", ["x_train y_train x_test y_test", "X_train Y_train X_test Y_test",
                                      "train_features train_targets test_features test_targets",
                                      "train/x train/y test/x test/y"])
def test_splits_in_one_file_are_kept(tmp_path, spelling):
    names = spelling.split()
    values = [X, Y, X[:4], Y[:4]]
    write_hdf5(tmp_path / "d.h5", dict(zip(names, values, strict=True)))
    parts = open_parts(tmp_path / "d.h5")
    assert [(p.split, p.table.num_rows) for p in parts] == [("train", 11), ("test", 4)]
    assert np.array_equal(parts[1].table.read(0, 4)["x"], X[:4])
    with pytest.raises(DataError, match="several splits"):
        open_table(tmp_path / "d.h5")
    assert open_table(tmp_path / "d.h5", x=names[2]).num_rows == 4


def test_compound_data_sets_and_plain_columns_are_tables(tmp_path):
    jets = np.zeros(9, [("pt", "f4"), ("eta", "f2"), ("flavour_label", "i4"), ("name", "S4"), ("hits", "f4", (3,))])
    jets["pt"], jets["name"] = np.arange(9), b"ab"
    write_hdf5(tmp_path / "c.h5", {"jets": jets})
    table = open_table(tmp_path / "c.h5", y="flavour_label")
    assert table.columns == ("pt", "eta", "flavour_label", "name") and "hits" in table.notes[0]
    rows = table.read(2, 5)
    assert rows["pt"].tolist() == [2, 3, 4] and rows["pt"].dtype == np.float64 and rows["name"].tolist() == ["ab"] * 3
    write_hdf5(tmp_path / "p.h5", {"a": np.arange(5), "b": np.arange(5.0)})
    np.savez(tmp_path / "p.npz", a=np.arange(5), b=np.array(["u", "v", "u", "v", "u"]))
    assert open_table(tmp_path / "p.h5").read(1, 3)["a"].tolist() == [1, 2]
    assert open_table(tmp_path / "p.npz").read(1, 3)["b"].tolist() == ["v", "u"]


def test_text_labels_and_big_endian_numbers(tmp_path):
    np.savez(tmp_path / "d.npz", x=X.astype(">f8"), y=np.array(["cat", "dog", "eel"])[Y])
    rows = open_table(tmp_path / "d.npz").read(0, 11)
    assert rows["x"].dtype == np.float64 and rows["x"].dtype.isnative and rows["y"][1] == "dog"


@pytest.mark.parametrize("names", [("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
                                   ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")])
def test_idx_images_find_their_labels(tmp_path, names):
    write_idx(tmp_path / names[0], IMAGES)
    write_idx(tmp_path / names[1], LABELS)
    for place in (tmp_path, tmp_path / names[0]):
        rows = open_table(place).read(2, 6)
        assert np.array_equal(rows["x"], IMAGES[2:6].reshape(4, 20)) and rows["x"].dtype == np.uint8
        assert np.array_equal(rows["y"], LABELS[2:6])
    for old, new in (("train", "t10k"),):
        for name in names:
            os.link(tmp_path / name, tmp_path / name.replace(old, new))
    assert [(p.split, p.table.num_rows) for p in open_parts(tmp_path)] == [("train", 7), ("test", 7)]


def test_other_idx_types(tmp_path):
    for code, dtype in ((9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")):
        values = (np.arange(12).reshape(3, 4) - 5).astype(dtype)
        write_idx(tmp_path / f"a{code}.idx", values, code)
        got = open_table(tmp_path / f"a{code}.idx").read(0, 3)["x"]
        assert np.array_equal(got, values) and got.dtype.isnative


def test_parquet_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"n": [1.5, None, 3.0, 4.0, 5.0], "i": [1, 2, 3, 4, None],
                           "b": [True, False, True, True, False],
                           "t": ["a", None, "c", "d", "e"], "when": pyarrow.array([0] * 5, pyarrow.timestamp("s")),
                           "d": pyarrow.array(["u", "v", "u", "v", "u"]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    got = open_table(tmp_path / "d.parquet")
    assert got.columns == ("n", "i", "b", "t", "d") and "when" in got.notes[0]
    rows = got.read(1, 5)
    np.testing.assert_array_equal(rows["n"], [np.nan, 3, 4, 5])
    np.testing.assert_array_equal(rows["i"], [2, 3, 4, np.nan])
    assert rows["b"].tolist() == [0, 1, 1, 0] and rows["t"].tolist() == [None, "c", "d", "e"]
    assert rows["d"].tolist() == ["v", "u", "v", "u"] and got.read(0, 0)["n"].shape == (0,)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + b"junk" * 20)
    with pytest.raises(DataError, match="bad.parquet"):
        open_table(tmp_path / "bad.parquet")


def test_globs_directories_and_lists_chain_files(tmp_path):
    for k in range(3):
        write_hdf5(tmp_path / f"part{k}.h5", {"x": X[k * 4:k * 4 + 4], "y": Y[k * 4:k * 4 + 4]})
    (tmp_path / "list.txt").write_text("part0.h5\npart1.h5\n\npart2.h5\n")
    for place in (str(tmp_path / "part*.h5"), str(tmp_path / "list.txt")):
        table = open_table(place)
        for start, stop in ((0, 11), (3, 9), (4, 4), (11, 11)):
            rows = table.read(start, stop)
            assert np.array_equal(rows["x"], X[start:stop]) and np.array_equal(rows["y"], Y[start:stop])
        assert table.where(5).startswith(str(tmp_path / "part1.h5")) and table.where(5).endswith("row 1")
    (tmp_path / "list.txt").unlink()
    assert open_table(tmp_path).num_rows == 11


def test_a_virtual_file_over_its_own_directory_is_read(tmp_path):
    write_hdf5(tmp_path / "a.h5", {"x": X})
    layout = h5py.VirtualLayout((11, 3), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "a.h5"), "x", (11, 3))
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    assert np.array_equal(open_table(tmp_path / "v.h5").read(2, 9)["x"], X[2:9])
    (tmp_path / "a.h5").unlink()
    with pytest.raises(DataError, match="takes its values from"):
        open_table(tmp_path / "v.h5").read(0, 11)


def damage(path, kind):
    """Write an unsound file and return it."""
    if kind == "npz garbage":
        path = path / "d.npz"
        path.write_bytes(b"PK\x03\x04" + b"x" * 100)
    elif kind == "npz objects":
        path = path / "d.npz"
        np.savez(path, x=np.array([{}, []], object), allow_pickle=True)
    elif kind == "npz twice":
        path = path / "d.npz"
        np.savez(path, x=X)
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
            archive.writestr("x.npy", b"")
    elif kind == "npz huge":
        path = path / "d.npz"
        with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (2**40, 1)})
    elif kind == "npz bomb":
        path = path / "d.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
            archive.writestr("x.npy", bytes(100_000))
    elif kind == "npz flipped":
        path = path / "d.npz"
        np.savez(path, x=X, y=Y)
        data = bytearray(path.read_bytes())
        data[data.find(X.tobytes()[:16]) + 3] ^= 1
        path.write_bytes(data)
    elif kind == "npz unclosed":                       # numpy raises what tokenize raises
        path = path / "d.npz"
        head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, "
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head)
    elif kind in ("npz wide", "h5 wide"):              # no rows, so no bytes, and names for all columns
        path = path / f"d.{kind[:3].strip()}"
        if kind == "npz wide":
            np.savez(path, x=np.zeros((0, 2**22 + 1), "f4"))
        else:
            with h5py.File(path, "w") as file:
                file.create_dataset("x", (0, 2**22 + 1), "f4", chunks=(1, 1024), maxshape=(None, None))
    elif kind == "idx no dimensions":
        path = path / "d.idx"
        path.write_bytes(bytes([0, 0, 8, 0, 1]))
    elif kind == "idx dimensions":
        path = path / "d.idx"
        path.write_bytes(bytes([0, 0, 8, 255]) + bytes(4 * 255))
    elif kind == "idx no columns":
        path = path / "d.idx"
        path.write_bytes(bytes([0, 0, 8, 4]) + np.array([7, 2**31, 2**31, 0], ">u4").tobytes())
    elif kind == "idx wide":
        path = path / "d.idx"
        path.write_bytes(bytes([0, 0, 8, 3]) + np.array([0, 2**32 - 1, 2**32 - 1], ">u4").tobytes())
    elif kind == "idx bomb":                           # it says that it holds 4 rows
        path = path / "d.idx"
        path.write_bytes(gzip.compress(bytes([0, 0, 8, 2]) + np.array([4, 2], ">u4").tobytes() + bytes(1 << 26), 1))
    elif kind.startswith("idx"):
        path = path / "d.idx"
        write_idx(path, IMAGES)
        data = bytearray(path.read_bytes())
        data = {"idx magic": b"abcd" + data[4:], "idx short": data[:-1], "idx long": data + b"0", "idx cut": data[:9],
                "idx empty": b""}[kind]
        path.write_bytes(data)
    else:
        path = path / "d.h5"
        arrays = {"h5 unequal": {"x": X, "y": Y[:5]}, "h5 vector": {"x": X[:, 0]}, "h5 nothing": {},
                  "h5 two": {"x": X, "data": X}, "h5 other": {"u": X, "v": X}, "h5 no columns": {"x": X[:, :0]},
                  "h5 deep y": {"x": X, "y": X.reshape(11, 3, 1)}}
        write_hdf5(path, arrays.get(kind, {}))
        if kind == "h5 garbage":
            path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"junk" * 50)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind, words", [
    ("npz garbage", "NPZ"), ("npz objects", "Python objects"), ("npz twice", "two arrays"), ("npz huge", "declares"),
    ("npz bomb", "method 12"), ("npz unclosed", "'x' is damaged"), ("npz wide", "4194305 columns; at most"),
    ("h5 wide", "4194305 columns; at most"), ("idx dimensions", "not an idx"),
    ("idx no dimensions", "not an idx"), ("idx wide", "columns; at most"),
    ("idx no columns", "no columns"),
    ("idx bomb", "20 bytes; it has 21 or more"), ("npz flipped", "'x' is damaged"), ("idx magic", "not an idx file"),
    ("idx short", "declares"), ("idx long", "declares"), ("idx cut", "not an idx"), ("idx empty", "not an idx"),
    ("h5 garbage", "not an HDF5 file"), ("h5 unequal", "'x' has 11 rows and 'y' has 5"), ("h5 vector", "dimensions"),
    ("h5 nothing", "no arrays"), ("h5 two", "choose with --x"), ("h5 other", "cannot tell"),
    ("h5 no columns", "no columns"), ("h5 deep y", r"must be \(n,\)")])
def test_an_unsound_file_is_one_sentence(tmp_path, kind, words):
    path = damage(tmp_path, kind)
    with pytest.raises(DataError, match=words) as error:
        table = open_table(path)
        table.read(0, table.num_rows)
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_there_is_named_all_at_once(tmp_path):
    (tmp_path / "list.txt").write_text("a.h5\nb.h5\n")
    with pytest.raises(InputMissing, match="a.h5.*b.h5"):
        expand(tmp_path / "list.txt")
    with pytest.raises(InputMissing, match="no data files"):
        (tmp_path / "empty").mkdir()
        expand(tmp_path / "empty")
    with pytest.raises(InputMissing, match="no file matches"):
        expand(tmp_path / "*.csv")
    with pytest.raises(InputMissing, match="no such file"):
        expand(tmp_path / "nothere")
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="prepared data set already"):
        expand(tmp_path)


def test_files_that_disagree_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("u,v\n1,2\n")
    (tmp_path / "b.csv").write_text("u,w\n1,2\n")
    with pytest.raises(DataError, match="column 1 is 'w'; in .*a.csv it is 'v'"):
        open_table(tmp_path)
    (tmp_path / "b.csv").write_text("u\n1\n")
    with pytest.raises(DataError, match="has 1 columns; .*a.csv has 2"):
        open_table(tmp_path)


def test_a_compressed_idx_file_is_inflated_as_far_as_its_header_says(tmp_path):
    path = damage(tmp_path, "idx bomb")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="or more"):
            open_table(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23        # of the 64 MiB in it
    finally:
        tracemalloc.stop()


def test_an_npz_file_of_python_2_is_read_without_a_word(tmp_path):
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (11L, 3L), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head + X.tobytes())
    assert np.array_equal(open_table(tmp_path / "d.npz").read(0, 11)["x"], X)
