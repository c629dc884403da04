"""Ranks of a node write into an array of one of them; who cannot is known to all."""

import os
import subprocess
import sys

import numpy as np
import pytest

from hpcmlp.comm import reach as module
from hpcmlp.comm.reach import Offered, reach


def offer(comm, root, size, private=False):
    return Offered(size, np.float32, private) if comm.rank == root else None


@pytest.mark.mpi
@pytest.mark.parametrize("size", [1, 7, 5003])
def test_what_every_rank_writes_is_in_the_array_of_the_root(comm, size):
    for root in range(comm.size):
        offered = offer(comm, root, size)
        array, who = reach(comm, offered, size, np.float32, root)
        assert who == [True] * comm.size and array.shape == (size,) and array.dtype == np.float32
        array[comm.rank::comm.size] = comm.rank + 1
        comm.Barrier()
        if comm.rank == root:
            np.testing.assert_array_equal(offered.array, np.arange(size) % comm.size + 1)
        comm.Barrier()


@pytest.mark.mpi
def test_private_arrays_empty_ones_and_systems_without_such_memory_are_reached_by_the_root_alone(comm, monkeypatch):
    alone = [rank == 0 for rank in range(comm.size)]
    for size, private in ((9, True), (0, False)):
        array, who = reach(comm, offer(comm, 0, size, private), size, np.float32)
        assert who == alone and (array is None) == (comm.rank > 0)
    monkeypatch.setattr(module.os, "memfd_create", None)
    with pytest.raises(TypeError):
        Offered(3, np.float32)      # ours: not taken for a system without
    monkeypatch.delattr(module.os, "memfd_create")
    assert reach(comm, offer(comm, 0, 5), 5, np.float32)[1] == alone


@pytest.mark.mpi
def test_a_path_that_is_another_file_here_is_not_touched(comm, tmp_path):
    """As on another node, where the number of the process and the file may belong to anybody."""
    size, offered = 6, offer(comm, 0, 6)
    if comm.rank == 0:
        offered.array[:] = 3
        path, _, name = offered.address.decode().partition(" ")
        offered.address = f"{path} {name[:-1]}x".encode()
    array, who = reach(comm, offered, size, np.float32)
    assert who == [rank == 0 for rank in range(comm.size)]
    if comm.rank == 0:
        assert (offered.array == 3).all()


def test_nothing_stays_open_and_the_array_stays():
    before = os.listdir("/proc/self/fd")
    offered = Offered(4, np.float32)
    array = offered.array
    array[:] = 5
    assert len(os.listdir("/proc/self/fd")) > len(before)
    del offered
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1      # the map's own
    assert (array == 5).all()
    del array
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_another_process_without_the_name_does_not_reach_it():
    offered = Offered(4, np.float32)
    address = offered.address.decode()
    code = ("import sys, numpy; from hpcmlp.comm.reach import _mapped; "
            "print([_mapped(a.encode(), 4, numpy.dtype('f4')) is None for a in sys.argv[1:]])")
    addresses = address, address.replace("memfd:", "memfd:x"), "", "/etc/passwd x"
    told = subprocess.run([sys.executable, "-c", code, *addresses], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[False, True, True, True]"
