"""Shared memory inside a node, ring between nodes: the plain sum, the same bits everywhere, one copy where promised."""

import os
import time

import numpy as np
import pytest
from mpi4py import MPI

from hpcmlp.comm import shared
from hpcmlp.comm.shared import STAGE_BYTES, Shared, SharedUnavailable
from hpcmlp.comm.topology import Topology

LENGTHS = [0, 1, 3, 4, 5, 997, 40000]


@pytest.fixture
def topologies(comm, topology, nodes_of):
    """All ways of cutting the ranks into equal nodes, one node first."""
    return [topology] + [nodes_of(n) for n in range(1, comm.size) if comm.size % n == 0]


def numbers(rank, length, dtype):
    return np.random.default_rng([rank, length]).standard_normal(length).astype(dtype)


def bounds_of(length, size):
    cuts = np.arange(size + 1) * length // size
    if size > 2:
        cuts[1] = cuts[2]  # an empty part
    return cuts


def everywhere_equal(comm, array):
    all_arrays = np.empty((comm.size, array.nbytes), np.uint8)
    comm.Allgather(np.ascontiguousarray(array).view(np.uint8), all_arrays)
    return (all_arrays == all_arrays[0]).all()


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("length", LENGTHS)
def test_reduce_scatter_and_all_gather_give_the_plain_sum(comm, length, dtype, topologies):
    expected = sum(numbers(r, length, dtype).astype(np.float64) for r in range(comm.size))
    for topology in topologies:
        collective = Shared(topology)
        array = collective.empty(length, dtype)
        bounds = bounds_of(length, comm.size)
        for _ in range(2):  # the second round uses prepared plans
            array[:] = numbers(comm.rank, length, dtype)
            words = np.array([1.0, comm.rank, 0.25])
            collective.reduce_scatter(array, bounds, words)
            own = slice(bounds[collective.part], bounds[collective.part + 1])
            np.testing.assert_allclose(array[own], expected[own], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(words, [comm.size, comm.size * (comm.size - 1) / 2, comm.size / 4])
            collective.all_gather(array, bounds)
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)
            assert array.dtype == dtype and everywhere_equal(comm, array)
            comm.Barrier()
        collective.free()


@pytest.mark.mpi
@pytest.mark.parametrize("length", [0, 1, 5, 1000, STAGE_BYTES // 4 + 5])
def test_ordinary_arrays_are_summed_too(comm, length, topology):
    collective = Shared(topology)
    array = numbers(comm.rank, length, np.float32)
    collective.all_reduce(array)
    expected = sum(numbers(r, length, np.float32).astype(np.float64) for r in range(comm.size))
    np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)
    assert everywhere_equal(comm, array)
    collective.broadcast(array, comm.size - 1)
    collective.free()


@pytest.mark.mpi
def test_a_common_array_exists_once_per_node(comm, topologies):
    for topology in topologies:
        collective = Shared(topology)
        array = collective.common(1000, np.float32)
        bounds = bounds_of(1000, comm.size)
        array[bounds[collective.part]:bounds[collective.part + 1]] = collective.part
        collective.all_gather(array, bounds)
        for part in range(comm.size):
            assert (array[bounds[part]:bounds[part + 1]] == part).all()
        comm.Barrier()
        if topology.local_rank == 0:
            array[0] = 7.5
        comm.Barrier()
        assert array[0] == 7.5  # one memory, not copies
        comm.Barrier()
        collective.free()


@pytest.mark.mpi
def test_parts_belong_to_one_rank_each(comm, topologies):
    for topology in topologies:
        collective = Shared(topology)
        parts = np.zeros(comm.size, np.int64)
        comm.Allgather(np.array([collective.part]), parts)
        assert sorted(parts) == list(range(comm.size))
        collective.free()


@pytest.mark.mpi
def test_too_little_shared_memory_is_said_on_all_ranks(comm, monkeypatch, topology):
    collective = Shared(topology)
    if comm.rank == 0:  # only the rank that looks sees it
        monkeypatch.setattr(shared.node_memory, "free_bytes", lambda: 0)
    with pytest.raises(SharedUnavailable, match="MiB"):
        collective.empty(1 << 20, np.float32)
    collective.free()


@pytest.mark.mpi(min_size=3)
def test_uneven_nodes_are_refused_on_all_ranks(comm, nodes_of):
    topology = nodes_of(comm.size - 1)
    with pytest.raises(SharedUnavailable, match="different numbers"):
        Shared(topology)


@pytest.mark.mpi
def test_memory_is_given_back(comm):
    def mapped():
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)

    for turn in range(20):
        topology = Topology(comm)
        collective = Shared(topology)
        collective.empty(1 << 16, np.float32)
        collective.free()
        topology.free()
        if turn == 4:
            before = mapped()
    assert mapped() <= before + 10  # three windows a turn would have added 45


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_with_and_without_c_kernels_the_bits_are_the_same(comm, dtype, topologies):
    # Mixed magnitudes show the order of a sum; denormal numbers show flushing.
    random = np.random.default_rng(comm.rank)
    tiny = np.finfo(dtype).tiny
    for topology in topologies:
        for length in (1, 7, 2047, 2049, STAGE_BYTES // 4 + 1, 70_001):
            values = (random.standard_normal(length) * 10.0 ** random.integers(-6, 7, length)).astype(dtype)
            values[:length // 3] = tiny * random.random(length // 3)
            control, results = random.standard_normal(5), []
            for fused in (True, False):
                collective = Shared(topology, fused=fused)
                array, words = collective.empty(length, dtype), control.copy()
                array[:] = values
                collective.all_reduce(array, words)
                every, summed = array.copy(), words.copy()
                bounds = bounds_of(length, comm.size)
                collective.all_gather(array, bounds)    # nobody reads this array any more
                array[:] = values
                collective.reduce_scatter(array, bounds)
                own = array[bounds[collective.part]:bounds[collective.part + 1]].copy()
                results.append((every.tobytes(), summed.tobytes(), own.tobytes()))
                collective.free()
            assert results[0] == results[1]


@pytest.mark.mpi
def test_a_rank_that_comes_late_is_waited_for(comm, topology):
    # Longer than a rank looks (0.2 ms), longer than it looks before it sleeps (5 ms), and every rank once.
    collective = Shared(topology)
    for pause in (0.0, 0.001, 0.02):
        for late in range(comm.size):
            if comm.rank == late:
                time.sleep(pause)
            array = np.full(3, comm.rank + 1.0)
            collective.all_reduce(array)
            assert (array == comm.size * (comm.size + 1) / 2).all()
    collective.free()


@pytest.mark.mpi
def test_many_meetings_keep_ranks_in_step(comm, topology):
    """Ranks that come at changing times never see a number of an earlier or later call."""
    collective = Shared(topology)
    collective._turn = 2**32 - 150      # the counters start anew on the way
    collective._marks[collective.local_rank, 0] = 2**32 - 150
    comm.Barrier()
    array, big = np.zeros(2), collective.empty(5000, np.float32)
    for call in range(300):
        if (call + comm.rank) % 7 == 0:
            os.sched_yield()
        array[:] = call
        collective.all_reduce(array)
        assert (array == comm.size * call).all()
        if call % 10 == 0:
            big[:] = call
            collective.all_reduce(big)
            assert (big == comm.size * call).all()
    collective.free()


@pytest.mark.mpi
def test_a_message_under_way_does_not_stop_a_meeting(comm, topology):
    """A rank that waits on the node lets MPI go on, or a large message of its own would never leave it."""
    collective = Shared(topology)
    out, into = np.full(1 << 18, float(comm.rank)), np.empty(1 << 18)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    requests = [comm.Isend(out, right), comm.Irecv(into, left)]
    if comm.rank % 2:
        MPI.Request.Waitall(requests)
    collective.all_reduce(np.zeros(1))
    MPI.Request.Waitall(requests)
    assert (into == left).all()
    collective.free()
