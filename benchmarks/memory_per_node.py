"""Memory that one node's ranks take together, for 1, 2, 4 ranks, `--sync shared` beside `--sync ring`.

Each rank runs some whole steps (Adam, its part of one global batch), gathers the moments as a checkpoint does, and
reads Pss from /proc/self/smaps_rollup before it makes the network's vectors and after all that: Pss counts a page that
k processes share as 1/k in each, so the sum over the ranks is what the node holds. The difference is compared with the
closed form. `python benchmarks/memory_per_node.py --mpiexec MPIEXEC` prints the table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def pss_bytes() -> int:
    """Return this process's proportional share of memory, bytes. Local."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("Pss:"))


def measure(sync: str, sizes: tuple[int, ...], global_batch: int) -> None:
    """Print, on rank 0, the bytes that all ranks of the node hold for training. Collective over the world."""
    from hpcmlp import launch
    world = launch.open_world()
    import numpy as np

    from hpcmlp.comm import Topology, messages, open_exchange
    from hpcmlp.data.samples import Batch
    from hpcmlp.nn.losses import Loss
    from hpcmlp.nn.network import Network, NetworkSpec
    from hpcmlp.nn.optimizers import make_optimizer
    from hpcmlp.ops import open_ops
    from hpcmlp.sync.buckets import cut
    from hpcmlp.sync.step import Step
    from hpcmlp.sync.strategy import SlicedUpdate

    comm, size = world.comm, world.size
    rows = global_batch // size
    ops, spec, topology = open_ops("cpu"), NetworkSpec(sizes), Topology(comm)
    layout = spec.layout()
    random = np.random.default_rng(world.rank)
    source = random.standard_normal((rows, sizes[0]), dtype=np.float32)
    batch = Batch(rows, 0, rows, source, np.arange(rows), random.integers(0, sizes[-1], rows).astype(np.int32), None)
    source @ source.T                       # the BLAS's own buffers
    open_exchange(sync, topology, 100_000, np.float32).collective.all_reduce(np.ones(100_000, np.float32))

    messages.barrier(comm)
    before = pss_bytes()
    messages.barrier(comm)
    exchange = open_exchange(sync, topology, layout.size, np.float32)
    assert exchange.name == sync, exchange.note
    network = Network(spec, ops, rows, exchange.params, exchange.grads)
    for start, stop in ((k, min(k + 65_536, layout.size)) for k in range(0, layout.size, 65_536)):
        if sync == "ring" or world.rank == 0:
            network.params[start:stop] = 0.01 * random.standard_normal(stop - start, dtype=np.float32)
    if sync == "ring":
        messages.broadcast(comm, network.params)
    messages.barrier(comm)
    strategy = SlicedUpdate(exchange.collective, cut(layout.size, spec.layer_starts(), 1 << 21, size), size,
                            network.params, network.grads, ops)
    optimizer = make_optimizer("adam", ops, layout, strategy.ranges, np.float32)
    step = Step(network, Loss("softmax_cross_entropy"), optimizer, strategy, ops, rows=rows)
    for number in range(3):
        assert not step.run(batch, number, 1e-3).skipped
    for moment in optimizer.state.values():         # as for a checkpoint: nothing of it may stay
        strategy.whole(moment, keep=world.rank == 0)
    del moment
    messages.barrier(comm)
    taken = np.array([float(pss_bytes() - before)])
    messages.barrier(comm)
    messages.sum_in_place(comm, taken)
    if world.rank == 0:
        print(json.dumps({"sync": sync, "ranks": size, "measured": taken[0],
                          "expected": expected(sync, sizes, global_batch, size, 4 * layout.size)}), flush=True)


def expected(sync: str, sizes: tuple[int, ...], rows: int, ranks: int, flat: int) -> int:
    """Return the bytes of one node in closed form.

    Local. `flat` bytes of parameters, once per node when shared; two moments, once; a gradient per rank; for every
    sample of the global batch its input, and an activation and a gradient per unit of the layers after it; rank 0's
    copy of a vector to be saved, whose memory the allocator keeps for the next.
    """
    parameters = flat * (1 if sync == "shared" else ranks)
    return parameters + 2 * flat + ranks * flat + flat + 4 * rows * (sizes[0] + 2 * sum(sizes[1:]))


def main() -> None:
    """Start one job per number of ranks and algorithm, or be one rank of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mpiexec", default=str(Path(sys.executable).with_name("mpiexec")))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[784, 2048, 2048, 10])
    parser.add_argument("--global-batch-size", type=int, default=256)
    parser.add_argument("--rank-of", choices=("shared", "ring"), help="be one rank of a job")
    options = parser.parse_args()
    sizes = tuple(options.sizes)
    if options.rank_of:
        measure(options.rank_of, sizes, options.global_batch_size)
        return
    print(f"{'ranks':>5}  {'sync':<6}  {'measured MiB':>12}  {'closed form':>11}  {'ratio':>5}", flush=True)
    for ranks in options.ranks:
        for sync in ("shared", "ring"):
            command = [options.mpiexec, "-n", str(ranks), sys.executable, __file__, "--rank-of", sync, "--sizes",
                       *map(str, sizes), "--global-batch-size", str(options.global_batch_size)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout)
            print(f"{ranks:5}  {sync:<6}  {found['measured'] / 2**20:12.1f}  {found['expected'] / 2**20:11.1f}  "
                  f"{found['measured'] / found['expected']:5.3f}", flush=True)


if __name__ == "__main__":
    main()
