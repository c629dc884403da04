"""In step the servers take the ring's steps; out of step every task counts once, within the bound, as a replay says."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest

from hpcmlp.comm.served import Roles, Served
from hpcmlp.comm.served_node import ServedOnNode
from hpcmlp.errors import ConfigError
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import Average, make_optimizer
from hpcmlp.ops.host import HostOps
from hpcmlp.sync.buckets import cut
from hpcmlp.sync.server import Apart, check_options, read_staleness
from hpcmlp.sync.step import Step
from hpcmlp.sync.storage import describe_slices, one_bucket
from hpcmlp.sync.strategy import SlicedUpdate
from hpcmlp.sync.tasks import Tasks

SPEC = NetworkSpec((7, 19, 19, 3), "tanh", layer_norm=True)
ROWS = 23       # of a global batch: never a multiple of the workers
STEPS_PER_EPOCH = 5


class Rows:
    """The samples [start, stop) of global batch `number`, in the form of data.loader.Batch."""

    def __init__(self, start, stop, number):
        random = np.random.default_rng(number % STEPS_PER_EPOCH)
        self.source = random.standard_normal((ROWS, 7), dtype=np.float32)
        labels = random.integers(0, 3, ROWS).astype(np.int32)
        self.index, self.targets = np.arange(start, stop), labels[start:stop]
        self.weights = random.random(ROWS, dtype=np.float32)[start:stop]
        self.first, self.rows, self.global_rows = start, stop - start, ROWS


class WholeLoader:
    """A loader of whole global batches."""

    steps_per_epoch, mode, local_rows_max = STEPS_PER_EPOCH, "resident", ROWS

    def batch(self, epoch, t):
        return Rows(0, ROWS, epoch * STEPS_PER_EPOCH + t)


class Alone:
    """The collective of one rank."""

    part, size, narrow, bytes_sent = 0, 1, False, 0

    def reduce_scatter(self, array, bounds, words=None):
        pass

    def all_gather(self, array, bounds):
        pass

    def empty(self, size, dtype):
        return np.zeros(size, dtype)

    common = empty


def make_step(collective, buckets, size, **options):
    ops, layout = HostOps(), SPEC.layout()
    params, grads = collective.common(layout.size, np.float32), collective.empty(layout.size, np.float32)
    network = Network(SPEC, ops, ROWS, params, grads)
    network.params[...] = initialize(SPEC, 3, "auto", np.float32)
    strategy = SlicedUpdate(collective, buckets, size, network.params, network.grads, ops)
    rule = make_optimizer("adamw", ops, layout, strategy.ranges, np.float32)
    average = Average(ops, strategy.ranges, 0.9, np.float32)
    average.start(network.params)
    return Step(network, Loss("softmax_cross_entropy"), rule, strategy, ops, rows=ROWS, average=average, **options)


def make_alone(**options):
    return make_step(Alone(), one_bucket(SPEC.layout().size, Roles(1, 1)), 1, **options)


@pytest.fixture
def served_step(comm, topology, given_back):
    """A function that returns the roles of the ranks and a step over `servers` of them."""
    def make(servers, on_node=False, **options):
        roles = Roles(servers, comm.size)
        served = given_back(ServedOnNode(topology, servers) if on_node else Served(comm, servers, segment_bytes=256))
        return roles, make_step(served, one_bucket(SPEC.layout().size, roles), comm.size, **options)
    return make


@pytest.fixture
def make_apart(comm, served_step, given_back):
    """A function that returns the training out of step on `servers` servers."""
    def make(servers, staleness, *, staleness_lr=False, timeout_s=60.0, **options):
        roles, step = served_step(servers, **options)
        tasks = Tasks(WholeLoader(), len(roles.workers)) if comm.rank in roles.workers else None
        return given_back(Apart(comm, roles, step, tasks, staleness=staleness, staleness_lr=staleness_lr,
                                timeout_s=timeout_s, learning_rate=lambda number: 0.01 / (1 + number // 10)))
    return make


def no_fault(first, last):
    return False


def run(apart, start, stop, strike=no_fault, wants_stop=lambda: False, on_step=lambda *facts: None):
    return apart.run(start, stop, wants_stop=wants_stop, strike=strike, on_step=on_step,
                     on_loss=lambda number, text: pytest.fail(text))


def everyone_has(comm, array):
    everyone = np.empty((comm.size, array.size), array.dtype)
    comm.Allgather(array, everyone)
    return bool((everyone == everyone[0]).all())


# ---- in step

@pytest.mark.mpi
@pytest.mark.parametrize("on_node", [False, True])
@pytest.mark.parametrize("servers, steps", [(1, 200), (2, 40), (3, 40), ("all", 200)])
def test_in_step_it_is_the_ring_to_rounding(comm, servers, steps, on_node, opened, served_step):
    servers = comm.size if servers == "all" else servers
    if servers > comm.size:
        pytest.skip("more servers than ranks")
    roles, step = served_step(servers, on_node, clip_norm=0.5)
    share = roles.share(comm.rank)
    ring = opened("ring")
    other = make_step(ring, cut(SPEC.layout().size, SPEC.layer_starts(), 300, comm.size), comm.size, clip_norm=0.5)
    for k in range(steps):
        number, count = share or (0, ROWS + 1)
        mine = Rows(number * ROWS // count, (number + 1) * ROWS // count, k) if share else Rows(0, 0, k)
        result = step.run(mine, k, 0.003, check=k % 7 == 0)
        theirs = other.run(Rows(comm.rank * ROWS // comm.size, (comm.rank + 1) * ROWS // comm.size, k), k, 0.003)
        assert result.replicas_agree and result.rows == ROWS
        assert result.loss == pytest.approx(theirs.loss, rel=1e-4)
    np.testing.assert_allclose(step.network.params, other.network.params, rtol=2e-3, atol=2e-4)
    assert everyone_has(comm, step.network.params)


# ---- out of step

@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("staleness", [1, 2, math.inf])
@pytest.mark.parametrize("servers", [1, 2, 3])
def test_every_task_counts_once_and_all_ranks_end_alike(comm, servers, staleness, make_apart):
    if servers >= comm.size:
        pytest.skip("no worker left")
    apart = make_apart(servers, staleness)
    random = np.random.default_rng(comm.rank)
    slow = 4.0 if comm.rank == comm.size - 1 else 1.0

    def strike(first, last):
        time.sleep(slow * random.exponential(2e-4))
        return False

    losses = []
    for start, stop in ((0, 5), (5, 17)):
        came = run(apart, start, stop, strike, on_step=lambda number, result, s: losses.append((number, result)))
        assert (came.version, came.lost, came.skipped) == (stop, [], 0)
        assert came.rows == (stop - start) * ROWS
        apart.step.strategy.share()
    assert everyone_has(comm, apart.step.network.params)
    if comm.rank == 0:
        assert [number for number, _ in losses] == list(range(17))
        report, workers = apart.report(), comm.size - servers
        assert sum(report["staleness"].values()) == 17 * workers
        assert max(map(int, report["staleness"])) <= staleness
        assert {w["rank"] for w in report["workers"]} <= set(range(servers, comm.size))
        assert report["bytes_pushed"] == report["bytes_pulled"] == 17 * workers * 4 * SPEC.layout().size


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("options", [{}, {"staleness_lr": True}, {"clip_norm": 0.02}])
@pytest.mark.parametrize("servers", [1, 2])
def test_a_replay_of_what_server_0_decided_gives_the_same_parameters(comm, servers, options, make_apart):
    if servers >= comm.size:
        pytest.skip("no worker left")
    apart = make_apart(servers, math.inf, **options)
    decided, add = [], apart.ledger.add

    def recording(worker):
        task = apart.ledger.out[worker].task
        decided.append((task, add(worker)))
        return decided[-1][1]

    apart.ledger.add = recording

    def strike(first, last):
        time.sleep(2e-3 if comm.rank == comm.size - 1 else 1e-4)
        return False

    run(apart, 0, 20, strike)
    apart.step.strategy.share()
    average = apart.step.strategy.whole(apart.step.average.array)
    if comm.rank == 0:
        alone, slots = make_alone(), comm.size - servers
        tasks = Tasks(WholeLoader(), slots)
        versions = [alone.network.params.copy()]
        for number in range(20):
            total, weight = np.zeros_like(alone.network.grads), 0.0
            for task, staleness in decided[number * slots:(number + 1) * slots]:
                alone.network.params[...] = versions[number - staleness]
                alone.words.clear()
                alone._gradient(tasks.task(task), task // slots)
                mine = alone.network.grads.copy()
                norm = np.linalg.norm(mine.astype(np.float64)) / alone.words.weight
                if options.get("clip_norm"):
                    mine *= min(1.0, options["clip_norm"] / norm)
                total += mine / (max(1, staleness) if options.get("staleness_lr") else 1)
                weight += alone.words.weight
            alone.network.params[...] = versions[-1]
            alone.network.grads[...] = total
            alone.strategy.update(alone.optimizer, 0.01 / (1 + number // 10), number + 1, 1.0 / weight)
            alone.average.update(alone.network.params)
            versions.append(alone.network.params.copy())
        np.testing.assert_allclose(apart.step.network.params, versions[-1], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(average, alone.average.array, rtol=1e-3, atol=1e-4)


@pytest.mark.mpi(min_size=2)
def test_one_worker_takes_the_steps_of_one_rank(comm, make_apart):
    apart, alone = make_apart(comm.size - 1, 3), make_alone()
    losses = []
    run(apart, 0, 12, on_step=lambda number, result, seconds: losses.append(result.loss))
    want = [alone.run(Rows(0, ROWS, k), k, 0.01 / (1 + k // 10)).loss for k in range(12)]
    if comm.rank == 0:
        assert losses == pytest.approx(want, rel=1e-5)
    apart.step.strategy.share()
    np.testing.assert_allclose(apart.step.network.params, alone.network.params, rtol=1e-5, atol=1e-6)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("servers, staleness", [(1, 1), (2, 2), (1, math.inf)])
def test_ten_thousand_messages_in_a_random_schedule_finish(comm, servers, staleness, make_apart):
    if servers >= comm.size:
        pytest.skip("no worker left")
    apart = make_apart(servers, staleness)
    random = np.random.default_rng([comm.rank, servers])
    tasks = []
    if apart.tasks is not None:
        take = apart.tasks.task
        apart.tasks.task = lambda number: tasks.append(number) or take(number)

    def strike(first, last):
        if random.random() < 0.1:
            time.sleep(random.exponential(1e-3))
        return False

    # A task takes a slice to and from each server, words, a grant, and two orders to every server but the first.
    per_task = 2 * servers + 2 + 2 * (servers - 1)
    steps = -(-10_000 // (3 * per_task * (comm.size - servers)))
    for k in range(3):
        assert run(apart, k * steps, (k + 1) * steps, strike).version == (k + 1) * steps
        apart.step.strategy.share()
    done = sorted(task for own in comm.allgather(tasks) for task in own)
    assert done == list(range(3 * steps * (comm.size - servers))) and len(done) * per_task >= 10_000


@pytest.mark.mpi(min_size=2)
def test_a_stop_asked_by_one_worker_ends_the_stretch_for_all_at_one_step(comm, make_apart):
    apart = make_apart(1, 2)
    asked = []

    def wants_stop():
        asked.append(True)
        return comm.rank == comm.size - 1 and len(asked) == 3

    def strike(first, last):
        time.sleep(1e-3)
        return False

    came = run(apart, 0, 500, strike, wants_stop)
    assert came.stop and 0 < came.version < 500
    everyone = comm.allgather(came.version)
    assert len(set(everyone)) == 1
    apart.step.strategy.share()
    again = run(apart, came.version, came.version + 3)
    assert again.version == came.version + 3 and not again.stop


@pytest.mark.mpi(min_size=2)
def test_numbers_that_are_not_finite_skip_the_update_on_all_servers(comm, make_apart):
    servers = max(1, comm.size - 2)
    apart = make_apart(servers, 1)
    if apart.tasks is not None:
        good = apart.tasks.task

        def task(number):
            batch = good(number)
            if number // apart.slots == 2:
                batch.source[:] = np.nan
            return batch
        apart.tasks.task = task
    came = run(apart, 0, 6)
    apart.step.strategy.share()
    assert came.version == 6 and 1 <= came.skipped <= 2 and came.skips == 0
    assert np.isfinite(apart.step.network.params).all() and everyone_has(comm, apart.step.network.params)


# ---- options and descriptions

def options(**given):
    kept = {"servers": None, "staleness": None, "staleness_lr": False, "worker_timeout": None, "full_update": False,
            "bucket_mb": 32.0, "trace": False, "device": "cpu", "optimizer": "adamw", "clip_norm": None,
            "local_steps": 1, "outer_optimizer": "none", "overlap": None}
    return type("Options", (SimpleNamespace,), {"bucket_mb": 32.0})(**{**kept, **given})


@pytest.mark.parametrize("given, size, said", [
    ({"servers": 3}, 2, "--servers 3 with 2 ranks"),
    ({"full_update": True}, 2, "--full-update has no effect"),
    ({"bucket_mb": 1.0}, 2, "--bucket-mb has no effect"),
    ({"local_steps": 4}, 2, "--local-steps has no effect"),
    ({"overlap": True}, 2, "--overlap has no effect"),
    ({"staleness_lr": True}, 2, "--staleness-lr has no effect with --staleness 0"),
    ({"worker_timeout": 2.0}, 2, "--worker-timeout has no effect"),
    ({"staleness": "3", "servers": 2}, 2, "needs dedicated servers"),
    ({"staleness": "async"}, 1, "needs dedicated servers"),
    ({"staleness": "-1"}, 2, "give a number of steps from 0"),
    ({"staleness": "2", "trace": True}, 2, "--trace does not go"),
    ({"staleness": "2", "device": "gpu"}, 2, "--device gpu does not go"),
    ({"staleness": "async", "optimizer": "lamb"}, 2, "lamb does not go"),
])
def test_what_does_not_go_together_is_one_sentence(given, size, said):
    with pytest.raises(ConfigError, match=said):
        check_options(options(**given), size)


def test_what_goes_together_passes():
    check_options(options(), 1)
    check_options(options(servers=4, optimizer="lamb", trace=True), 4)
    check_options(options(staleness="async", worker_timeout=3.0, staleness_lr=True, clip_norm=1.0), 3)
    assert read_staleness("async") == math.inf and read_staleness(None) == 0.0 and read_staleness("4") == 4.0


def test_slices_are_contiguous_aligned_and_described():
    found = describe_slices(1001, Roles(3, 5), 2, 70, "4")
    assert [s["start"] % 16 for s in found["slices"]] == [0, 0, 0]
    assert [s["stop"] for s in found["slices"][:-1]] == [s["start"] for s in found["slices"][1:]]
    assert found["slices"][0]["start"] == 0 and found["slices"][-1]["stop"] == 1001
    assert sum(s["bytes"] for s in found["slices"]) == 4004 and found["workers"] == [3, 4]
    assert {s["version"] for s in found["slices"]} == {70}
