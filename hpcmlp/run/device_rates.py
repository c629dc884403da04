"""How fast planned steps are on a device: whole steps on made-up samples, and their matrix products alone."""

from time import perf_counter
from typing import Any

import numpy as np

from hpcmlp.comm import messages, open_exchange
from hpcmlp.data.order import Order
from hpcmlp.data.samples import Samples
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.layout import PaddedLayout
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import NetworkSpec
from hpcmlp.nn.optimizers import HYPER
from hpcmlp.nn.planned import PlannedNetwork
from hpcmlp.ops import open_planned
from hpcmlp.sync import STAGED_MB, make_strategy
from hpcmlp.sync.buckets import cut_evenly
from hpcmlp.sync.device_step import AloneStep, StagedStep
from hpcmlp.sync.planned import DeviceSamples, PlannedSteps

ROWS = 1 << 16      # samples, at least 16 batches
ROUNDS = 5


def time_planned_step(config: Any, topology: Any, ops: Any) -> dict[str, Any]:
    """Return the median time of a whole step and of its products alone, ms, as `bench step` gives them.

    Collective.

    config : the options of `bench step`. ops : `ops.open_ops("gpu", ...)`.
    """
    rank, size, batch = topology.rank, topology.size, config.global_batch_size
    spec, device = NetworkSpec(tuple(config.sizes)), open_planned(ops)
    layout = spec.layout(PaddedLayout)
    exchange = open_exchange(config.sync, topology, layout.size, np.float32, overlap=False)
    buckets = cut_evenly(layout.size, config.bucket_mb or STAGED_MB, size)
    params, grads = device.zeros(layout.size, np.float32), device.zeros(layout.size, np.float32)
    strategy = make_strategy(False)(exchange.collective, buckets, size, params, grads, ops,
                                    (exchange.params, exchange.grads))
    network = PlannedNetwork(spec, Loss("softmax_cross_entropy"), device, -(-batch // size), config.optimizer,
                             HYPER[config.optimizer], precision=config.precision, ranges=strategy.ranges,
                             params=params, grads=grads)
    network.set_params(layout.pack(spec.layout().views(initialize(spec, 0, "auto", np.float32))))
    rows = max(ROWS, 16 * batch)
    random = np.random.default_rng(0)
    samples = Samples(random.standard_normal((rows, spec.sizes[0]), dtype=np.float32),
                      random.integers(0, spec.sizes[-1], rows).astype(np.int32), None)
    steps = PlannedSteps(network, DeviceSamples(device, samples, [0]), Order([rows], batch), lambda number: 1e-4, rank,
                         size, size == 1)
    last = [0]
    step: Any = AloneStep(steps, lambda number: number == last[0]) if size == 1 else \
        StagedStep(steps, strategy, ops, None)

    def run(first: int, count: int) -> float:
        """Milliseconds of a step over `count` of them, on the slowest rank."""
        last[0] = first + count - 1
        messages.barrier(topology.comm)
        begin = perf_counter()
        for number in range(first, first + count):
            step.run(None, number, 1e-4)
        taken = np.array([perf_counter() - begin])
        messages.max_in_place(topology.comm, taken)
        return 1e3 * float(taken[0]) / count

    run(0, 4)   # captures
    count, at, step_ms, floor_ms = max(1, config.steps // ROUNDS), 4, [], []
    products = device.capture(network.products())
    for _ in range(ROUNDS):
        step_ms.append(run(at, count))
        floor_ms.append(1e3 * device.seconds(products, 10))
        at += count
    return {"what": "step", "sizes": list(spec.sizes), "global_batch_size": batch, "ranks": size,
            "sync": exchange.name, "device": device.name, "precision": config.precision,
            "step_ms": float(np.median(step_ms)), "floor_ms": float(np.median(floor_ms)),
            "graph_steps": steps.graph_steps, "num_params": layout.num_params}
