"""Time one push and pull of a whole vector through one server, by several transports, and through slices on all ranks.

    mpiexec -n 4 python benchmarks/server_transport.py [--mib 0.5,4,16] [--rounds 30]

Per size, in alternation, the median over rounds of the slowest rank's time in ms:

gather    mpi4py at the root: Gather, sum of the rows in order, update, Bcast (rank 0 is the server, the others
          workers).
window    MPI-3 one-sided: every worker puts its vector into a place of its own in the server's window (passive target,
          flush) and tells the server by an empty message, without which it could not know; the server adds and tells
          the workers, who get the sum.
one       what `--sync server` takes with one dedicated server: push, ordered sum, pull; on one node in its memory
          (`comm.served_node`), else by messages.
all       the same with as many servers as ranks; the gradients of all ranks count.
one-msg   `comm.served.Served` with one dedicated server, wherever the ranks are.
all-msg   `Served` with as many servers as ranks.
ring      `comm.ring.Ring`: reduce-scatter and all-gather, for the same work as `all`.

As in a step, gradients and parameters are arrays of their own, and gradients are written anew before each round; the
owners' update is a copy, which is timed everywhere alike. All but `gather` and `window` carry the step's control words.
Windows in shared memory (`window`) are left out where the ranks are on several nodes.
"""

import argparse
import statistics
import time

from hpcmlp import launch

COMM = launch.open_world().comm

import numpy as np  # noqa: E402  (open_world sets the BLAS threads before NumPy is loaded)
from mpi4py import MPI  # noqa: E402

from hpcmlp.comm import open_exchange  # noqa: E402
from hpcmlp.comm.ring import Ring  # noqa: E402
from hpcmlp.comm.served import Served  # noqa: E402
from hpcmlp.comm.topology import Topology  # noqa: E402
from hpcmlp.sync.buckets import part_bounds  # noqa: E402

WORDS = 9
TOPOLOGY = Topology(COMM)


class Vectors:
    """Gradients and parameters of one transport."""

    def __init__(self, size):
        self.grads, self.params = np.zeros(size, np.float32), np.zeros(size, np.float32)

    def free(self):
        pass


class Gathered(Vectors):
    """Gather at the root, sum, Bcast."""

    def __init__(self, size):
        super().__init__(size)
        self.rows = np.empty((COMM.size, size), np.float32) if COMM.rank == 0 else None

    def run(self):
        COMM.Gather(self.grads, self.rows, 0)
        if COMM.rank == 0:
            total = self.rows[1]
            for row in self.rows[2:]:
                np.add(total, row, total)
            np.copyto(self.params, total)
        COMM.Bcast(self.params, 0)


class Window(Vectors):
    """Put, notify, add, notify, get."""

    def __init__(self, size):
        super().__init__(size)
        self.nothing = np.zeros(0, np.uint8)
        rows = COMM.size if COMM.rank == 0 else 0       # row 0: the parameters
        self.window = MPI.Win.Allocate(4 * size * rows, 4, comm=COMM)
        self.memory = np.frombuffer(self.window.tomemory(), np.float32).reshape(rows, size) if rows else None
        self.window.Lock_all()

    def run(self):
        window, size = self.window, self.params.size
        if COMM.rank == 0:
            for worker in range(1, COMM.size):
                COMM.Recv(self.nothing, worker, 1)
            window.Sync()
            total = self.memory[1]
            for row in self.memory[2:]:
                np.add(total, row, total)
            np.copyto(self.memory[0], total)
            window.Sync()
            for worker in range(1, COMM.size):
                COMM.Send(self.nothing, worker, 2)
            for worker in range(1, COMM.size):      # nobody may put before all have got
                COMM.Recv(self.nothing, worker, 3)
            for worker in range(1, COMM.size):
                COMM.Send(self.nothing, worker, 4)
        else:
            window.Put(self.grads, 0, (size * COMM.rank, size, MPI.FLOAT))
            window.Flush(0)
            COMM.Send(self.nothing, 0, 1)
            COMM.Recv(self.nothing, 0, 2)
            window.Get(self.params, 0, (0, size, MPI.FLOAT))
            window.Flush(0)
            COMM.Send(self.nothing, 0, 3)
            COMM.Recv(self.nothing, 0, 4)

    def free(self):
        self.window.Unlock_all()
        self.window.Free()


class Collective:
    """Reduce-scatter with control words, all-gather."""

    def __init__(self, size, collective, bounds):
        self.grads, self.params = collective.empty(size, np.float32), collective.common(size, np.float32)
        self.collective, self.bounds, self.words = collective, bounds, np.zeros(WORDS)
        self.own = slice(bounds[COMM.rank], bounds[COMM.rank + 1])

    def run(self):
        self.collective.reduce_scatter(self.grads, self.bounds, self.words)
        np.copyto(self.params[self.own], self.grads[self.own])
        self.collective.all_gather(self.params, self.bounds)

    def free(self):
        self.collective.free()


def ways(size):
    """Return the transports of `size` float32 by name."""
    every = part_bounds(size, COMM.size)
    one = np.array([0] + [size] * COMM.size)
    found = {"gather": Gathered(size), **({"window": Window(size)} if TOPOLOGY.num_nodes == 1 else {})}
    for name, servers, bounds in (("one", 1, one), ("all", COMM.size, every)):
        taken = open_exchange("server", TOPOLOGY, 1, np.float32, servers=servers).collective
        found[name] = Collective(size, taken, bounds)
        found[f"{name}-msg"] = Collective(size, Served(COMM, servers), bounds)
    return {**found, "ring": Collective(size, Ring(COMM), every)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", default="0.5,4,16")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    for mib in map(float, given.mib.split(",")):
        transports = ways(int(mib * 2**18))
        times = {name: [] for name in transports}
        for turn in range(given.rounds + 3):
            for name, transport in transports.items():
                transport.grads.fill(turn)
                COMM.Barrier()
                begin = time.perf_counter()
                transport.run()
                took = np.array([time.perf_counter() - begin])
                COMM.Allreduce(MPI.IN_PLACE, took, MPI.MAX)
                if turn >= 3:
                    times[name].append(1e3 * took[0])
        if COMM.rank == 0:
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratios = {f"{name}/{other}": medians[other] / medians[name] for other, names in
                      (("gather", ("one", "one-msg")), ("ring", ("all", "all-msg"))) for name in names}
            print(f"{COMM.size} ranks, {mib:g} MiB: " + "  ".join(f"{n} {t:.3f} ms" for n, t in medians.items())
                  + "".join(f"  {name} {ratio:.2f}x" for name, ratio in ratios.items()), flush=True)
        for transport in transports.values():
            transport.free()


if __name__ == "__main__":
    main()
