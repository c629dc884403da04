"""Time all-reduces over shaped links: our ring at several segment sizes and MPI's own, beside the wire bound.

    tests/cluster/hosts.py --hosts 8 --rate 200mbit --cores 1 -- \
        {mpiexec} {python} benchmarks/links/all_reduce.py --mbit 200 --yielding

The wire bound is the time in which a link of that rate carries the 2 (P - 1)/P n bytes that every rank must send, no
headers counted: of 1514 bytes that a link of standard frames is charged with, TCP leaves 1448 to us, 95.6 %.
All candidates take turns in every round, so that a change of the machine's speed meets all of them. A round's time is
the mean over the ranks, each from its own beginning: ranks that share cores leave the barrier before it one after the
other. Prints the median and the range over the rounds, or with --json one JSON object.
"""

import argparse
import json
import os
import statistics
import time

from hpcmlp import launch


def open_yielding_world() -> launch.World:
    """Open the world with ranks that give their core away while they wait.

    For hosts that share cores, which no rank can see: from inside each has a core of its own. MPICH yields only with
    thread level MULTIPLE, which is what mpi4py asks for by itself.
    """
    os.environ.update(launch.YIELD_VARIABLES)
    import mpi4py.MPI  # noqa: F401
    return launch.open_world()


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=float, required=True, help="rate of each link, Mbit/s")
    parser.add_argument("--bytes", type=integers, default=[1 << 22], help="sizes of the array (default: 4 MiB)")
    parser.add_argument("--segments", type=integers, default=[1 << k for k in range(14, 22)],
                        help="bytes of a message of the ring (default: 16 KiB to 2 MiB)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--yielding", action="store_true", help="hosts share cores: waiting ranks give theirs away")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    world = open_yielding_world() if args.yielding else launch.open_world()

    import numpy as np
    from mpi4py import MPI

    from hpcmlp.comm.ring import Ring

    comm = world.comm
    rings = {f"ring, segments of {size >> 10} KiB": Ring(comm, size) for size in args.segments}
    candidates = {name: ring.all_reduce for name, ring in rings.items()}
    candidates["MPI_Allreduce"] = lambda array: comm.Allreduce(MPI.IN_PLACE, array)
    results = []
    for num_bytes in args.bytes:
        array = np.zeros(num_bytes // 4, np.float32)
        times = {name: np.empty(args.rounds + 1) for name in candidates}
        for k in range(args.rounds + 1):
            for name, all_reduce in candidates.items():
                comm.Barrier()
                begin = time.perf_counter()
                all_reduce(array)
                times[name][k] = 1e3 * (time.perf_counter() - begin)
        bound = 2 * (comm.size - 1) / comm.size * num_bytes * 8 / args.mbit / 1e3
        for name, values in times.items():
            comm.Allreduce(MPI.IN_PLACE, values, MPI.SUM)
            kept = (values[1:] / comm.size).tolist()    # the first round prepares messages and connections
            median = statistics.median(kept)
            results.append({"what": name, "bytes": num_bytes, "ms": median, "fastest_ms": min(kept),
                            "slowest_ms": max(kept), "bound_ms": bound, "of_bound": bound / median})
    if comm.rank == 0 and args.json:
        print(json.dumps({"ranks": comm.size, "mbit": args.mbit, "library": world.library, "yielding": args.yielding,
                          "load": os.getloadavg(), "results": results}), flush=True)
    elif comm.rank == 0:
        print(f"{comm.size} ranks, {args.mbit:g} Mbit/s, {world.library}, load {os.getloadavg()[0]:.1f}")
        for r in results:
            print(f"{r['bytes'] / 2**20:7.2f} MiB  {r['what']:<30} {r['ms']:8.1f} ms ({r['fastest_ms']:.1f}-"
                  f"{r['slowest_ms']:.1f})  bound {r['bound_ms']:.1f}, {100 * r['of_bound']:.1f} %", flush=True)


if __name__ == "__main__":
    main()
