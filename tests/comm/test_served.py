"""Push and pull as collectives: the bits of a plain ordered sum at the owners, bytes by the formula, versions."""

import numpy as np
import pytest

from hpcmlp.comm import open_exchange
from hpcmlp.comm.served import Roles, Served
from hpcmlp.comm.served_node import ServedOnNode
from hpcmlp.comm.shared import SharedUnavailable
from hpcmlp.errors import RunFailed

WAYS = ("messages", "node memory", "node memory without kernels")


def numbers(rank, length, dtype, seed=0):
    return np.random.default_rng([seed, rank]).standard_normal(length).astype(dtype)


def bounds_of(length, servers, size):
    inner = np.arange(servers + 1) * length // servers
    return np.concatenate([inner, np.full(size - servers, length)])


@pytest.fixture
def served_by(comm, topology, given_back):
    """A function that returns push and pull by one of the WAYS."""
    def make(way, servers):
        if way == "messages":
            return given_back(Served(comm, servers, segment_bytes=4096))
        return given_back(ServedOnNode(topology, servers, fused=way == "node memory"))
    return make


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("length", [0, 1, 7, 1000, 100_003])
@pytest.mark.parametrize("servers", [1, 2, 3, "all"])
@pytest.mark.parametrize("way", WAYS)
def test_owners_get_the_plain_ordered_sum_and_all_get_it_back(comm, way, servers, length, dtype, served_by):
    servers = comm.size if servers == "all" else servers
    if servers > comm.size:
        pytest.skip("more servers than ranks")
    served = served_by(way, servers)
    roles, bounds = served.roles, bounds_of(length, servers, comm.size)
    array, params = served.empty(length, dtype), served.common(length, dtype)
    own = slice(bounds[comm.rank], bounds[comm.rank + 1])
    for turn in range(3):
        array[:] = numbers(comm.rank, length, dtype, turn)
        words = np.array([comm.rank + 0.1, 2.0**-40 * comm.rank])
        served.reduce_scatter(array, bounds, words)
        params[own] = 2 * array[own]
        served.all_gather(params, bounds)
        served.all_gather(array, bounds)
        want = numbers(roles.workers[0], length, dtype, turn)
        for rank in roles.workers[1:]:
            want = want + numbers(rank, length, dtype, turn)
        np.testing.assert_array_equal(array, want)
        np.testing.assert_array_equal(params, 2 * want)
        total = np.array([0.1, 0.0])
        for rank in range(1, comm.size):
            total = total + np.array([rank + 0.1, 2.0**-40 * rank])
        np.testing.assert_array_equal(words, total)


@pytest.mark.mpi
@pytest.mark.parametrize("servers", [1, 2, "all"])
def test_bytes_are_those_of_the_formula(comm, servers):
    servers = comm.size if servers == "all" else servers
    if servers > comm.size:
        pytest.skip("more servers than ranks")
    served = Served(comm, servers, segment_bytes=1024)
    length, size = 12_000 * servers, comm.size
    array, n = np.ones(length, np.float32), 4 * length
    bounds = bounds_of(length, servers, size)
    served.reduce_scatter(array, bounds, np.zeros(9))
    served.all_gather(array, bounds)
    workers = size if servers == size else size - servers
    if servers == size:
        sent = received = 2 * (size - 1) * n // size
    elif comm.rank < servers:
        sent, received = (size - 1) * n // servers, workers * n // servers + (servers - 1) * n // servers
    else:
        sent = received = n
    assert (served.bytes_sent, served.bytes_received) == (sent, received)
    served.free()


@pytest.mark.mpi
@pytest.mark.parametrize("servers", [1, 2, "all"])
def test_in_node_memory_servers_read_what_workers_push_and_nothing_is_sent(comm, servers, served_by):
    servers = comm.size if servers == "all" else servers
    if servers > comm.size:
        pytest.skip("more servers than ranks")
    served, length = served_by("node memory", servers), 12_000 * servers
    array, bounds = served.empty(length, np.float32), bounds_of(length, servers, comm.size)
    served.reduce_scatter(array, bounds, np.zeros(9))
    others = sum(rank != comm.rank for rank in served.roles.workers)
    assert served.bytes_received == (others * 4 * length // servers if comm.rank < servers else 0)
    assert served.bytes_sent == 0
    with pytest.raises(SharedUnavailable, match="make them with"):
        served.reduce_scatter(np.zeros(length, np.float32), bounds)


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_all_reduce_counts_every_rank(comm, way, served_by):
    for servers in range(1, comm.size + 1):
        served = served_by(way, servers)
        value = np.array([1.0 + comm.rank])
        served.all_reduce(value)
        assert value[0] == comm.size * (comm.size + 1) / 2
        long = served.empty(10_001, np.float32)
        long[:] = 1.0 + comm.rank
        served.all_reduce(long)
        assert (long == comm.size * (comm.size + 1) / 2).all()


@pytest.mark.mpi(min_size=2)
def test_on_one_node_a_server_in_step_works_in_its_memory(topology, given_back, monkeypatch):
    def opened(**options):
        exchange = open_exchange("server", topology, 1000, np.float32, **options)
        given_back(exchange.collective)
        return type(exchange.collective), exchange.why, exchange.note

    assert opened() == (ServedOnNode, "in node memory", "")
    assert opened(in_step=False) == (Served, "by messages", "")
    monkeypatch.setattr("hpcmlp.node_memory.free_bytes", lambda: 0)
    kind, why, note = opened()
    assert (kind, why) == (Served, "by messages") and "messages instead of node memory: /dev/shm" in note


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("odd_rank", [0, 1])
def test_a_rank_at_another_version_is_told(comm, odd_rank):
    served = Served(comm, 1)
    array, bounds = np.ones(64, np.float32), bounds_of(64, 1, comm.size)
    served.reduce_scatter(array, bounds, np.zeros(3))
    if comm.rank == odd_rank:
        served.version += 1
    with pytest.raises(RunFailed, match="version"):
        served.reduce_scatter(array, bounds, np.zeros(3))
    served.free()


def test_roles():
    assert list(Roles(1, 4).workers) == [1, 2, 3] and Roles(1, 4).dedicated
    assert [Roles(2, 4).share(rank) for rank in range(4)] == [None, None, (0, 2), (1, 2)]
    assert [Roles(3, 3).share(rank) for rank in range(3)] == [(0, 3), (1, 3), (2, 3)]
    assert Roles(1, 1).share(0) == (0, 1)
