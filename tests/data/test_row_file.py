"""A file filled by offset from several ranks is an ordinary HDF5 file, whole or not there."""

import os

import h5py
import numpy as np
import pytest

from hpcmlp.data.row_file import RowWriter, check_new_file, lay_out, publish
from hpcmlp.errors import CannotWrite

FIELDS = [("label", (), np.dtype("<i4")), ("probability", (3,), np.dtype("<f4")), ("name", (), np.dtype("S5")),
          ("deep", (2, 2), np.dtype("<f8"))]


def fields(n):
    return [(name, (n, *shape), dtype) for name, shape, dtype in FIELDS]


def values(n):
    random = np.random.default_rng(n)
    return {"label": random.integers(-5, 5, n).astype("<i4"), "probability": random.random((n, 3), np.float32),
            "name": np.array([(b"a", b"bcd", "\u00fcl".encode())[k % 3] for k in range(n)], "S5"),
            "deep": random.random((n, 2, 2))}


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1001])
@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_written_in_any_order_stand_in_their_places(tmp_path, n, ranks):
    out, wanted = tmp_path / "out.h5", values(n)
    temporary, offsets = lay_out(out, fields(n), {"step": 7, "run": "r"}, {"classes": ["x", "\u00e9t\u00e9"]})
    for rank in reversed(range(ranks)):
        with RowWriter(temporary, out, offsets) as writer:
            for start in range(n * rank // ranks, n * (rank + 1) // ranks, 4):
                stop = min(start + 4, n * (rank + 1) // ranks)
                for name, whole in wanted.items():
                    writer.write(name, start, whole[start:stop])
            writer.sync()
    publish(temporary, out)
    assert os.listdir(tmp_path) == ["out.h5"]
    with h5py.File(out) as file:
        for name, whole in wanted.items():
            assert file[name].dtype == whole.dtype and file[name].chunks is None
            np.testing.assert_array_equal(file[name][...], whole)
        if n:
            assert file["name"].asstr()[n - 1] == wanted["name"][n - 1].decode()
        assert file["classes"].asstr()[...].tolist() == ["x", "\u00e9t\u00e9"]
        assert file.attrs["step"] == 7 and file.attrs["run"] == "r"


def test_an_existing_file_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out.h5"
    out.write_bytes(b"old")
    with pytest.raises(CannotWrite, match="--force"):
        check_new_file(out)
    temporary, _ = lay_out(out, fields(1), {}, {})
    with pytest.raises(CannotWrite):
        publish(temporary, out)
    assert out.read_bytes() == b"old"
    publish(temporary, out, replace=True)
    assert h5py.is_hdf5(out)


def test_a_link_is_never_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "out.h5").symlink_to(victim)
    with pytest.raises(CannotWrite):
        check_new_file(tmp_path / "out.h5", replace=True)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["missing/out.h5", "."])
def test_impossible_places_are_named(tmp_path, name):
    with pytest.raises(CannotWrite, match="--out"):
        check_new_file(tmp_path / name)


def test_a_failed_layout_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="Object dtype"):
        lay_out(tmp_path / "out.h5", fields(3), {"impossible": object()}, {})
    assert not os.listdir(tmp_path)
    with pytest.raises(CannotWrite):
        lay_out(tmp_path / "missing" / "out.h5", fields(3), {}, {})
