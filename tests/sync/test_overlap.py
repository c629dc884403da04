"""Messages that travel while the ranks compute: the bits of the plain strategy, whatever else a step does."""

import threading
import time
import weakref

import numpy as np
import pytest

from hpcmlp.comm import make_collective, make_ring
from hpcmlp.comm.shared import Shared
from hpcmlp.nn import network as network_module
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import Average, make_optimizer
from hpcmlp.ops.device import DeviceOps
from hpcmlp.ops.host import HostOps
from hpcmlp.ops.staging import Late
from hpcmlp.sync import buckets, make_strategy, plan
from hpcmlp.sync.overlap import Progress, find_bucket_mb
from hpcmlp.sync.step import Step, StepResult

ROWS = 24
SPEC = NetworkSpec((7, 200, 70, 3), "tanh", layer_norm=True)
PIECE = 300     # elements: with pieces of at least 64 rows the first layer is cut into three, the second stays whole


class Rows:
    """A local batch in the form of data.loader.Batch: this rank's slice of fixed samples, the last one longer."""

    def __init__(self, comm, step):
        random = np.random.default_rng(step)
        self.source = random.standard_normal((ROWS, 7), dtype=np.float32)
        start, stop = comm.rank * (ROWS - 1) // comm.size, (comm.rank + 1) * (ROWS - 1) // comm.size
        self.index = np.arange(start, stop + (comm.rank == comm.size - 1))
        self.targets = random.integers(0, 3, ROWS).astype(np.int32)[self.index]
        self.weights = random.random(ROWS, dtype=np.float32)[self.index]
        self.first, self.rows, self.global_rows = start, len(self.index), ROWS


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(network_module, "PIECE_ROWS", 64)


def make_step(collective, size, overlap, *, bucket=300, spec=SPEC, optimizer="adamw", ops=None, **options):
    """The same buckets and pieces with and without overlap: then only the time at which messages travel differs."""
    ops = ops or HostOps()
    layout = spec.layout()
    host = collective.common(layout.size, np.float32), collective.empty(layout.size, np.float32)
    network = Network(spec, ops, ROWS, *((None, None) if ops.plans else host), piece=PIECE)
    network.params[...] = initialize(spec, 3, "auto", np.float32)
    cut = buckets.cut(layout.size, spec.closings(PIECE), bucket, size)
    strategy = make_strategy(False, collective.narrow, overlap)(collective, cut, size, network.params, network.grads,
                                                                ops, host)
    if not overlap:    # the plain strategy reads whole weights in its forward pass: let it read the same pieces
        forward = network.forward
        network.forward = lambda *args, need=None, **kwargs: forward(*args, need=lambda start, stop: None, **kwargs)
    rule = make_optimizer(optimizer, ops, layout, strategy.ranges, np.float32)
    average = Average(ops, strategy.ranges, 0.9, np.float32)
    average.start(network.params)
    return Step(network, Loss("softmax_cross_entropy"), rule, strategy, ops, rows=ROWS, average=average, **options)


@pytest.fixture
def collectives(comm, topology, nodes_of):
    """Makers of everything that messages go through, with one node and with pretended ones."""
    makers = {"ring": lambda: make_collective("ring", topology), "bf16": lambda: make_ring(comm, "bf16"),
              "int8": lambda: make_ring(comm, "int8"), "one node": lambda: Shared(topology)}
    for per_node in range(1, comm.size):
        if comm.size % per_node == 0:
            nodes = nodes_of(per_node)
            makers[f"nodes of {per_node}"] = lambda nodes=nodes: Shared(nodes)
            makers[f"nodes of {per_node}, bf16"] = lambda nodes=nodes: Shared(
                nodes, lambda cross: make_ring(cross, "bf16"))
    return makers


def train(comm, make, overlap, steps=5, disturb=lambda comm, k, batch, step: None, **options):
    """Take steps; return the results, the parameters and the average at the end, and what was carried."""
    collective = make()
    step = make_step(collective, comm.size, overlap, **options)
    results = []
    for k in range(steps):
        batch = Rows(comm, k)
        disturb(comm, k, batch, step)
        results.append(step.run(batch, k, 0.01, check=k == 2, want_norm=k == 3, stop=k == 4 and comm.rank == 0))
    average = step.strategy.whole(step.average.array)
    carried = step.strategy.carried()
    flats = {"params": step.network.params.copy(), "average": average, **carried}
    comm.Barrier()
    del step
    collective.free()
    return results, flats


def facts(result):
    """What must not depend on when messages travel: not times, nor in which step and by which way bytes are sent."""
    return {name: value for name, value in vars(result).items() if not name.endswith("_s") and name != "bytes_sent"}


def check_same(comm, collectives, **options):
    for name, make in collectives.items():
        plain, expected = train(comm, make, False, **options)
        got, flats = train(comm, make, True, **options)
        for k, (one, other) in enumerate(zip(plain, got, strict=True)):
            assert repr(facts(one)) == repr(facts(other)), (name, k)
        for kind, flat in expected.items():
            assert flat.tobytes() == flats[kind].tobytes(), (name, kind)
        said = comm.allgather(flats["params"].tobytes())
        assert all(one == said[0] for one in said), name


OPTIONS = {
    "one bucket": {"bucket": 10**9},
    "small buckets": {"bucket": 1},
    "clipped, in micro-batches": {"clip_norm": 0.05, "micro_batches": 3},
    "dropout": {"spec": NetworkSpec((7, 130, 130, 3), "relu", dropout=0.4, residual=True), "seed": 5},
    "norms of layers": {"optimizer": "lamb"},
}


@pytest.mark.mpi
def test_staged_vectors_change_no_bit(comm, collectives):
    """On a device whose copies are as late as waits allow, and are no numbers before."""
    check_same(comm, collectives, ops=DeviceOps(np))


@pytest.mark.mpi
def test_staged_parameters_that_nobody_waited_for_show(comm, collectives, monkeypatch):
    monkeypatch.setattr(Late, "settle", lambda stage: None)
    results, _ = train(comm, collectives["ring"], True, ops=DeviceOps(np))
    assert results[1].not_finite == comm.size


@pytest.mark.mpi
@pytest.mark.parametrize("case", OPTIONS)
def test_a_step_has_the_bits_of_the_plain_strategy(comm, case, collectives):
    check_same(comm, collectives, **OPTIONS[case])


@pytest.mark.mpi
def test_gathers_that_end_between_two_steps_change_nothing(comm, collectives):
    def disturb(comm, k, batch, step):
        if k == 2:
            step.strategy.whole(step.average.array)     # as a validation or a checkpoint does
        if k == 3:
            step.strategy.finish()

    check_same(comm, collectives, disturb=disturb)


@pytest.mark.mpi
def test_one_rank_with_nan_makes_all_ranks_skip_and_nothing_of_it_stays(comm, collectives):
    def disturb(comm, k, batch, step):
        if k == 1 and comm.rank == comm.size - 1:
            batch.source[:] = np.nan

    for name, make in collectives.items():
        before = train(comm, make, True, steps=1)[1]["params"]
        after = train(comm, make, True, steps=2, disturb=disturb)
        assert [r.skipped for r in after[0]] == [False, True], name
        assert after[1]["params"].tobytes() == before.tobytes(), name
        results, flats = train(comm, make, True, disturb=disturb)
        assert [r.skipped for r in results] == [False, True, False, False, False], name
        assert all(np.isfinite(flat).all() for flat in flats.values()), name


@pytest.mark.mpi
def test_a_library_that_lets_one_thread_in_is_served_between_the_layers(comm, topology):
    def make():
        ring = make_collective("ring", topology)
        ring.threads = False
        return ring

    number = threading.active_count()
    expected = train(comm, lambda: make_collective("ring", topology), False)[1]
    collective = make()
    step = make_step(collective, comm.size, True)
    assert threading.active_count() == number
    for k in range(5):
        step.run(Rows(comm, k), k, 0.01)
    step.strategy.finish()
    assert step.network.params.tobytes() == expected["params"].tobytes()
    collective.free()


@pytest.mark.mpi(min_size=2)
def test_messages_move_while_nobody_asks(comm, topology):
    collective = make_collective("ring", topology)
    assert collective.threads   # the harness opens MPI as a run does
    progress, array = Progress(collective), np.ones(400_000, np.float32)
    bounds = buckets.part_bounds(array.size, comm.size)
    with progress.lock:
        operations = [collective.start_reduce_scatter(array, bounds)]
        progress.watch()
    deadline = time.monotonic() + 20
    while not operations[0].ended and time.monotonic() < deadline:
        time.sleep(0.001)
    assert operations[0].ended > operations[0].began
    own = array[bounds[comm.rank]:bounds[comm.rank + 1]]
    assert (own == comm.size).all()
    with progress.lock:
        operations[0].wait()
    collective.free()


def test_the_thread_ends_with_its_owner():
    class Nothing:
        threads = True

        def advance(self):
            return True

    number = threading.active_count()
    progress = Progress(Nothing())
    assert threading.active_count() == number + 1
    seen = weakref.ref(progress)
    progress.watch()
    del progress
    deadline = time.monotonic() + 10
    while threading.active_count() > number and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == number and seen() is None


@pytest.mark.mpi
def test_times_are_told(comm, topology):
    collective = make_collective("ring", topology)
    step = make_step(collective, comm.size, True)
    began = time.perf_counter()
    results = [step.run(Rows(comm, k), k, 0.01) for k in range(4)]
    whole = time.perf_counter() - began
    step.strategy.finish()
    assert all(r.compute_s > 0 and r.comm_s > 0 for r in results)
    assert sum(r.compute_s + r.comm_s for r in results) <= whole
    assert sum(r.flight_s for r in results) <= whole
    assert (sum(r.flight_s for r in results) > 0) == (comm.size > 1)
    collective.free()


def test_hidden_is_the_share_of_the_flight_that_was_not_waited_for():
    assert StepResult(comm_s=1.0, flight_s=4.0).hidden == 0.75
    assert StepResult(comm_s=4.0, flight_s=1.0).hidden == 0.0
    assert StepResult().hidden == 0.0


@pytest.mark.mpi
def test_the_plan_of_a_step(comm, topology):
    spec = NetworkSpec((7, 2000, 3))    # 23,000 parameters
    ring, native = (make_collective(name, topology) for name in ("ring", "native"))
    alone = comm.size == 1
    planned = plan(spec, ring, comm.size, 1)
    assert (planned.overlap, planned.piece, planned.bucket_mb, len(planned.buckets)) == (False, None, 32.0, 1)
    assert not plan(spec, native, comm.size, comm.size, 0.01, True).overlap
    assert not plan(spec, ring, comm.size, 2, 0.01, False).overlap
    planned = plan(spec, ring, comm.size, 2, 0.01)
    assert planned.overlap != alone
    if not alone:
        assert len(planned.buckets) > 2    # more than layers
        assert [b.start for b in planned.buckets] == sorted((b.start for b in planned.buckets), reverse=True)
        assert {b.start for b in planned.buckets} <= set(spec.closings(planned.piece))
        assert not plan(spec, ring, comm.size, 2).overlap   # the least bucket holds it all: one message
        found = find_bucket_mb(ring)
        assert set(comm.allgather(found)) == {found} and 2**-4 <= found <= 32
    ring.free()
    native.free()


def test_the_bucket_follows_latency_and_bandwidth():
    class Link:
        def __init__(self, least):
            self.least = least

        def least_bytes(self, delay_s, loss):
            assert delay_s > 0 and 0 < loss < 1
            return self.least

    assert [find_bucket_mb(Link(least)) for least in (1, 2**20, 1.3 * 2**20, 3 * 2**20, 2**40)] == [1 / 16, 1, 1, 4, 32]
