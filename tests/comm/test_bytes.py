"""Bytes that a rank hands to MPI: counted message by message as they start, against what the algorithms promise."""

import os
from functools import partial

import numpy as np
import pytest
from mpi4py import MPI

from hpcmlp.comm import make_ring, ring, ring_wire
from hpcmlp.comm.shared import Shared

# Bytes of 1,024 elements in each half: reduce-scatter of gradients, all-gather of parameters. int8: a scale per 256.
BYTES = {"float32": (4096, 4096), "bf16": (2048, 4096), "float16": (2048, 4096), "int8": (1024 + 4 * 4, 4096)}
WORDS = 16
WORD_BYTES = 8 * WORDS      # a number travels as itself between 2 ranks, else as 4 that add up exactly in any order


class Counter:
    """Bytes of all messages that have been started since the last `take`, by tag."""

    def __init__(self):
        self.sent = {}

    def add(self, tag, num_bytes):
        self.sent[tag] = self.sent.get(tag, 0) + num_bytes

    def take(self):
        """Return (bytes of arrays, bytes of words) and begin anew."""
        sent, self.sent = self.sent, {}
        assert all(tag >= ring.FIRST_TAG for tag in sent)   # a plan's tags: even for data, odd for words
        return tuple(sum(count for tag, count in sent.items() if tag % 2 == odd) for odd in (0, 1))


class CountedSend(MPI.Prequest):
    """A persistent send that counts whenever it is started."""

    def __new__(cls, request, *_):
        return super().__new__(cls, request)

    def __init__(self, _, counter, tag, num_bytes):
        self.counted = counter, tag, num_bytes

    def Start(self):
        self.counted[0].add(*self.counted[1:])
        super().Start()


class CountedPrequest:
    @staticmethod
    def Startall(requests):
        for request in requests:
            if isinstance(request, CountedSend):
                request.counted[0].add(*request.counted[1:])
        MPI.Prequest.Startall(requests)


class CountedMPI:
    """The module mpi4py.MPI, but for the one function that starts requests without asking them."""

    Prequest = CountedPrequest

    def __getattr__(self, name):
        return getattr(MPI, name)


class CountedComm:
    """A communicator for messages between two ranks; anything else that sends is an error here."""

    ALLOWED = {"rank", "size", "Recv_init", "Recv", "Irecv", "Free"}

    def __init__(self, comm, counter):
        self.comm, self.counter = comm, counter

    def Dup(self):
        return CountedComm(self.comm.Dup(), self.counter)

    def Send_init(self, piece, rank, tag):
        return CountedSend(self.comm.Send_init(piece, rank, tag), self.counter, tag, piece.nbytes)

    def __getattr__(self, name):
        if name not in self.ALLOWED:
            raise AttributeError(f"{name} of a counted communicator is not counted yet: count it")
        return getattr(self.comm, name)


@pytest.fixture
def counter(monkeypatch):
    monkeypatch.setattr(ring, "MPI", CountedMPI())
    monkeypatch.setattr(ring_wire, "MPI", CountedMPI())
    return Counter()


def total(comm, value):
    return comm.allreduce(value)


@pytest.mark.mpi
@pytest.mark.parametrize("wire", BYTES)
def test_an_even_ring_sends_two_times_p_minus_1_parts_and_not_a_byte_more(comm, counter, wire):
    """2 (P-1)/P x elements x width, on every rank alike, in the first call and in those that find it prepared."""
    size, blocks = comm.size, 12
    array = np.ones(1024 * blocks * size, np.float32)
    bounds = [1024 * blocks * rank for rank in range(size + 1)]
    made = make_ring(CountedComm(comm, counter), wire)
    first, second = BYTES[wire]
    for _ in range(3):
        array[:] = 1
        made.reduce_scatter(array, bounds)
        assert counter.take() == ((size - 1) * blocks * first, 0)
        made.all_gather(array, bounds)
        assert counter.take() == ((size - 1) * blocks * second, 0)
        np.testing.assert_allclose(array, size, rtol=2e-2)
    if made.narrow:     # what takes the place of the all-gather is as narrow as the first half
        made.gather_towards(array, bounds, array[bounds[made.part]:bounds[made.part + 1]].copy())
        assert counter.take() == ((size - 1) * blocks * first, 0)
    made.reduce_scatter(array, bounds, np.ones(WORDS))
    assert counter.take() == ((size - 1) * blocks * first, (size - 1) * WORD_BYTES * (1 if size <= 2 else 4))
    made.free()


@pytest.mark.mpi
@pytest.mark.parametrize("elements", [1, 2, 3, 1009, 100_003])
def test_an_uneven_ring_sends_every_element_as_often(comm, counter, elements):
    """All ranks together 2 (P-1) x elements x width, however the parts are cut; nobody more than all but the least."""
    size = comm.size
    made = make_ring(CountedComm(comm, counter), limit_bytes=4096, small_bytes=0)
    array = np.ones(elements, np.float32)
    bounds = np.sort(np.random.default_rng([elements, size]).integers(0, elements + 1, size + 1))
    bounds[0], bounds[-1] = 0, elements
    for half in (lambda: made.reduce_scatter(array, bounds), lambda: made.all_gather(array, bounds)):
        half()
        mine, words = counter.take()
        assert words == 0 and mine <= 4 * elements
        assert total(comm, mine) == (size - 1) * 4 * elements
    made.free()


@pytest.mark.mpi
def test_the_node_scheme_sends_its_share_between_nodes_and_nothing_inside(comm, counter, nodes_of):
    """N nodes of L ranks: 2 (N-1)/N x elements/L x width on every rank."""
    size = comm.size
    for per_node in (n for n in range(1, size + 1) if size % n == 0):
        nodes = size // per_node
        topology = nodes_of(per_node)
        topology.cross = CountedComm(topology.cross, counter)
        made = Shared(topology, partial(ring.Ring, small_bytes=0))
        elements = 1024 * size
        array, params = made.empty(elements, np.float32), made.common(elements, np.float32)
        bounds = [1024 * part for part in range(size + 1)]
        for _ in range(2):
            array[:] = 1
            made.reduce_scatter(array, bounds, np.ones(WORDS))
            sent, words = counter.take()
            assert sent == (nodes - 1) * 4096
            assert words == (nodes - 1) * WORD_BYTES * (1 if nodes <= 2 else 4)
            own = slice(bounds[made.part], bounds[made.part + 1])
            np.testing.assert_array_equal(array[own], size)
            params[own] = array[own]
            made.all_gather(params, bounds)
            assert counter.take() == ((nodes - 1) * 4096, 0)
            np.testing.assert_array_equal(params, size)
            comm.Barrier()      # nobody writes his part again before all have looked
        made.free()


def test_the_same_at_8_ranks(run_ranks):
    done = run_ranks(8, "-m", "pytest", "-q", "--only-mpi", "-p", "no:cacheprovider", os.path.abspath(__file__),
                     timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout
