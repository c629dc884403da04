"""When NCCL can be used, what its calls are given, and the stand-in that tests use in its place."""

import types

import numpy as np
import pytest
from mpi4py import MPI

from hpcmlp.comm import nccl
from hpcmlp.comm.nccl import Nccl, OverHost, own_gpus

COMM = MPI.COMM_WORLD


@pytest.mark.mpi
def test_ranks_with_gpus_of_their_own_may_use_it():
    assert own_gpus(COMM, f"uuid-{COMM.rank}", True) == ""


@pytest.mark.mpi(min_size=2)
def test_two_ranks_on_one_gpu_may_not():
    assert own_gpus(COMM, f"uuid-{COMM.rank // 2}", True) == "ranks 0 and 1 share a GPU"


@pytest.mark.mpi
def test_a_rank_without_the_library_is_named():
    assert own_gpus(COMM, f"uuid-{COMM.rank}", COMM.rank != COMM.size - 1) == \
        f"NCCL is not there on rank {COMM.size - 1}"


@pytest.mark.mpi
def test_the_stand_in_sums_and_gathers():
    part, size, rank = 16, COMM.size, COMM.rank
    exchange = OverHost(COMM, part)
    array = np.arange(size * part, dtype=np.float32) + rank
    exchange.sum_parts(array)
    own = slice(rank * part, (rank + 1) * part)
    wanted = size * np.arange(size * part) + sum(range(size))
    assert array[own].tolist() == wanted[own].tolist()
    exchange.gather_parts(array)
    assert array.tolist() == wanted.tolist()
    words = np.full(4, rank + 1.0)
    exchange.sum(words)
    assert words.tolist() == [sum(range(1, size + 1))] * 4
    assert exchange.least(7 - rank) == 7 - (size - 1)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", (bytes, tuple))
def test_calls_are_given_addresses_counts_and_the_stream(monkeypatch, kind):
    calls, made = [], []
    raw = bytes(range(100, 228))
    unique = raw if kind is bytes else tuple(c - 256 if c > 127 else c for c in raw)

    class Communicator:
        def __init__(self, size, data, rank):
            made.append((size, data, rank))

        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, *arguments))

    library = types.SimpleNamespace(NCCL_INT8=0, NCCL_FLOAT32=7, NCCL_FLOAT64=8, NCCL_SUM=0,
                                    get_unique_id=lambda: unique, NcclCommunicator=Communicator)
    monkeypatch.setattr(nccl.importlib, "import_module", lambda name: library)
    exchange = Nccl(COMM, types.SimpleNamespace(ptr=99), 32)
    assert made == [(COMM.size, unique, COMM.rank)]
    array = types.SimpleNamespace(data=types.SimpleNamespace(ptr=4096), size=4, itemsize=4)
    narrow = types.SimpleNamespace(data=types.SimpleNamespace(ptr=8192), size=4, itemsize=2)
    own = 4096 + 4 * 32 * COMM.rank
    exchange.sum_parts(array)
    exchange.sum(array)
    exchange.gather_parts(array)
    exchange.gather_parts(narrow)
    assert calls == [("reduceScatter", 4096, own, 32, 7, 0, 99), ("allReduce", 4096, 4096, 4, 8, 0, 99),
                     ("allGather", own, 4096, 128, 0, 99),
                     ("allGather", 8192 + 64 * COMM.rank, 8192, 64, 0, 99)]
