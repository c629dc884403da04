"""What libhdf5 does not survive ends a child process and becomes one sentence."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmlp.data import probe as module
from hpcmlp.data.probe import probe
from hpcmlp.errors import DataError


def test_sound_and_merely_damaged_files_pass(tmp_path):
    with h5py.File(tmp_path / "a b.h5", "w") as file:
        file["x"] = np.ones((3, 2))
    (tmp_path / "damaged.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"junk" * 50)
    probe([tmp_path / "a b.h5", tmp_path / "damaged.h5", tmp_path / "nothere.h5"])
    probe([])


@pytest.mark.parametrize("ending, words", [
    ("kill -SEGV $$", r"second.h5: the HDF5 library crashes opening it \(SIGSEGV\)"),
    ("kill -XCPU $$", "second.h5: the HDF5 library does not come to an end"),
    ("exit 1", "second.h5: the HDF5 library needs more than 4 GiB")])
def test_the_file_that_ends_the_child_is_named(tmp_path, monkeypatch, ending, words):
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\ncat > /dev/null\necho; echo\n{ending}\n")
    child.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(child))
    with pytest.raises(DataError, match=words):
        probe([tmp_path / "first.h5", tmp_path / "second.h5", tmp_path / "third.h5"])


def test_an_endless_read_is_ended(tmp_path, monkeypatch):
    """The limit on processor time is the child's own."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'hpcmlp.data.probe' in sys.orig_argv:\n    import h5py\n    class File:\n"
        "        def __init__(self, *_, **__):\n            while True: pass\n    h5py.File = File\n")
    (tmp_path / "a.h5").write_bytes(b"")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(module.__file__).parents[2]}")
    monkeypatch.setattr(module, "_START_CPU_S", 1)
    monkeypatch.setattr(module, "_FILE_CPU_S", 1)
    with pytest.raises(DataError, match="does not come to an end opening it .2 s of processor time"):
        probe([tmp_path / "a.h5"])
    monkeypatch.setattr(module, "_WALL_FACTOR", 0.1)
    with pytest.raises(DataError, match="could not start|0.2 s of waiting"):
        probe([tmp_path / "a.h5"])
