"""Memory of a rank and time of a step with `--shard params` beside unsharded steps, in one job.

    mpiexec -n 4 python benchmarks/sharded_parameters.py [--sync shared] [--sizes 784,2048,2048,10]
        [--global-batch-size 1024] [--steps 20] [--rounds 5] [--recompute]

Memory: every rank reads Pss from /proc/self/smaps_rollup (a page that k processes share counts as 1/k) before it makes
anything and after three steps of Adam with one sample a rank, so that next to nothing but parameters, gradients and
optimizer state is held; the largest rank's figure beside `sync.memory.state_bytes`, and the peak of its resident memory
meanwhile (VmHWM, shared pages whole), ring only. `one rank` is 16 bytes a parameter: what one rank alone, or every rank
with --full-update, holds. Time: rounds of steps of both kinds in turn; per round the slowest rank's mean, then medians.
"""

import argparse
import gc
import json
import statistics
import time

from hpcmlp import launch

COMM = launch.open_world().comm

import numpy as np  # noqa: E402  (open_world sets the BLAS threads before NumPy is loaded)

from hpcmlp.comm import Topology, messages, open_exchange  # noqa: E402
from hpcmlp.data.samples import Batch  # noqa: E402
from hpcmlp.nn.initializers import initialize  # noqa: E402
from hpcmlp.nn.losses import Loss  # noqa: E402
from hpcmlp.nn.network import Network, NetworkSpec  # noqa: E402
from hpcmlp.nn.optimizers import make_optimizer  # noqa: E402
from hpcmlp.ops import open_ops  # noqa: E402
from hpcmlp.sync import plan  # noqa: E402
from hpcmlp.sync.memory import buffer_elements, state_bytes  # noqa: E402
from hpcmlp.sync.sharded import ShardedStep, open_sharded  # noqa: E402
from hpcmlp.sync.step import Step  # noqa: E402
from hpcmlp.sync.strategy import SlicedUpdate  # noqa: E402


class Steps:
    """Planned steps of Adam, sharded or not, and the batches that they take in turn."""

    def __init__(self, sync, spec, rows, sharded, recompute=False):
        ops, topology, layout = open_ops("cpu"), Topology(COMM), spec.layout()
        size = sum(buffer_elements(spec)) if sharded else layout.size
        self.exchange = exchange = open_exchange(sync, topology, size, np.float32, by_layer=sharded)
        assert exchange.name == sync, exchange.note
        if sharded:
            network, self.strategy = open_sharded(exchange, spec, COMM.size, ops, rows, recompute)
            for number, (start, stop) in enumerate(spec.layer_spans()):
                first = initialize(spec, 0, "auto", np.float32, (start, stop))
                self.strategy.take_layer(number, first, self.strategy.params)
        else:
            network = Network(spec, ops, rows, exchange.params, exchange.grads, recompute=recompute)
            for start, stop in spec.layer_spans():
                if sync != "shared" or COMM.rank == 0:
                    network.params[start:stop] = initialize(spec, 0, "auto", np.float32, (start, stop))
            self.strategy = SlicedUpdate(exchange.collective, plan(spec, exchange.collective, COMM.size, 1).buckets,
                                         COMM.size, network.params, network.grads, ops)
        messages.barrier(COMM)
        optimizer = make_optimizer("adam", ops, layout, self.strategy.ranges, np.float32)
        kind = ShardedStep if sharded else Step
        self.step = kind(network, Loss("softmax_cross_entropy"), optimizer, self.strategy, ops, rows=rows)
        random = np.random.default_rng(COMM.rank)
        source = random.standard_normal((max(rows, 64), spec.sizes[0]), dtype=np.float32)
        labels = random.integers(0, spec.sizes[-1], len(source)).astype(np.int32)
        index = [random.integers(0, len(source), rows) for _ in range(8)]
        self.batches = [Batch(rows, 0, rows * COMM.size, source, one, labels[one], None) for one in index]
        self.number = 0

    def run(self, steps):
        """Return the slowest rank's mean time of a step, ms."""
        self.strategy.finish()
        messages.barrier(COMM)
        begin = time.perf_counter()
        for _ in range(steps):
            assert not self.step.run(self.batches[self.number % 8], self.number, 1e-4).skipped
            self.number += 1
        self.strategy.finish()
        return 1e3 * largest(time.perf_counter() - begin) / steps


def largest(value):
    """Return the largest value of all ranks."""
    array = np.array([float(value)])
    messages.max_in_place(COMM, array)
    return float(array[0])


def status(path, name):
    with open(path, encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def memory(sync, spec, sharded):
    """Return the bytes that the largest rank takes for parameters, gradients and optimizer state, and its peak."""
    gc.collect()
    messages.barrier(COMM)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")     # the peak of resident memory begins anew
    before, resident = status("/proc/self/smaps_rollup", "Pss:"), status("/proc/self/status", "VmRSS:")
    messages.barrier(COMM)
    steps = Steps(sync, spec, 1, sharded)
    steps.run(3)
    messages.barrier(COMM)
    taken = status("/proc/self/smaps_rollup", "Pss:") - before
    peak = status("/proc/self/status", "VmHWM:") - resident
    messages.barrier(COMM)
    steps.exchange.collective.free()
    return largest(taken), largest(peak)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sync", default="shared", choices=("shared", "ring", "native"))
    parser.add_argument("--sizes", default="784,2048,2048,10")
    parser.add_argument("--global-batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    given = parser.parse_args()
    spec, size = NetworkSpec(tuple(map(int, given.sizes.split(",")))), COMM.size
    found = {"ranks": size, "sync": given.sync, "sizes": given.sizes}
    common = size if given.sync == "shared" else 1
    if not given.no_memory:
        warm = NetworkSpec((784, 512, 512, 10))
        for sharded in (True, False):   # libraries' own memory
            memory(given.sync, warm, sharded)
        one, layer = state_bytes(spec, 2, 1, whole_update=True), max(b - a for a, b in spec.layer_spans())
        found["mib"] = {"one rank": one, "a quarter and one layer": one / 4 + 16 * layer}
        for sharded in (True, False):
            name = "sharded" if sharded else "unsharded"
            found["mib"][name + " formula"] = state_bytes(spec, 2, size, sharded=sharded, common=common)
            found["mib"][name], peak = memory(given.sync, spec, sharded)
            if given.sync != "shared":
                found["mib"][name + " peak"] = peak
        found["mib"] = {name: round(value / 2**20, 1) for name, value in found["mib"].items()}
    if given.rounds:
        rows = given.global_batch_size // size
        kinds = {"unsharded": Steps(given.sync, spec, rows, False),
                 "sharded": Steps(given.sync, spec, rows, True)}
        if given.recompute:
            kinds["unsharded recompute"] = Steps(given.sync, spec, rows, False, True)
            kinds["sharded recompute"] = Steps(given.sync, spec, rows, True, True)
        times = {name: [] for name in kinds}
        for turn in range(given.rounds + 1):
            for name, steps in kinds.items():
                took = steps.run(given.steps if turn else 3)
                if turn:
                    times[name].append(took)
        found["ms"] = {name: [round(t, 3) for t in (statistics.median(v), min(v), max(v))] for name, v in times.items()}
        base = statistics.median(times["unsharded"])
        found["ratio"] = {name: round(statistics.median(v) / base, 3) for name, v in times.items()}
    if COMM.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
