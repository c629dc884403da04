"""Ranks tell each other which GPUs they see and take one each."""

import pytest

from hpcmlp.comm.messages import all_gather_bytes
from hpcmlp.errors import Unavailable
from hpcmlp.ops import device
from hpcmlp.run.gpus import open_arithmetic


def taken(comm, monkeypatch, own):
    """The identities that the ranks take when this one sees `own`, and the note."""
    monkeypatch.setenv("HPCMLP_GPU", "emulated")
    monkeypatch.setattr(device, "see_gpus", lambda: own)
    ops, note = open_arithmetic("gpu", comm)
    return [text.decode() for text in all_gather_bytes(comm, ops.identity.encode())], note


@pytest.mark.mpi
def test_every_rank_takes_its_own_whatever_it_sees(comm, monkeypatch):
    names = [f"gpu {rank}" for rank in range(comm.size)]
    for own in (names, names[comm.rank:comm.rank + 1], names[:comm.size - comm.rank], names[comm.rank:]):
        found, note = taken(comm, monkeypatch, own)
        assert sorted(found) == names and note == ""


@pytest.mark.mpi(min_size=2)
def test_ranks_that_must_share_say_so_on_every_rank(comm, monkeypatch):
    found, note = taken(comm, monkeypatch, ["the only one"])
    assert set(found) == {"the only one"} and f"ranks 0-{comm.size - 1} (" in note and "--gpus-per-task=1" in note


@pytest.mark.mpi
def test_a_rank_without_a_gpu_is_everybodys_error(comm, monkeypatch):
    def see():
        if comm.rank == comm.size - 1:
            raise Unavailable("no GPU here")
        return ["a"]
    monkeypatch.setattr(device, "see_gpus", see)
    with pytest.raises(Unavailable, match="no GPU here"):
        open_arithmetic("gpu", comm)


def test_the_host_needs_no_word_with_anybody():
    ops, note = open_arithmetic("cpu", None)
    assert ops.xp.__name__ == "numpy" and note == ""
