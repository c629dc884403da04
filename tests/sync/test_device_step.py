"""Steps of several emulated devices by themselves: what a step gathers, and what all ranks hold when it counts."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcmlp.comm.nccl import OverHost
from hpcmlp.data.order import Order
from hpcmlp.data.samples import Samples
from hpcmlp.errors import Unavailable
from hpcmlp.nn.layout import PaddedLayout, pad
from hpcmlp.nn.planned import PlannedNetwork
from hpcmlp.ops.device import DeviceOps
from hpcmlp.ops.emulated import EmulatedDevice
from hpcmlp.sync.device_step import TogetherStep
from hpcmlp.sync.planned import DeviceSamples, PlannedSteps

BATCH, STEPS = 64, 12
DUE = (4, 11)


def load_problems():
    """The made-up samples of the program that checks a real GPU."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "check_steps.py"
    spec = importlib.util.spec_from_file_location("check_steps", path)
    module = sys.modules.get("check_steps") or importlib.util.module_from_spec(spec)
    if sys.modules.setdefault("check_steps", module) is module and not hasattr(module, "TABLE"):
        spec.loader.exec_module(module)
    return module


check = load_problems()


class Counting(OverHost):
    """Notes the type of what is gathered; `masters`: gathers the parameters instead of the copy, and rounds them."""

    def __init__(self, comm, part, masters):
        super().__init__(comm, part)
        self.masters, self.network, self.gathered = masters, None, []

    def gather_parts(self, array):
        self.gathered.append(array.dtype)
        if not self.masters or array.dtype == np.float32:
            super().gather_parts(array)
            return
        super().gather_parts(self.network.params)
        self.network.device.run(self.network.narrow_params())


def run(comm, precision, masters=False):
    """Take the steps; returns network, exchange, results, and the parameters as they were before the last ones."""
    try:
        device = EmulatedDevice()
    except Unavailable as reason:
        pytest.skip(str(reason))
    p, rank, size = check.Problem(check.TABLE[0]), comm.rank, comm.size
    layout = p.spec.layout(PaddedLayout)
    layout.size = pad(layout.size, PaddedLayout.WIDTH * size)
    part = layout.size // size
    network = PlannedNetwork(p.spec, p.loss, device, -(-BATCH // size), p.rule, p.hyper, precision=precision,
                             average=0.9, clip_norm=0.5, ranges=[(rank * part, (rank + 1) * part)], layout=layout)
    network.set_params(layout.pack(p.spec.layout().unpack(p.flat)))
    exchange = Counting(comm, part, masters)
    exchange.network = network
    samples = DeviceSamples(device, Samples(p.x, p.y, p.weight), [0, 1, 2])
    steps = PlannedSteps(network, samples, Order(check.SHARDS, BATCH, seed=3), p.rate, rank, size, True, exchange)
    step = TogetherStep(steps, lambda number: number in DUE, comm, DeviceOps(np))
    results, before = [], None
    for number in range(STEPS):
        if number == STEPS - 1:
            steps.queue(step._first + step._sent, step._count - step._sent)     # all but the last one
            step._sent, before = step._count, network.params.copy()
        results.append(step.run(None, number, p.rate(number), check=True))
    return network, exchange, [r for r in results if r.steps], before


@pytest.mark.mpi
def test_bf16_steps_gather_the_copy_and_all_ranks_hold_exact_parameters_when_something_is_due(comm):
    network, exchange, results, before = run(comm, "bf16")
    other, masters, same, _ = run(comm, "bf16", masters=True)
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
def test_float32_steps_gather_the_parameters_and_nothing_twice(comm):
    network, exchange, results, _ = run(comm, "float32")
    assert exchange.gathered == [np.dtype(np.float32)] * STEPS and all(r.replicas_agree for r in results)
    assert len(set(comm.allgather(network.params.tobytes()))) == 1


@pytest.mark.mpi(min_size=2)
def test_a_copy_that_differs_is_seen(comm, monkeypatch):
    gather = Counting.gather_parts

    def wrong(exchange, array):
        gather(exchange, array)
        if array.dtype == np.uint16 and comm.rank == 1:
            array[exchange.network.layout.starts[0]] ^= 1

    monkeypatch.setattr(Counting, "gather_parts", wrong)
    _, _, results, _ = run(comm, "bf16")
    assert not results[0].replicas_agree
