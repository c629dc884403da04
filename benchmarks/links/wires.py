"""Time both halves of a step's communication over shaped links for every wire, and count what crosses the link.

    tests/cluster/hosts.py --hosts 2 --rate 1gbit --cores 1 -- {mpiexec} {python} benchmarks/links/wires.py

No arithmetic of a network stands between the halves, so machines with more to do can still tell what the wire takes.
The wires take turns in every round; times are the mean over the ranks, each from its own beginning. The lower quartile
stands beside the median for busy machines. Bytes are those of rank 0's interface, headers included, in the last round.
"""

import argparse
import statistics
import time

from hpcmlp import launch


def sent() -> int:
    """Return the bytes that this host's link has carried away."""
    with open("/sys/class/net/eth0/statistics/tx_bytes") as file:
        return int(file.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="784,2048,2048,10", help="widths from input to output")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    world = launch.open_world()

    import numpy as np

    from hpcmlp.comm import open_exchange
    from hpcmlp.comm.topology import Topology
    from hpcmlp.comm.wire import WIRES
    from hpcmlp.nn.network import NetworkSpec
    from hpcmlp.nn.optimizers import make_optimizer
    from hpcmlp.ops import open_ops
    from hpcmlp.sync import make_strategy
    from hpcmlp.sync.buckets import cut

    comm, topology, ops = world.comm, Topology(world.comm), open_ops("cpu")
    spec = NetworkSpec(tuple(map(int, args.sizes.split(","))))
    layout = spec.layout()
    buckets = cut(layout.size, spec.layer_starts(), layout.size, comm.size)
    gradient = np.random.default_rng(comm.rank).standard_normal(layout.size).astype(np.float32)
    words, made, times, carried = np.zeros(9), {}, {wire: [] for wire in WIRES}, {}
    for wire in WIRES:
        exchange = open_exchange("auto", topology, layout.size, np.float32, wire=wire)
        strategy = make_strategy(False, exchange.collective.narrow)(exchange.collective, buckets, comm.size,
                                                                    exchange.params, exchange.grads, ops)
        made[wire] = strategy, make_optimizer("sgd", ops, layout, strategy.ranges, np.float32)
    for number in range(args.rounds + 1):
        for wire, (strategy, optimizer) in made.items():
            strategy.grads[:] = gradient
            comm.Barrier()
            before = sent()
            comm.Barrier()      # nobody sends before all have read
            begin = time.perf_counter()
            strategy.reduce(words)
            reduced = time.perf_counter() - begin
            strategy.update(optimizer, 1e-4, number + 1, 1.0)
            comm.Barrier()
            begin = time.perf_counter()
            strategy.share()
            both = np.array([reduced, time.perf_counter() - begin])
            comm.Barrier()
            carried[wire] = sent() - before
            comm.Allreduce(both.copy(), both)
            if number:      # the first round prepares messages and connections
                times[wire].append(1e3 * both / comm.size)
    if comm.rank == 0:
        plain = [statistics.quantiles((sum(t) for t in times["float32"]), n=4)[k] for k in (0, 1)]
        print(f"{args.sizes}: {layout.num_params:,} parameters, {comm.size} ranks on {topology.num_nodes} nodes, "
              f"{world.library}")
        for wire in WIRES:
            low, median = (statistics.quantiles((sum(t) for t in times[wire]), n=4)[k] for k in (0, 1))
            halves = [statistics.median(t[k] for t in times[wire]) for k in (0, 1)]
            print(f"{wire:8s} median {median:7.1f} ms ({median / plain[1]:.3f} of float32), lower quartile {low:7.1f} "
                  f"ms ({low / plain[0]:.3f}); reduce {halves[0]:.1f}, share {halves[1]:.1f} ms; "
                  f"{carried[wire]:,} bytes ({carried[wire] / carried['float32']:.4f})", flush=True)


if __name__ == "__main__":
    main()
