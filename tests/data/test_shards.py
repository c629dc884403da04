"""Shards come back bit for bit, and damage, attacks and mistakes are refused before a value is used."""

import os
import random
from dataclasses import replace

import h5py
import numpy as np
import pytest

from hpcmlp.data import shards as shards_module
from hpcmlp.data.files import digest_file
from hpcmlp.data.guard import guarded
from hpcmlp.data.links import Refused
from hpcmlp.data.manifest import X_DTYPES, Manifest, ShardEntry
from hpcmlp.data.shards import ShardReader, check_values, shard_image, write_shard
from hpcmlp.errors import CannotWrite, DataError, InputMissing


def make(n=13, d=3, dtype="float32", k=None, weighted=False):
    random_numbers = np.random.default_rng(n + 100 * d)
    x = (random_numbers.random((n, d)) * 100).astype(dtype)
    y = np.arange(n, dtype=np.int32) % 5 if k is None else random_numbers.random((n, k)).astype(np.float32)
    return x, y, np.arange(n, dtype=np.float32) if weighted else None


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
@pytest.mark.parametrize("dtype", X_DTYPES)
def test_a_shard_is_read_back_bit_for_bit(tmp_path, dtype, compression):
    for n, d, k, weighted in ((0, 3, None, False), (1, 1, 2, True), (13, 3, None, True), (997, 17, 1, False)):
        x, y, w = make(n, d, dtype, k, weighted)
        entry = write_shard(tmp_path / "s.h5", x, y, w, {"split": "train"}, compression)
        assert (entry.rows, entry.bytes) == (n, os.path.getsize(tmp_path / "s.h5"))
        with ShardReader(tmp_path / "s.h5", entry) as reader:
            reader.check()
            reader.verify_sha256()
            for start, stop in ((0, n), (n // 3, n // 2), (n, n), (max(0, n - 1), n)):
                got = reader.read(start, stop)
                for a, b in zip(got, (x, y, w), strict=True):
                    assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b[start:stop]))


def test_the_same_arrays_give_the_same_bytes_and_any_program_can_read_them(tmp_path):
    x, y, w = make(50, 4, weighted=True)
    attrs = {"split": "val", "shard": 0, "shards": 1}
    assert shard_image(x, y, w, attrs) == shard_image(x.copy(), y.copy(), w.copy(), attrs)
    write_shard(tmp_path / "s.h5", x, y, w, attrs)
    with h5py.File(tmp_path / "s.h5") as file:
        assert np.array_equal(file["x"], x) and np.array_equal(file["y"], y) and np.array_equal(file["weight"], w)
        assert file["x"].chunks is None and file["x"].dtype == np.dtype("<f4")
        assert file.attrs["hpcmlp_format"] == 1 and file.attrs["split"] == "val"


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CannotWrite, match="s.h5.*No space"):
        write_shard(tmp_path / "s.h5", *make())
    assert os.listdir(tmp_path) == []


def test_a_shard_cut_at_any_length_is_refused(tmp_path):
    entry = write_shard(tmp_path / "s.h5", *make())
    data = (tmp_path / "s.h5").read_bytes()
    for length in (*range(0, len(data), 97), len(data) - 1):
        (tmp_path / "s.h5").write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"truncated: {length} bytes, {len(data)} expected"):
            ShardReader(tmp_path / "s.h5", entry).check()
        # and by the guard alone, when the manifest would not know the length
        reader = ShardReader(tmp_path / "s.h5", replace(entry, bytes=length))
        with pytest.raises(DataError):
            reader.check()
            reader.verify_sha256()


def test_any_flipped_bit_is_found_by_the_digest_and_reading_never_crashes(tmp_path):
    x, y, _ = make(20, 3)
    for compression in (None, "gzip"):
        entry = write_shard(tmp_path / "s.h5", x, y, compression=compression)
        data = bytearray((tmp_path / "s.h5").read_bytes())
        chosen = random.Random(1)
        for _ in range(60):
            place, bit = chosen.randrange(len(data)), 1 << chosen.randrange(8)
            data[place] ^= bit
            (tmp_path / "s.h5").write_bytes(data)
            data[place] ^= bit
            reader = ShardReader(tmp_path / "s.h5", entry)
            with pytest.raises(DataError, match="sha256"):
                reader.verify_sha256()
            try:
                reader.read(0, 20)
            except DataError:
                pass
            reader.close()


def test_a_shard_unlike_its_manifest_is_refused(tmp_path):
    x, y, _ = make(13, 3)
    entry = write_shard(tmp_path / "s.h5", x, y)
    manifest = Manifest("toy", "classification", 3, "float32", ["a", "b", "c"], {"train": (entry,)}, list("abcde"))
    ShardReader(tmp_path / "s.h5", entry).check(manifest)
    for changed, words in ((replace(manifest, num_features=4), r"\(3,\).*\(4,\)"), (replace(manifest, x_dtype="uint8"),
                           "float32.*uint8"), (replace(manifest, weighted=True), "no weights"),
                           (replace(manifest, task="regression", target_names=["u"]), "data set y")):
        with pytest.raises(DataError, match=words):
            ShardReader(tmp_path / "s.h5", entry).check(changed)
    with pytest.raises(DataError, match="13 rows; the manifest says 12"):
        ShardReader(tmp_path / "s.h5", replace(entry, rows=12)).check()
    with pytest.raises(InputMissing, match="gone.h5"):
        ShardReader(tmp_path / "gone.h5", entry).check()
    with pytest.raises(DataError, match="rows 3..14"):
        ShardReader(tmp_path / "s.h5", entry).read(3, 14)


def entry_of(path):
    return ShardEntry(path.name, 13, path.stat().st_size, digest_file(path))


def attack(path, kind):
    """Write a file that would make libhdf5 read elsewhere, allocate without bound, or invent values."""
    secret = path.with_name("secret")
    secret.write_bytes(b"\1" * 1000)
    x, y, _ = make(13, 3)
    with h5py.File(path, "w") as file:
        file["y"] = y
        if kind == "external storage":
            file.create_dataset("x", (13, 3), "f4", external=[(str(secret), 0, 156)])
        elif kind == "external link":
            with h5py.File(path.with_name("other.h5"), "w") as other:
                other["x"] = x
            file["x"] = h5py.ExternalLink(str(path.with_name("other.h5")), "/x")
        elif kind == "soft link":
            file["real"] = x
            file["x"] = h5py.SoftLink("/real")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((13, 3), "f4")
            layout[:] = h5py.VirtualSource("nowhere.h5", "x", (13, 3))
            file.create_virtual_dataset("x", layout)
        elif kind == "never written":
            file.create_dataset("x", (13, 3), "f4")
        elif kind == "huge":
            file.create_dataset("x", (13, 2**45), "f4", chunks=(1, 1024))
        elif kind == "hole":
            file.create_dataset("x", (13, 3), "f4", chunks=(4, 3))[:4] = x[:4]
        elif kind == "bomb":
            file.create_dataset("x", (13, 2**18), "f4", chunks=(13, 2**18), compression="gzip", fillvalue=0)[...] = 0
        elif kind == "chunk of two bytes":             # shorter than its checksum: libhdf5 ends by SIGSEGV on it
            data = file.create_dataset("x", (13, 3), "f4", chunks=(13, 3), fletcher32=True)
            data.id.write_direct_chunk((0, 0), b"ab")
        elif kind == "long chunk":
            data = file.create_dataset("x", (13, 3), "f4", chunks=(13, 3), compression="gzip")
            data.id.write_direct_chunk((0, 0), bytes(5000))
        elif kind == "big chunk":
            file.create_dataset("x", (13, 2**27), "f4", chunks=(1, 2**27))
        elif kind == "objects":
            file.create_dataset("x", (13, 3), h5py.string_dtype())
        elif kind == "reference":
            file.create_dataset("x", (13, 3), h5py.ref_dtype)
        elif kind == "group":
            file.create_group("x")
        elif kind == "no values":
            file["x"] = h5py.Empty("f4")
        elif kind == "vector":
            file["x"] = x[:, 0]
        elif kind == "unequal":
            file["x"] = x[:7]


@pytest.mark.parametrize("kind, words", [
    ("external storage", "keeps its bytes in"), ("external link", "is a link to"), ("soft link", "is a link to"),
    ("virtual", "takes its values from nowhere.h5"), ("never written", "never written"), ("huge", "declares"),
    ("hole", "1 of its 4 chunks"), ("bomb", "inflate"), ("big chunk", "chunks of 536870912 bytes"),
    ("chunk of two bytes", "is not whole"), ("long chunk", "is not whole"),
    ("objects", "plain numbers"), ("reference", "plain numbers"), ("group", "no data set"), ("no values", "no values"),
    ("vector", "shape"), ("unequal", "7 rows"), ("missing", "not there")])
def test_an_attack_is_refused_before_a_read(tmp_path, kind, words):
    path = tmp_path / "s.h5"
    attack(path, kind)
    reader = ShardReader(path, entry_of(path))
    with pytest.raises(DataError, match=words) as error:
        reader.check()
    assert "s.h5" in str(error.value) and "data set" in str(error.value) or "x has shape" in str(error.value)


def test_a_foreign_filter_is_named(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((4,))
        plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((4,)), plist)
    with h5py.File(tmp_path / "s.h5") as file, pytest.raises(Refused, match="filter 32015.*hdf5plugin"):
        guarded(file, "x")


def test_garbage_is_no_hdf5_file(tmp_path):
    for data in (b"", b"hello", os.urandom(5000), b"\x89HDF\r\n\x1a\n" + os.urandom(3000)):
        (tmp_path / "s.h5").write_bytes(data)
        with pytest.raises(DataError, match="not an HDF5 file"):
            ShardReader(tmp_path / "s.h5", entry_of(tmp_path / "s.h5")).check()


def test_bad_values_are_named_by_row_and_column():
    x, y, _ = make(5000, 7)
    check_values("f", x, y, 5)
    for value in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        bad[4321, 5] = value
        with pytest.raises(DataError, match=f"row 4421, column 5 is {value}"):
            check_values("f", bad, y, 5, first=100)
    for label in (-1, 5, 2**31 - 1):
        wrong = y.copy()
        wrong[17] = label
        with pytest.raises(DataError, match=f"row 17 is class {label}; classes are 0 to 4"):
            check_values("f", x, wrong, 5)
    targets = np.ones((5000, 2), np.float32)
    check_values("f", x, targets)
    targets[3, 1] = np.nan
    with pytest.raises(DataError, match="row 3, target 1 is nan"):
        check_values("f", x, targets)
    check_values("f", x[:0], y[:0], 5)


def test_reading_uses_offsets_and_small_pieces_add_up(tmp_path, monkeypatch):
    x, y, _ = make(101, 5)
    entry = write_shard(tmp_path / "s.h5", x, y)
    real = os.preadv
    monkeypatch.setattr(shards_module.os, "preadv", lambda handle, views, at: real(handle, [views[0][:100]], at))
    got, _, _ = ShardReader(tmp_path / "s.h5", entry).read(7, 95)
    assert np.array_equal(got, x[7:95])
