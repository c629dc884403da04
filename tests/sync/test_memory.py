"""What a rank holds is what the formula says, measured; a network beyond one rank's limit trains over several."""

import gc
import resource
import sys

import numpy as np
import pytest

from hpcmlp.comm import open_exchange
from hpcmlp.comm.topology import Topology
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import make_optimizer
from hpcmlp.ops.host import HostOps
from hpcmlp.sync.buckets import cut
from hpcmlp.sync.memory import buffer_elements, state_bytes
from hpcmlp.sync.sharded import ShardedStep, open_sharded
from hpcmlp.sync.step import Step
from hpcmlp.sync.strategy import WholeUpdate

SPEC = NetworkSpec((64, *[768] * 12, 10))
ROWS = 4
MIB = 2**20


class Rows:
    """A few samples in the form of data.loader.Batch."""

    def __init__(self, size):
        random = np.random.default_rng(0)
        self.source = random.standard_normal((ROWS, 64), dtype=np.float32)
        self.index, self.targets = np.arange(ROWS), random.integers(0, 10, ROWS).astype(np.int32)
        self.weights, self.first, self.rows, self.global_rows = None, 0, ROWS, ROWS * size


def train(comm, name, sharded, steps=3):
    """Take some steps of Adam, and return everything that they need."""
    ops, layout, topology = HostOps(), SPEC.layout(), Topology(comm)
    size = sum(buffer_elements(SPEC)) if sharded else layout.size
    exchange = open_exchange(name, topology, size, np.float32, own_params=not sharded, by_layer=sharded)
    assert exchange.name == name, exchange.note
    if sharded:
        network, strategy = open_sharded(exchange, SPEC, comm.size, ops, ROWS)
    else:
        network = Network(SPEC, ops, ROWS, exchange.params, exchange.grads)
        strategy = WholeUpdate(exchange.collective, cut(layout.size, SPEC.layer_starts(), 1, comm.size), comm.size,
                               network.params, network.grads, ops)
    optimizer = make_optimizer("adam", ops, layout, strategy.ranges, np.float32)
    step = (ShardedStep if sharded else Step)(network, Loss("softmax_cross_entropy"), optimizer, strategy, ops,
                                              rows=ROWS)
    strategy.params[...] = 0.01
    comm.Barrier()
    for number in range(steps):
        assert not step.run(Rows(comm.size), number, 1e-3).skipped
    return exchange, step


def end(exchange, step):
    """Wait for what the last step has started, which is received into memory that goes now, and give it back."""
    step.strategy.finish()
    exchange.collective.free()


def pss_bytes():
    """This process's share of memory: a page that k processes have in common counts as 1/k."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("Pss:"))


def test_the_formula_is_a_sum_of_what_is_held():
    spec = NetworkSpec((100, 300, 200, 10))     # layers of 30,304, 60,208 and 2,016 numbers with padding
    assert buffer_elements(spec) == (30_304, 60_208)
    assert state_bytes(spec, 2, 4, whole_update=True) == 16 * 92_528
    assert state_bytes(spec, 2, 4) == (4 + 4 + 8 / 4) * 92_528
    assert state_bytes(spec, 2, 4, common=4) == (4 / 4 + 4 + 8 / 4) * 92_528
    assert state_bytes(spec, 2, 4, sharded=True) == 16 * 92_528 / 4 + 8 * 90_512
    assert state_bytes(spec, 1, 2, sharded=True, common=2) == 12 * 92_528 / 2 + 6 * 90_512


@pytest.mark.parametrize("name", ["ring", "shared"])
def test_a_rank_holds_what_the_formula_says(run_ranks, name):
    # Large arrays are given back to the system when they are freed, so that each of them is seen.
    env = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = run_ranks(4, __file__, name, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    measured = float(done.stdout)
    expected = state_bytes(SPEC, 2, 4, sharded=True, common=4 if name == "shared" else 1)
    goal = state_bytes(SPEC, 2, 1, whole_update=True) / 4 + 16 * max(b - a for a, b in SPEC.layer_spans())
    # The ring has buffers of its own, two segments for each shape of a layer in each of the two buffers, and messages.
    assert 0.97 * expected < measured < expected + (4 if name == "ring" else 2) * MIB
    assert expected <= goal and (name == "ring" or measured <= goal)


def measure(comm, name):
    """Print the bytes that the largest rank takes for parameters, gradients and optimizer state."""
    end(*train(comm, name, True, steps=1))      # what libraries keep for themselves
    gc.collect()
    comm.Barrier()
    before = pss_bytes()
    comm.Barrier()
    kept = train(comm, name, True)
    comm.Barrier()
    taken = np.array([float(pss_bytes() - before)])
    comm.Allreduce(MPI.IN_PLACE, taken, MPI.MAX)
    if comm.rank == 0:
        print(taken[0], flush=True)
    end(*kept)


def test_a_network_beyond_one_ranks_limit_trains_over_all(run_ranks):
    done = run_ranks(3, __file__, env={"OPENBLAS_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("too large") == done.stdout.count("trained") == 3


def train_beyond_the_limit(comm):
    """What the test starts in processes of their own, in whose memory nothing has been given back yet."""
    whole = state_bytes(SPEC, 2, 1, whole_update=True)
    open_exchange("ring", Topology(comm), 100, np.float32).collective.all_reduce(np.ones(2**20, np.float32))
    np.ones((768, 768), np.float32) @ np.ones((768, 768), np.float32)       # the BLAS's own buffers
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + int(0.8 * whole), resource.RLIM_INFINITY))
    try:
        train(comm, "ring", False)
    except MemoryError:
        print("too large")
    gc.collect()
    exchange, step = train(comm, "ring", True, steps=4)
    losses = [step.run(Rows(comm.size), number, 1e-3).loss for number in range(4, 8)]
    print("trained" if losses[-1] < losses[0] else losses, flush=True)
    end(exchange, step)


if __name__ == "__main__":
    from mpi4py import MPI
    if sys.argv[1:]:
        measure(MPI.COMM_WORLD, sys.argv[1])
    else:
        train_beyond_the_limit(MPI.COMM_WORLD)
