"""Time one push and pull of a whole vector through one server, by several transports, and through slices on all ranks.

    mpiexec -n 4 python benchmarks/server_transport.py [--mib 0.5,4,16] [--rounds 30]

Per size, in alternation, the median over rounds of the slowest rank's time in ms:

gather    mpi4py at the root: Gather, sum of the rows in order, Bcast (rank 0 is the server, the others workers).
window    MPI-3 one-sided: every worker puts its vector into a place of its own in the server's window (passive target,
          flush) and tells the server by an empty message, without which it could not know; the server adds and tells
          the workers, who get the sum.
one       `comm.served.Served` with one dedicated server: push, ordered sum, pull.
all       `Served` with as many servers as ranks; the gradients of all ranks count.
ring      `comm.ring.Ring`: reduce-scatter and all-gather, for the same work as `all`.
"""

import argparse
import statistics
import time

from hpcmlp import launch

COMM = launch.open_world().comm

import numpy as np  # noqa: E402  (open_world sets the BLAS threads before NumPy is loaded)
from mpi4py import MPI  # noqa: E402

from hpcmlp.comm.ring import Ring  # noqa: E402
from hpcmlp.comm.served import Served  # noqa: E402
from hpcmlp.sync.buckets import part_bounds  # noqa: E402

WORDS = 9


class Gathered:
    """Gather at the root, sum, Bcast."""

    def __init__(self, array):
        self.array = array
        self.rows = np.empty((COMM.size, array.size), np.float32) if COMM.rank == 0 else None

    def run(self):
        COMM.Gather(self.array, self.rows, 0)
        if COMM.rank == 0:
            np.copyto(self.array, self.rows[1])
            for row in self.rows[2:]:
                np.add(self.array, row, self.array)
        COMM.Bcast(self.array, 0)


class Window:
    """Put, notify, add, notify, get."""

    def __init__(self, array):
        self.array, self.nothing = array, np.zeros(0, np.uint8)
        rows = COMM.size if COMM.rank == 0 else 0       # row 0: the sum
        self.window = MPI.Win.Allocate(4 * array.size * rows, 4, comm=COMM)
        self.memory = np.frombuffer(self.window.tomemory(), np.float32).reshape(rows, array.size) if rows else None
        self.window.Lock_all()

    def run(self):
        window, array = self.window, self.array
        if COMM.rank == 0:
            for worker in range(1, COMM.size):
                COMM.Recv(self.nothing, worker, 1)
            window.Sync()
            np.copyto(self.memory[0], self.memory[1])
            for row in self.memory[2:]:
                np.add(self.memory[0], row, self.memory[0])
            window.Sync()
            for worker in range(1, COMM.size):
                COMM.Send(self.nothing, worker, 2)
            for worker in range(1, COMM.size):      # nobody may put before all have got
                COMM.Recv(self.nothing, worker, 3)
            for worker in range(1, COMM.size):
                COMM.Send(self.nothing, worker, 4)
        else:
            window.Put(array, 0, (array.size * COMM.rank, array.size, MPI.FLOAT))
            window.Flush(0)
            COMM.Send(self.nothing, 0, 1)
            COMM.Recv(self.nothing, 0, 2)
            window.Get(array, 0, (0, array.size, MPI.FLOAT))
            window.Flush(0)
            COMM.Send(self.nothing, 0, 3)
            COMM.Recv(self.nothing, 0, 4)


class Collective:
    """Reduce-scatter with control words, all-gather."""

    def __init__(self, collective, array, bounds):
        self.collective, self.array, self.bounds, self.words = collective, array, bounds, np.zeros(WORDS)

    def run(self):
        self.collective.reduce_scatter(self.array, self.bounds, self.words)
        self.collective.all_gather(self.array, self.bounds)


def ways(size):
    """Return the transports by name, each with an array of its own of `size` float32."""
    def array():
        return np.zeros(size, np.float32)
    every = part_bounds(size, COMM.size)
    one = np.array([0] + [size] * COMM.size)
    return {"gather": Gathered(array()), "window": Window(array()), "one": Collective(Served(COMM, 1), array(), one),
            "all": Collective(Served(COMM, COMM.size), array(), every), "ring": Collective(Ring(COMM), array(), every)}


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
                COMM.Barrier()
                begin = time.perf_counter()
                transport.run()
                took = np.array([time.perf_counter() - begin])
                COMM.Allreduce(MPI.IN_PLACE, took, MPI.MAX)
                if turn >= 3:
                    times[name].append(1e3 * took[0])
        if COMM.rank == 0:
            medians = {name: statistics.median(values) for name, values in times.items()}
            print(f"{COMM.size} ranks, {mib:g} MiB: " + "  ".join(f"{n} {t:.2f} ms" for n, t in medians.items())
                  + f"  one/gather {medians['gather'] / medians['one']:.2f}x  all/ring "
                  f"{medians['ring'] / medians['all']:.2f}x", flush=True)
        transports["window"].window.Unlock_all()
        transports["window"].window.Free()


if __name__ == "__main__":
    main()
