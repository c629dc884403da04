"""A machine of round numbers, and workloads."""

import pytest

from hpcmlp.nn.network import NetworkSpec
from hpcmlp.plan.machine import PRODUCTS, Machine
from hpcmlp.plan.workload import Workload

RATE = 1e9          # flop/s
PASS_S = 1e-9       # an element
HOP_S = 1e-3        # a hop, whatever its bytes
LATENCY_S, S_PER_BYTE = 1e-4, 1e-8


def grid():
    axis = [1, 4096]
    return {"m": axis, "k": axis, "n": axis,
            "s": [[[2 * m * k * n / RATE for n in axis] for k in axis] for m in axis]}


@pytest.fixture
def machine():
    """Products at RATE, everything else PASS_S an element, links of LATENCY_S and S_PER_BYTE; 4 ranks a node."""
    products = {form: grid() for form in PRODUCTS}
    names = ("gather", "bias_identity", "bias_relu", "relu_backward", "column_sum", "softmax_cross_entropy", "finite",
             "adam", "add", "sum_squares", "bias_gelu", "gelu_backward", "mean_squared")
    ops = {name: [[1, PASS_S], [2**30, PASS_S * 2**30]] for name in names}
    sizes = (4, 2**30)
    node = {name: [[n, HOP_S] for n in sizes] for name in ("reduce", "gather", "together", "shared_reduce",
                                                            "shared_gather")}
    net = {name: [[n, LATENCY_S + n * S_PER_BYTE] for n in (4, 2**10, 2**15, 2**20, 2**25, 2**30)]
           for name in ("reduce", "gather", "together")}
    return Machine("round", "made up", 4, 2**34, 1, 4, {"1": products, "4": products}, {"1": ops, "4": ops}, node,
                   {**net, "latency_s": LATENCY_S, "s_per_byte": S_PER_BYTE, "cpu_s_per_byte": 0.0},
                   step_s={"1": 0.0, "4": 0.0}, process_bytes=1e6)


@pytest.fixture
def workload():
    def make(sizes=(20, 12, 3), ranks=1, per_node=4, batch=64, **options):
        options.setdefault("sync", "ring")
        return Workload(NetworkSpec(sizes), ranks, min(ranks, per_node), batch, optimizer="adam", **options)
    return make
