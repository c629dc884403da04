"""Links and virtual data sets lead to plain data inside the directory, or are refused before anything is opened."""

import os
import signal
from contextlib import contextmanager

import h5py
import numpy as np
import pytest

from hpcmlp.data.guard import guarded
from hpcmlp.data.links import Refused, follow, link_kind
from hpcmlp.data.readers import open_table
from hpcmlp.errors import DataError

X = np.arange(12, dtype=np.float32).reshape(4, 3)


@contextmanager
def seconds(limit):
    """Fail instead of hanging."""
    def stop(*_):
        raise AssertionError(f"hangs for more than {limit} s")
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def anywhere(path):
    return True


def test_a_link_to_a_pipe_is_refused_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")                       # whoever opens it to read waits for a writer
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "pipe"), "/x")
    with h5py.File(tmp_path / "a.h5") as file, seconds(20):
        assert link_kind(file, "x") == "external" and link_kind(file, "z") is None
        with pytest.raises(Refused, match="is a link to .*pipe"):
            guarded(file, "x")
    with pytest.raises(DataError, match="no arrays"), seconds(20):
        open_table(tmp_path / "a.h5")


def test_a_chain_of_links_that_leaves_the_directory_is_refused_at_its_last_link(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = X
    with h5py.File(inside / "second.h5", "w") as file:
        file["x"] = h5py.ExternalLink("../secret.h5", "/x")
        file["own"] = X + 1
    with h5py.File(inside / "first.h5", "w") as file:
        file["x"] = h5py.ExternalLink("second.h5", "/x")
        file["inputs"] = h5py.ExternalLink("second.h5", "/own")
    table = open_table(inside / "first.h5")
    assert np.array_equal(table.read(0, 4)["x"], X + 1)             # the sound one is what is seen
    with h5py.File(inside / "first.h5") as file:
        with pytest.raises(Refused, match="is a link to '../secret.h5'"):
            follow(file, "x", lambda path: os.path.realpath(path).startswith(f"{inside}/"))
        assert np.array_equal(follow(file, "x", anywhere)[...], X)


def test_links_that_go_round_end(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = h5py.SoftLink("/y")
        file["y"] = h5py.SoftLink("x")
    with h5py.File(tmp_path / "a.h5") as file, pytest.raises(Refused, match="more than 8 links"):
        follow(file, "x", anywhere)


def test_groups_that_hold_themselves_are_visited_once(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = X
        group = file.create_group("g")
        for k in range(60):
            group[f"back{k}"] = group
            group[f"root{k}"] = file["/"]
    with seconds(60):
        assert open_table(tmp_path / "a.h5").num_rows == 4


def virtual(path, source, rows=4, mapped=4):
    layout = h5py.VirtualLayout((rows, 3), "f4")
    layout[:mapped] = h5py.VirtualSource(source, "x", (mapped, 3))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)


@pytest.mark.parametrize("kind, words", [("itself", "takes its values from x of ., which takes its values from"),
                                         ("each other", "which takes its values from"),
                                         ("holes", "takes only 12 of its 30 values"),
                                         ("no such array", "which is not there")])
def test_a_virtual_data_set_stands_on_plain_ones_without_holes(tmp_path, kind, words):
    path = tmp_path / "a.h5"
    if kind == "itself":                               # libhdf5 ends by SIGSEGV on it
        virtual(path, ".")
    elif kind == "each other":
        virtual(path, "b.h5")
        virtual(tmp_path / "b.h5", "a.h5")
    else:
        with h5py.File(tmp_path / "b.h5", "w") as file:
            file["other" if kind == "no such array" else "x"] = X
        virtual(path, "b.h5", 10 if kind == "holes" else 4)
    with h5py.File(path) as file, pytest.raises(Refused, match=words):
        guarded(file, "x", outside=anywhere)
