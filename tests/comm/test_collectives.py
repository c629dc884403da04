"""One table for every collective: dtype x length x words x algorithm, against the plain float64 sum."""

import numpy as np
import pytest
from mpi4py import MPI

from hpcmlp.comm import COLLECTIVES, Collective, make_collective
from hpcmlp.comm.native import Native
from hpcmlp.comm.ring import Ring
from hpcmlp.comm.shared import Shared
from hpcmlp.errors import ConfigError

# Beside the plain forms: messages so small that every part is cut many times; all in one call of MPI; no C kernels.
MAKERS = {
    "ring": lambda topology: Ring(topology.comm),
    "ring cut": lambda topology: Ring(topology.comm, limit_bytes=64, small_bytes=0),
    "ring together": lambda topology: Ring(topology.comm, small_bytes=2**30),
    "native": lambda topology: Native(topology.comm),
    "native cut": lambda topology: Native(topology.comm, limit_bytes=64),
    "shared": Shared,
    "shared numpy": lambda topology: Shared(topology, fused=False),
}
LENGTHS = ("0", "1", "size-1", "size", "size+1", "prime", "large")


def length(name, size):
    return {"0": 0, "1": 1, "size-1": size - 1, "size": size, "size+1": size + 1, "prime": 1009, "large": 100_003}[name]


@pytest.fixture(params=MAKERS)
def collective(request, topology, given_back):
    made = given_back(MAKERS[request.param](topology))
    made.name = request.param
    return made


def numbers(comm, n, dtype, seed=0):
    """This rank's array and, in float64, the plain sum over the ranks."""
    every = [np.random.default_rng([seed, n, rank]).standard_normal(n).astype(dtype) for rank in range(comm.size)]
    return every[comm.rank].copy(), np.sum([a.astype(np.float64) for a in every], axis=0)


def placed(collective, array):
    """The same numbers in memory that the collective has made: shared memory, where it uses that."""
    made = collective.empty(array.size, array.dtype)
    made[:] = array
    return made


def uneven(n, size, seed=0):
    """Bounds of parts of any lengths, some empty, that do not begin at 0."""
    inner = np.sort(np.random.default_rng([seed, n, size]).integers(n // 7, n + 1, size + 1))
    return inner


def tolerance(dtype):
    return dict(rtol=1e-5, atol=1e-5) if dtype == np.float32 else dict(rtol=1e-13, atol=1e-13)


def assert_same_bits_everywhere(comm, array):
    every = comm.allgather(array.tobytes())
    assert all(one == every[0] for one in every)


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("num_words", [None, 7])
def test_all_reduce_is_the_sum_with_the_same_bits_on_every_rank(comm, collective, dtype, name, num_words):
    n = length(name, comm.size)
    if "cut" in collective.name:
        n = min(n, 203)
    array, expected = numbers(comm, n, dtype)
    array = placed(collective, array)
    words, expected_words = (None, None) if num_words is None else numbers(comm, num_words, np.float64, seed=1)
    collective.all_reduce(array, words)
    assert array.dtype == dtype
    np.testing.assert_allclose(array, expected, **tolerance(dtype))
    assert_same_bits_everywhere(comm, array)
    if words is not None:
        np.testing.assert_allclose(words, expected_words, rtol=1e-15, atol=1e-15)
        assert_same_bits_everywhere(comm, words)


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 5, 1009, 65_537])
def test_reduce_scatter_and_all_gather_keep_to_any_bounds(comm, collective, dtype, n):
    if "cut" in collective.name:
        n = min(n, 203)
    bounds = uneven(n, comm.size)
    array, expected = numbers(comm, n, dtype)
    array = placed(collective, array)
    before = array.copy()
    words, expected_words = numbers(comm, 3, np.float64, seed=2)
    collective.reduce_scatter(array, bounds, words)
    own = slice(bounds[comm.rank], bounds[comm.rank + 1])
    np.testing.assert_allclose(array[own], expected[own], **tolerance(dtype))
    np.testing.assert_allclose(words, expected_words, rtol=1e-15, atol=1e-15)
    assert_same_bits_everywhere(comm, words)
    # A list of Python integers is as good as an array of bounds.
    collective.all_gather(array, [int(bound) for bound in bounds])
    inside = slice(bounds[0], bounds[-1])
    np.testing.assert_allclose(array[inside], expected[inside], **tolerance(dtype))
    assert_same_bits_everywhere(comm, array[inside])
    np.testing.assert_array_equal(array[:bounds[0]], before[:bounds[0]])
    np.testing.assert_array_equal(array[bounds[-1]:], before[bounds[-1]:])


@pytest.mark.mpi
def test_one_rank_may_own_everything(comm, collective):
    for owner in range(comm.size):
        bounds = [0] * (owner + 1) + [101] * (comm.size - owner)
        array, expected = numbers(comm, 101, np.float32)
        collective.reduce_scatter(array, bounds)
        if comm.rank == owner:
            np.testing.assert_allclose(array, expected, **tolerance(np.float32))
        collective.all_gather(array, bounds)
        assert_same_bits_everywhere(comm, array)


@pytest.mark.mpi
def test_repeated_calls_give_the_same_bits(comm, collective):
    for n in (1009, 2003 if "cut" in collective.name else 50_003):
        array, _ = numbers(comm, n, np.float32)
        first = placed(collective, array)
        collective.all_reduce(first)
        for _ in range(3):
            again = placed(collective, array)
            collective.all_reduce(again)
            assert again.tobytes() == first.tobytes()


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int32])
def test_broadcast_copies_from_every_root(comm, collective, dtype):
    for root in range(comm.size):
        for n in (0, 1, 501):
            array = np.full(n, comm.rank + 1, dtype)
            collective.broadcast(array, root)
            assert (array == root + 1).all()


@pytest.mark.mpi
def test_words_are_the_same_on_every_rank_where_floating_sums_depend_on_the_order(comm, collective):
    rng = np.random.default_rng(comm.rank)
    words = rng.standard_normal(500) * 10.0 ** rng.integers(-6, 7, 500)
    every = comm.allgather(words.copy())
    collective.reduce_scatter(np.zeros(16, np.float32), [16 * r // comm.size for r in range(comm.size + 1)], words)
    assert_same_bits_everywhere(comm, words)
    np.testing.assert_allclose(words, np.sum(every, axis=0), rtol=1e-12, atol=1e-12)


@pytest.mark.mpi
def test_words_that_are_whole_numbers_are_exact(comm, collective):
    words = np.array([2.0**53 - comm.size, 1.0, 0.0, -3.0, 2.0**31]) / (1 if comm.size == 1 else 4)
    words = np.floor(words)
    expected = words * comm.size
    collective.all_reduce(np.zeros(1, np.float32), words)
    np.testing.assert_array_equal(words, expected)


@pytest.mark.mpi
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_word_that_is_not_finite_on_one_rank_is_not_finite_on_all(comm, collective, bad):
    words = np.array([1.0, bad if comm.rank == comm.size - 1 else 1.0])
    with np.errstate(invalid="ignore"):
        collective.all_reduce(np.zeros(8, np.float32), words)
    assert words[0] == comm.size and not np.isfinite(words[1])


@pytest.mark.mpi
def test_not_finite_gradients_reach_every_rank(comm, collective):
    array = np.ones(64, np.float32)
    if comm.rank == 0:
        array[5] = np.nan
    collective.all_reduce(array)
    assert np.isnan(array[5]) and (np.delete(array, 5) == comm.size).all()


@pytest.mark.mpi
def test_ring_agrees_with_native_to_the_bit_where_sums_are_exact(comm):
    ring, native = Ring(comm), Native(comm)
    whole = np.random.default_rng(comm.rank).integers(-1000, 1000, 5003).astype(np.float32)
    a, b = whole.copy(), whole.copy()
    ring.all_reduce(a)
    native.all_reduce(b)
    assert a.tobytes() == b.tobytes()
    ring.free()
    native.free()


@pytest.mark.mpi
def test_table_of_collectives(comm, topology):
    promised = {name for name in (*vars(Collective), *Collective.__annotations__) if not name.startswith("_")}
    assert promised >= {"free", "bytes_sent"}
    for name in COLLECTIVES:
        made = make_collective(name, topology)
        assert made.bytes_sent == {"native": None}.get(name, 0) and not [n for n in promised if not hasattr(made, n)]
        array = np.ones(10, np.float32)
        made.all_reduce(array)
        assert (array == comm.size).all()
        made.free()
    with pytest.raises(ConfigError, match="legal: auto, ring, shared, native"):
        make_collective("rnig", topology)


@pytest.mark.mpi
def test_a_view_and_its_base_do_not_share_a_plan(comm):
    # Same address, other dtype or length: every call must see its own array.
    ring = Ring(comm)
    base = np.ones(100)
    ring.all_reduce(base)
    single = base.view(np.float32)
    single[:] = 1.0
    ring.all_reduce(single)
    assert (single == comm.size).all()
    base[:] = 1.0
    ring.all_reduce(base[:40])
    assert (base[:40] == comm.size).all() and (base[40:] == 1.0).all()
    ring.free()


@pytest.mark.mpi
def test_more_arrays_than_plans_are_kept(comm):
    from hpcmlp.comm import ring as module
    ring = Ring(comm)
    for k in range(module.MAX_PLANS + 10):
        array = np.full(33, float(k), np.float32)
        ring.all_reduce(array)
        assert (array == k * comm.size).all()
    assert len(ring._plans) <= module.MAX_PLANS
    ring.forget()
    assert not ring._plans
    ring.free()
    assert MPI.COMM_WORLD.size == comm.size
