"""Steps of several emulated devices by themselves: what a step gathers, and what all ranks hold when it counts."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from hpcmlp.comm.nccl import OverHost
from hpcmlp.errors import Unavailable
from hpcmlp.ops.emulated import EmulatedDevice

GPU_PROGRAMS = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
STEPS = 12
DUE = (4, 11)


@pytest.fixture
def paths(monkeypatch):
    """The steps are those of the program that checks a real GPU."""
    monkeypatch.syspath_prepend(GPU_PROGRAMS)
    return importlib.import_module("check_paths")


class Counting(OverHost):
    """Notes the type of what is gathered; `masters`: gathers the parameters instead of the copy, and rounds them."""

    def __init__(self, comm, part, masters, network):
        super().__init__(comm, part)
        self.masters, self.network, self.gathered = masters, network, []

    def gather_parts(self, array):
        self.gathered.append(array.dtype)
        if not self.masters or array.dtype == np.float32:
            super().gather_parts(array)
            return
        super().gather_parts(self.network.params)
        self.network.device.run(self.network.narrow_params())


def run(paths, comm, precision, masters=False):
    """Take the steps; returns network, exchange, results, and the parameters as they were before the last one."""
    try:
        device = EmulatedDevice()
    except Unavailable as reason:
        pytest.skip(str(reason))
    made, before = [], []

    def make(network, part):
        made.append(Counting(comm, part, masters, network))
        return made[0]

    def between(step):
        step.steps.queue(step._first + step._sent, step._count - step._sent)
        step._sent = step._count
        before.append(step.network.params.copy())

    network, results = paths.run_together(device, comm, precision, make, STEPS, DUE, between)
    return network, made[0], results, before[0]


@pytest.mark.mpi
def test_bf16_steps_gather_the_copy_and_all_ranks_hold_exact_parameters_when_something_is_due(paths, comm):
    network, exchange, results, before = run(paths, comm, "bf16")
    other, masters, same, _ = run(paths, comm, "bf16", masters=True)
    assert [r.steps for r in results] == [5, 7] and all(r.replicas_agree and not r.skipped for r in results)
    assert exchange.gathered.count(np.dtype(np.uint16)) == STEPS
    assert exchange.gathered.count(np.dtype(np.float32)) == len(DUE)
    for array, wanted in ((network.params, other.params), (network.copy, other.copy),
                          (network.averaged, other.averaged), (network.state["m"], other.state["m"])):
        assert array.any() and np.array_equal(array, wanted)
    assert [(r.loss, r.grad_norm) for r in results] == [(r.loss, r.grad_norm) for r in same]
    for array in (network.params, network.copy):
        assert len(set(comm.allgather(array.tobytes()))) == 1     # the same bits on all ranks
    if comm.size > 1:       # between, a rank has its own parameters and the others' copies
        start, stop = network.ranges[0]
        moved = before != network.params
        assert moved[start:stop].any() and moved.sum() > moved[start:stop].sum()


@pytest.mark.mpi
def test_float32_steps_gather_the_parameters_and_nothing_twice(paths, comm):
    network, exchange, results, _ = run(paths, comm, "float32")
    assert exchange.gathered == [np.dtype(np.float32)] * STEPS and all(r.replicas_agree for r in results)
    assert len(set(comm.allgather(network.params.tobytes()))) == 1


@pytest.mark.mpi(min_size=2)
def test_a_copy_that_differs_is_seen(paths, comm, monkeypatch):
    gather = Counting.gather_parts

    def wrong(exchange, array):
        gather(exchange, array)
        if array.dtype == np.uint16 and comm.rank == 1:
            array[exchange.network.layout.starts[0]] ^= 1

    monkeypatch.setattr(Counting, "gather_parts", wrong)
    _, _, results, _ = run(paths, comm, "bf16")
    assert not results[0].replicas_agree


@pytest.mark.parametrize("check", ("check_predictions", "check_sums", "check_together"))
def test_what_a_real_gpu_is_asked_holds_on_the_emulated_one(paths, check):
    try:
        getattr(paths, check)(EmulatedDevice())
    except Unavailable as reason:
        pytest.skip(str(reason))
