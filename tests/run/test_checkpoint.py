"""Checkpoints come back bit for bit, damage is always seen, and a save never harms an older one."""

import numpy as np
import pytest

from hpcmlp.data import files
from hpcmlp.errors import CannotWrite, DataError, InputMissing
from hpcmlp.run import checkpoint
from hpcmlp.run.checkpoint import State


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
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000030"]


def test_the_same_state_gives_the_same_bytes(tmp_path):
    one = checkpoint.save(tmp_path / "a", 5, state(5)) / "state.h5"
    two = checkpoint.save(tmp_path / "b", 5, state(5)) / "state.h5"
    assert one.read_bytes() == two.read_bytes()


def test_the_same_step_may_be_saved_again(tmp_path):
    checkpoint.save(tmp_path, 5, state(5))
    checkpoint.save(tmp_path, 5, state(6))
    assert_equal(checkpoint.newest_good(tmp_path)[0], state(6))


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
            assert found.meta["step"] == 1 and len(notes) == 1 and "damaged" in notes[0]
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
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_leftovers_of_a_killed_save_are_removed_and_never_read(tmp_path):
    checkpoint.save(tmp_path, 1, state(1))
    half = tmp_path / "checkpoints" / ".step-00000002.0badf00d.partial"
    half.mkdir()
    (half / "state.h5").write_bytes(b"half")
    assert checkpoint.newest_good(tmp_path)[0].meta["step"] == 1
    checkpoint.remove_leftovers(tmp_path)
    assert not half.exists()
