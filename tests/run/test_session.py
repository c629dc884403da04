"""A captured state holds every rank's part in its place, however it came there."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from hpcmlp.comm import reach
from hpcmlp.run.session import Session

SIZE = 1003


def ranges_of(comm, rank):
    """Two ranges a rank, interleaved with those of the others."""
    bounds = np.linspace(0, SIZE, 2 * comm.size + 1).astype(int)
    return [(int(bounds[k]), int(bounds[k + 1])) for k in (rank, rank + comm.size)]


def session(comm, whole=False):
    layout = SimpleNamespace(size=SIZE, views=lambda flat: {"all": flat})
    network = SimpleNamespace(layout=layout, dtype=np.dtype(np.float32), params=np.arange(SIZE, dtype=np.float32))
    ranges = [(0, SIZE)] if whole else ranges_of(comm, comm.rank)
    strategy = SimpleNamespace(ranges=ranges, finish=lambda: None, carried=lambda keep: {},
                               ops=SimpleNamespace(to_host=lambda array, out: np.copyto(out, array)),
                               owned=lambda flat: np.concatenate([flat[a:b] for a, b in ranges]))
    state = {"m": strategy.owned(network.params) + 0.25, "v": strategy.owned(network.params) + 0.5}
    return Session(comm, network, strategy, SimpleNamespace(state=state), None), state


@pytest.mark.mpi
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("far", ["nobody", "odd ranks", "everybody"])
def test_every_part_is_in_its_place_in_every_capture(comm, monkeypatch, whole, far):
    if far == "everybody" or far == "odd ranks" and comm.rank % 2:
        monkeypatch.setattr(reach, "_mapped", lambda *arguments: None)
    one, own = session(comm, whole)
    if comm.rank == 0:
        one.make_room(best=True)
    for turn in range(3):
        if turn == 2:
            one.keep_best(one.network.params + 0.75)
        for array in own.values():
            array += turn
        state = one.capture({"turn": turn})
        # A rank that goes on at once must not reach into the state of this capture.
        for array in own.values():
            array += 100
        comm.Barrier()
        if comm.rank == 0:
            base = np.arange(SIZE, dtype=np.float32)
            added = 100 * turn + turn * (turn + 1) // 2
            expected = {"params/all": base, "optimizer/m/all": base + added + 0.25,
                        "optimizer/v/all": base + added + 0.5, **({"best/all": base + 0.75} if turn == 2 else {})}
            assert state.arrays.keys() == expected.keys() and state.meta["turn"] == turn
            for name, array in expected.items():
                np.testing.assert_array_equal(state.arrays[name], array)
        else:
            assert state is None


@pytest.mark.mpi(min_size=2)
def test_no_rank_writes_into_a_state_that_rank_0_still_uses(comm):
    one, own = session(comm)
    state = one.capture({})
    for array in own.values():
        array[...] = -1
    if comm.rank == 0:
        time.sleep(0.2)     # the others are in the next capture
        assert all((array >= 0).all() for array in state.arrays.values())
    one.capture({})
    if comm.rank == 0:
        assert all((array == -1).all() for name, array in state.arrays.items() if name.startswith("optimizer"))
