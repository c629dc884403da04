"""The ring over arrays of a device whose sums are late: the bits of the host's, or NaN where a wait is missing.

The arrays offer what mpi4py takes of CuPy's, an address, and the MPI library reads there what is the host's memory.
"""

import types

import numpy as np
import pytest

from hpcmlp.comm.ring import Ring
from hpcmlp.ops.device_sums import DeviceSums, LateSums


class Array:
    """As much of an array of CuPy as the ring uses; its numbers are for the test alone."""

    def __init__(self, values):
        self.values = values
        self.dtype, self.size, self.ndim, self.nbytes = values.dtype, values.size, values.ndim, values.nbytes
        self.itemsize, self.flags = values.itemsize, values.flags

    def __getitem__(self, piece):
        return Array(self.values[piece])

    def reshape(self, shape):
        return Array(self.values.reshape(shape))

    def view(self, dtype):
        return Array(self.values.view(dtype))

    @property
    def __cuda_array_interface__(self):
        return self.values.__array_interface__ | {"stream": 1}


class Cupy:
    """As much of CuPy as `DeviceSums` uses, with one stream, which is as late as it may be."""

    ndarray = Array

    def __init__(self):
        late = LateSums()
        self.add = lambda a, b, out: late.add(a.values, b.values, out.values)
        self.empty = lambda size, dtype: Array(np.empty(size, dtype))
        self.cuda = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(synchronize=late.wait))


DEVICES = {"late": (LateSums, lambda values: values), "CuPy": (lambda: DeviceSums(Cupy()), Array)}


def own_values(comm, size, dtype):
    """Numbers whose sum depends on the order."""
    random = np.random.default_rng([size, comm.rank])
    return random.standard_normal(size).astype(dtype) * dtype(10.0**comm.rank)


@pytest.mark.mpi
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_sums_have_the_bits_of_the_host_and_wait_for_what_is_queued(comm, given_back, device, dtype):
    make, of_device = DEVICES[device]
    sums = make()
    there, here = (given_back(Ring(comm, segment_bytes=1024, small_bytes=0, **more)) for more in ({"device": sums}, {}))
    for size in (0, 1, comm.size - 1, comm.size + 1, 1009, 4000):
        array, values = of_device(np.zeros(size, dtype)), own_values(comm, size, dtype)
        bounds = [size * rank // comm.size for rank in range(comm.size + 1)]
        own = slice(*bounds[comm.rank:comm.rank + 2])
        for _ in range(2):      # by the same messages
            wanted, words = values.copy(), np.array([comm.rank + 0.1, 1.0])
            wanted_words = words.copy()
            here.reduce_scatter(wanted, bounds, wanted_words)
            sums.add(of_device(values.copy()), of_device(np.zeros(size, dtype)), array)     # the gradient, on its way
            there.reduce_scatter(array, bounds, words)
            if comm.size == 1:      # a ring that has nothing to send has nothing to wait for
                sums.wait()
            found = getattr(array, "values", array)
            assert found[own].tobytes() == wanted[own].tobytes() and words.tobytes() == wanted_words.tobytes()
            here.all_gather(wanted, bounds)
            sums.add(array[own], of_device(np.zeros_like(wanted[own])), array[own])         # and its update
            there.all_gather(array, bounds)
            if comm.size == 1:
                sums.wait()
            assert found.tobytes() == wanted.tobytes()
    there.all_reduce(array)
    here.all_reduce(wanted)
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.mpi
def test_arrays_of_the_host_go_as_ever_beside_those_of_the_device(comm, given_back):
    """A norm is one call of MPI; what is gathered for a checkpoint has nothing to do with the device."""
    ring = given_back(Ring(comm, device=DeviceSums(types.SimpleNamespace(ndarray=Array))))  # it cannot add nor wait
    square = np.array([comm.rank + 1.0])
    ring.all_reduce(square)
    assert square[0] == comm.size * (comm.size + 1) / 2
    flat = np.where(np.arange(3 * comm.size) // 3 == comm.rank, np.arange(3.0 * comm.size), -1)
    ring.all_gather(flat, [3 * rank for rank in range(comm.size + 1)])
    assert np.array_equal(flat, np.arange(3 * comm.size))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("device", DEVICES)
def test_a_wait_that_is_missing_shows(comm, given_back, monkeypatch, device):
    """Each in its turn: before the first message, and after each of the size - 1 sums of a part of one segment."""
    make, of_device = DEVICES[device]
    sums, length = make(), 8 * comm.size
    ring = given_back(Ring(comm, small_bytes=0, device=sums))
    bounds = [8 * rank for rank in range(comm.size + 1)]
    own = slice(8 * comm.rank, 8 * comm.rank + 8)
    wait, waits = sums.wait, iter(())
    monkeypatch.setattr(sums, "wait", lambda: wait() if next(waits) else None)

    def comes_right(call, missing, part):
        nonlocal waits
        values = np.arange(length, dtype=np.float32)
        array = of_device(np.zeros(length, np.float32))
        sums.add(of_device(values), of_device(values), array)
        waits = iter([k != missing for k in range(comm.size)])
        with np.errstate(invalid="ignore"):
            call(array, bounds)
        found = getattr(array, "values", array)[part].copy()
        wait()
        factor = comm.size if call == ring.reduce_scatter else 1
        good = np.array([float(np.array_equal(found, 2 * factor * values[part]))])
        everyone = np.empty(comm.size)
        comm.Allgather(good, everyone)
        return everyone.all()

    assert comes_right(ring.reduce_scatter, None, own) and next(waits, None) is None
    for missing in range(comm.size):
        assert not comes_right(ring.reduce_scatter, missing, own), missing
    assert comes_right(ring.all_gather, None, slice(None))
    assert not comes_right(ring.all_gather, 0, slice(None))


@pytest.mark.mpi(min_size=2)
def test_collectives_under_way_wait_for_the_device_too(comm, given_back):
    sums = LateSums()
    ring = given_back(Ring(comm, segment_bytes=64, device=sums))
    arrays, bounds = [np.zeros(100 * comm.size, np.float32) for _ in range(2)], [100 * k for k in range(comm.size + 1)]
    operations = []
    for array in arrays:
        sums.add(np.ones_like(array), np.ones_like(array), array)
        operations.append(ring.start_reduce_scatter(array, bounds))
    for array, operation in zip(arrays, operations, strict=True):
        operation.wait()
        assert (array[bounds[comm.rank]:bounds[comm.rank + 1]] == 2 * comm.size).all()
