"""Checkpoints come back bit for bit, damage is always seen, and a save never harms an older one."""

import hashlib
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmlp.data import files
from hpcmlp.errors import CannotWrite, ConfigError, DataError, InputMissing
from hpcmlp.run import checkpoint, state_file
from hpcmlp.run.sealed import seal
from hpcmlp.run.state_file import State, Streamed

FORMAT_1 = Path(__file__).parent / "format-1"


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def state(step):
    random = np.random.default_rng(step)
    arrays = {"params/layers.0.weight": random.standard_normal((5, 3)).astype(np.float32),
              "params/layers.0.bias": random.standard_normal(5).astype(np.float32),
              "optimizer/m/layers.0.weight": np.zeros((5, 3), np.float32), "empty": np.zeros(0, np.float32)}
    return State({"step": step, "text": "\u00e4 \u6a21", "nested": {"a": [1, 2.5, None]}}, arrays)


def assert_equal(a, b):
    assert a.meta == b.meta and set(a.arrays) == set(b.arrays)
    for name in a.arrays:
        assert a.arrays[name].dtype == b.arrays[name].dtype
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_a_state_comes_back_and_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 30):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000030", "step-00000002"]
    found, notes = checkpoint.newest_good(tmp_path)
    assert notes == []
    assert_equal(found, state(30))
    assert found.group("params").keys() == {"layers.0.weight", "layers.0.bias"}
    assert names(tmp_path) == ["record.json", "step-00000002", "step-00000030"]


def test_the_same_state_gives_the_same_bytes(tmp_path):
    one = checkpoint.save(tmp_path / "a", 5, state(5)) / "state.h5"
    two = checkpoint.save(tmp_path / "b", 5, state(5)) / "state.h5"
    assert one.read_bytes() == two.read_bytes()


def test_the_same_step_saved_again_gets_a_new_name_and_is_the_newer(tmp_path):
    checkpoint.save(tmp_path, 5, state(5))
    assert checkpoint.save(tmp_path, 5, state(6)).name == "step-00000005-2"
    assert_equal(checkpoint.newest_good(tmp_path)[0], state(6))
    assert checkpoint.save(tmp_path, 5, state(7)).name == "step-00000005-3"
    assert_equal(checkpoint.newest_good(tmp_path)[0], state(7))
    assert names(tmp_path) == ["record.json", "step-00000005-3"]


def test_the_best_stays_beside_the_newest(tmp_path):
    for step in range(1, 7):
        saved = state(step)
        saved.meta |= {"has_best": True, "best": {"step": 2 if step < 5 else 5}}
        checkpoint.save(tmp_path, step, saved, keep=1)
        assert names(tmp_path)[1:] == sorted({f"step-{k:08d}" for k in (step, 2 if 2 <= step < 5 else step,
                                                                       5 if step >= 5 else step)})


def test_a_stored_file_of_the_first_format_opens_with_every_value():
    """Written by the program of 2026-11-24: its values, as the HDF5 library itself reads them."""
    model = checkpoint.load_model(FORMAT_1)
    assert model.step == 7 and model.classes == ["ant", "bee", "cat"] and model.spec.sizes == (8, 4, 3)
    assert model.parameters_sha256 == "9d731d84000dc12e98d4d5cfcdb451562e325386536ccf2585d087321c894038"
    found, notes = checkpoint.newest_good(FORMAT_1)
    assert notes == [] and found.meta["step"] == found.meta["progress"]["step"] == 20
    with h5py.File(FORMAT_1 / "checkpoints" / "step-00000020" / "state.h5") as file:
        assert file.attrs["format_version"] == 1
        for path, array in found.arrays.items():
            np.testing.assert_array_equal(array, file[path][...])
    assert {path.split("/")[0] for path in found.arrays} == {"params", "optimizer", "average", "best"}


def test_a_file_of_a_coming_format_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(state_file, "FORMAT_VERSION", 7)
    path = checkpoint.save(tmp_path, 1, state(1))
    with pytest.raises(ConfigError, match="format 7; this program reads 1, 2"):
        checkpoint.read(path)


def test_other_programs_read_the_arrays(tmp_path):
    path = checkpoint.save(tmp_path, 3, state(3))
    with h5py.File(path / "state.h5") as file:
        for name, array in state(3).arrays.items():
            np.testing.assert_array_equal(file[name][...], array)


def test_arrays_that_are_not_contiguous_and_all_types_come_back(tmp_path):
    random = np.random.default_rng(0)
    arrays = {f"a/{k}": random.integers(0, 100, (300, 7)).astype(t)[:, 1:6] for k, t in
              enumerate(("f4", "f8", "i8", "u1", "i2", ">f4"))}
    given = State({"step": 1}, arrays)
    checkpoint.save(tmp_path, 1, given)
    assert_equal(checkpoint.newest_good(tmp_path)[0], given)


def test_what_the_record_names_and_is_gone_is_reported_and_never_started_afresh(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    found, notes = checkpoint.newest_good(tmp_path)
    assert_equal(found, state(1))
    assert len(notes) == 2 and "step-00000002 was saved and is not there" in notes[0]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(DataError, match="step-00000001 was saved and is not there"):
        checkpoint.newest_good(tmp_path)


@pytest.mark.parametrize("name", ["record.json", "step-00000002/manifest.json"])
def test_every_bit_flip_in_the_small_files_is_said_and_the_state_still_taken(tmp_path, name):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    path = tmp_path / "checkpoints" / name
    text = path.read_bytes()
    for at in range(len(text) - 1):
        changed = bytearray(text)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        found, notes = checkpoint.newest_good(tmp_path)
        assert_equal(found, state(2))
        assert len(notes) in (1, 2) and name.split("/")[-1] in notes[0], (at, notes)


def test_set_aside_are_the_newer_ones_only_and_they_count_no_more(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    oldest = checkpoint.list_checkpoints(tmp_path)[-1]
    assert checkpoint.set_aside(tmp_path, oldest) == ["aside-step-00000003", "aside-step-00000002"]
    assert checkpoint.newest_good(tmp_path)[0].meta["step"] == 1 and checkpoint.newest_good(tmp_path)[1] == []
    checkpoint.save(tmp_path, 2, state(2), keep=1)
    assert checkpoint.set_aside(tmp_path, None) == ["aside-step-00000002.2"]
    assert checkpoint.newest_good(tmp_path) == (None, [])


def test_a_damaged_newest_one_never_costs_the_only_good_one(tmp_path):
    """With keep=1: fallen back from step 9 to 5, the save of step 7 must not be the one that is deleted."""
    checkpoint.save(tmp_path, 5, state(5), keep=2)
    damaged = checkpoint.save(tmp_path, 9, state(9), keep=2)
    (damaged / "state.h5").write_bytes(b"no")
    path, found, _ = checkpoint.find_newest(tmp_path)
    assert found.meta["step"] == 5
    checkpoint.set_aside(tmp_path, path)
    checkpoint.save(tmp_path, 7, state(7), keep=1)
    assert_equal(checkpoint.newest_good(tmp_path)[0], state(7))


@pytest.mark.parametrize("with_manifest", [True, False])
def test_every_flipped_byte_and_every_length_is_noticed(tmp_path, with_manifest):
    checkpoint.save(tmp_path, 1, state(1))
    path = checkpoint.save(tmp_path, 2, state(2), keep=5)
    if not with_manifest:
        (path / "manifest.json").unlink()
        assert_equal(checkpoint.read(path), state(2))
    image = (path / "state.h5").read_bytes()
    random = np.random.default_rng(0)
    for at in random.integers(0, len(image), 150):
        changed = bytearray(image)
        changed[at] ^= 1 << int(random.integers(0, 8))
        (path / "state.h5").write_bytes(changed)
        found, notes = checkpoint.newest_good(tmp_path)
        if with_manifest:
            assert found.meta["step"] == 1 and len(notes) == 2 and "damaged" in notes[0]
        elif found.meta["step"] == 2:  # without the manifest a flip in unused bytes may pass, never one in data
            assert_equal(found, state(2))
    for length in (0, 1, 7, 96, len(image) // 2, len(image) - 1):
        (path / "state.h5").write_bytes(image[:length])
        assert checkpoint.newest_good(tmp_path)[0].meta["step"] == 1


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path):
    path = checkpoint.save(tmp_path, 1, state(1))
    (path / "state.h5").write_bytes(b"garbage")
    with pytest.raises(DataError, match="no checkpoint is whole"):
        checkpoint.newest_good(tmp_path)
    assert (path / "state.h5").read_bytes() == b"garbage"
    assert checkpoint.newest_good(tmp_path / "none") == (None, [])
    with pytest.raises(InputMissing):
        checkpoint.load_model(tmp_path / "none")


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
def test_a_failing_system_call_leaves_the_older_checkpoint_and_no_rubbish(tmp_path, monkeypatch, call):
    checkpoint.save(tmp_path, 1, state(1))

    working = getattr(files.os, call)

    def fail(*arguments, **named):
        if call == "open" and not arguments[1] & files.os.O_CREAT:
            return working(*arguments, **named)  # looking into a directory still works on a full disk
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, fail)
        with pytest.raises(CannotWrite, match="[Nn]o space left"):
            checkpoint.save(tmp_path, 2, state(2))
    assert_equal(checkpoint.newest_good(tmp_path)[0], state(1))
    assert names(tmp_path) == ["record.json", "step-00000001"]


def test_leftovers_of_a_killed_save_are_removed_and_never_read(tmp_path):
    checkpoint.save(tmp_path, 1, state(1))
    half = tmp_path / "checkpoints" / ".step-00000002.0badf00d.partial"
    half.mkdir()
    (half / "state.h5").write_bytes(b"half")
    assert checkpoint.newest_good(tmp_path)[0].meta["step"] == 1
    checkpoint.remove_leftovers(tmp_path)
    assert not half.exists()


def streamed(step, taken=None):
    """The state of which arrays come one by one; `taken` counts them."""
    arrays, taken = state(step).arrays, [] if taken is None else taken
    return Streamed(state(step).meta, {name: a.shape for name, a in arrays.items()},
                    lambda: (taken.append(name) or (name, array) for name, array in arrays.items()))


def test_what_comes_array_by_array_makes_the_bytes_of_any_other_state(tmp_path):
    taken = []
    one = checkpoint.save(tmp_path / "a", 4, streamed(4, taken))
    other = checkpoint.save(tmp_path / "b", 4, state(4))
    assert (one / "state.h5").read_bytes() == (other / "state.h5").read_bytes()
    assert (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()
    assert taken == 2 * list(state(4).arrays)
    assert_equal(checkpoint.newest_good(tmp_path / "a")[0], state(4))


def test_a_manifest_of_before_there_were_pieces_is_compared_as_well(tmp_path):
    path = checkpoint.save(tmp_path, 4, state(4))
    image = (path / "state.h5").read_bytes()
    manifest = {"format_version": 2, "step": 4, "bytes": len(image), "sha256": hashlib.sha256(image).hexdigest()}
    (path / "manifest.json").write_bytes(seal(manifest))
    assert_equal(checkpoint.read(path), state(4))
    changed = bytearray(image)
    changed[len(image) // 2] ^= 1
    (path / "state.h5").write_bytes(changed)
    with pytest.raises(DataError, match="sha256 differs"):
        checkpoint.read(path)


def test_a_mapped_state_is_the_same_and_as_well_looked_at(tmp_path):
    path = checkpoint.save(tmp_path, 4, streamed(4))
    found, mapped, notes = checkpoint.find_newest(tmp_path, mapped=True)
    assert found == path and notes == []
    assert_equal(mapped, state(4))
    raw = bytearray((path / "state.h5").read_bytes())
    at = raw.find(state(4).arrays["params/layers.0.weight"].tobytes())
    raw[at + 3] ^= 1
    (path / "state.h5").write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        checkpoint.find_newest(tmp_path, mapped=True)


def test_a_full_disk_stops_a_streamed_save_and_harms_no_older_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 3, streamed(3))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_file.os, "pwrite", full)
    with pytest.raises(CannotWrite, match="No space left"):
        checkpoint.save(tmp_path, 4, streamed(4))
    assert names(tmp_path) == ["record.json", "step-00000003"]
