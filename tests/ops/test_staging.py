"""Copies between device and host: in the order of their streams and events, on a CUDA that is as late as it may be."""

import ctypes
import types

import numpy as np
import pytest

from hpcmlp.ops.host import HostOps
from hpcmlp.ops.staging import Late, Staged


class DriverError(RuntimeError):
    """Stands in for cupy.cuda.runtime.CUDARuntimeError."""


class Stream:
    """Work that is done only when somebody waits for it, and what it waits for itself then too."""

    def __init__(self, non_blocking=True):
        self.queue, self.ptr = [], self

    def wait_event(self, event):
        self.queue.append(event.mark)

    def synchronize(self):
        self.until(len(self.queue))

    def until(self, count):
        for k in range(count):
            action, self.queue[k] = self.queue[k], lambda: None
            action()


class Event:
    def __init__(self, disable_timing):
        assert disable_timing
        self.mark = lambda: None

    def record(self, stream):
        count = len(stream.queue)
        self.mark = lambda: stream.until(count)

    def synchronize(self):
        self.mark()


class Cuda:
    """As much of CuPy as `Staged` uses; `locked` are the pages, `refuse` says that none can be."""

    def __init__(self, refuse=False):
        self.locked, self.current = [], Stream()

        def register(address, size, flags):
            if refuse:
                raise DriverError("out of pages")
            self.locked.append(address)

        def copy(to, source, count, kind, stream):
            stream.queue.append(lambda: ctypes.memmove(to, source, count))

        runtime = types.SimpleNamespace(CUDARuntimeError=DriverError, hostRegister=register, memcpyAsync=copy,
                                        hostUnregister=self.locked.remove)
        self.cuda = types.SimpleNamespace(runtime=runtime, Stream=Stream, Event=Event,
                                          get_current_stream=lambda: self.current)


class Array:
    """A vector of the device, whose numbers only the test sees."""

    def __init__(self, values):
        self.values = np.array(values, np.float32)
        self.data = types.SimpleNamespace(ptr=self.values.ctypes.data)
        self.shape, self.dtype, self.size = self.values.shape, self.values.dtype, self.values.size


@pytest.mark.parametrize("refuse", (False, True))
@pytest.mark.parametrize("given", (False, True))
def test_ranges_come_and_go_when_they_are_waited_for(refuse, given):
    xp, array = Cuda(refuse), Array(np.arange(10))
    host = np.full(10, -1, np.float32) if given else None
    stage = Staged(xp, array, host)
    assert not xp.locked and (host is None or stage.host is host)
    before = stage.host.copy()
    first, second, nothing = stage.fetch(0, 4), stage.fetch(4, 7), stage.fetch(7, 7)
    assert len(xp.locked) == (not refuse) and np.array_equal(stage.host, before)
    second()
    assert stage.host[:7].tolist() == [0, 1, 2, 3, 4, 5, 6] and np.array_equal(stage.host[7:], before[7:])
    first()
    nothing()
    stage.host[:] = 100 + np.arange(10)
    stage.put(2, 5)
    stage.put(8, 8)
    assert array.values.tolist() == list(range(10))
    stage.settle()
    assert array.values.tolist() == [0, 1, 102, 103, 104, 5, 6, 7, 8, 9]
    array.values[:] = 7
    again = stage.fetch(0, 4)     # the event of this range once more
    again()
    assert stage.host[:4].tolist() == [7] * 4
    del stage, first, second, again
    assert not xp.locked


def test_copies_follow_what_the_current_stream_holds():
    xp, array = Cuda(), Array(np.zeros(4))
    stage = Staged(xp, array)
    xp.current.queue.append(lambda: array.values.fill(5))
    arrived = stage.fetch(0, 4)
    xp.current.queue.append(lambda: array.values.fill(6))    # behind the copy's start: not waited for
    arrived()
    assert stage.host.tolist() == [5] * 4
    seen = []
    xp.current.queue.append(lambda: seen.append(array.values.copy()))
    stage.host[:] = 8
    stage.put(0, 4)
    stage.settle()
    assert seen[0].tolist() == [6] * 4 and array.values.tolist() == [8] * 4


def test_the_stand_in_shows_whoever_does_not_wait():
    array = np.arange(6, dtype=np.float32)
    stage = Late(array)
    arrived = stage.fetch(0, 3)
    assert np.isnan(stage.host[:3]).all() and not stage.host[3:].any()
    arrived()
    assert stage.host.tolist() == [0, 1, 2, 0, 0, 0]
    stage.host[3:] = 9
    stage.put(3, 6)
    assert np.isnan(array[3:]).all()
    stage.settle()
    assert array.tolist() == [0, 1, 2, 9, 9, 9]


def test_nothing_moves_on_the_host():
    array = np.arange(3, dtype=np.float32)
    stage = HostOps().stage(array)
    stage.fetch(0, 3)()
    stage.put(0, 3)
    stage.settle()
    assert stage.host is array and array.tolist() == [0, 1, 2]
