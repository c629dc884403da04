"""Local steps against a plain simulation of all ranks in one process, and what happens where the ranks meet."""

import numpy as np
import pytest

from hpcmlp.comm import make_ring
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import Average, make_optimizer
from hpcmlp.ops.device import DeviceOps
from hpcmlp.ops.host import HostOps
from hpcmlp.sync import make_strategy
from hpcmlp.sync.buckets import cut
from hpcmlp.sync.local import LocalStep
from hpcmlp.sync.step import Step

SPEC = NetworkSpec((5, 9, 3), "tanh")
ROWS = 23
LR = 0.05
OUTER = {"outer_optimizer": "nesterov", "outer_lr": 0.6, "outer_momentum": 0.8}


class Rows:
    """A local batch in the form of data.loader.Batch: the slice [start, stop) of the samples of a step."""

    def __init__(self, start, stop, step):
        self.source, self.labels, self.sample_weights = samples(step)
        self.index = np.arange(start, stop)
        self.targets, self.weights = self.labels[start:stop], self.sample_weights[start:stop]
        self.first, self.rows, self.global_rows = start, stop - start, ROWS


def samples(step):
    random = np.random.default_rng(step)
    x = random.standard_normal((ROWS, 5), dtype=np.float32)
    return x, random.integers(0, 3, ROWS).astype(np.int32), random.random(ROWS, dtype=np.float32)


def shares(rank, size):
    """Uneven shares: rank 0 has few rows, the last one most."""
    bounds = [ROWS * (r * r + r) // (size * size + size) for r in range(size + 1)]
    return bounds[rank], bounds[rank + 1]


def first_params():
    flat = np.zeros(SPEC.layout().size, np.float32)
    random = np.random.default_rng(1)
    for view in SPEC.layout().views(flat).values():
        view[...] = 0.5 * random.standard_normal(view.shape)
    return flat


class Alone:
    """The collective of one rank."""

    part, narrow, bytes_sent = 0, False, 0

    def empty(self, size, dtype):
        return np.zeros(size, dtype)

    common = empty

    def reduce_scatter(self, array, bounds, words=None):
        pass

    def all_gather(self, array, bounds):
        pass

    def all_reduce(self, array, words=None):
        pass


def make_step(collective, size, local_steps, *, optimizer="sgd", ema=None, whole=False, ops=None, outer=None,
              **options):
    """A LocalStep with meetings after every `local_steps` steps, or a plain Step for None."""
    ops, layout = ops or HostOps(), SPEC.layout()
    device = type(ops) is DeviceOps
    grads = None if device else collective.empty(layout.size, np.float32)
    network = Network(SPEC, ops, ROWS, None, grads)
    ops.from_host(first_params(), network.params)
    buckets = cut(layout.size, SPEC.layer_starts(), 40, size)

    def strategy(whole, params):
        return make_strategy(whole, collective.narrow)(collective, buckets, size, params, network.grads, ops)

    inner = strategy(True, network.params)
    rule = make_optimizer(optimizer, ops, layout, inner.ranges, np.float32)
    average = None if ema is None else Average(ops, inner.ranges, ema)
    if average is not None:
        average.start(network.params)
    parts = (network, Loss("softmax_cross_entropy"), rule, inner, ops)
    options = dict(rows=ROWS, average=average, **options)
    if local_steps is None:
        return Step(*parts, **options)
    anchor = ops.zeros((layout.size,), np.float32) if device else \
        (collective.empty if whole else collective.common)(layout.size, np.float32)
    return LocalStep(*parts, outer=strategy(whole, anchor), meets=lambda number: (number + 1) % local_steps == 0,
                     **(outer or {}), **options)


# ---- the simulation: float64, all ranks in one process, formulas of the papers

def gradient(theta, x, labels, weights):
    """Mean loss and its gradient of the network 5-9-3 for parameters [w0, b0, w1, b1]."""
    w0, b0, w1, b1 = theta
    hidden = np.tanh(x @ w0.T + b0)
    logits = hidden @ w1.T + b1
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -(weights * np.log(p[np.arange(len(x)), labels])).sum() / weights.sum()
    d = p.copy()
    d[np.arange(len(x)), labels] -= 1
    d *= weights[:, None] / weights.sum()
    dh = (d @ w1) * (1 - hidden**2)
    return loss, [dh.T @ x, dh.sum(0), d.T @ hidden, d.sum(0)]


class Simulation:
    """P pretend ranks; every vector a list of four arrays in float64."""

    def __init__(self, size, adam=False, outer=None, ema=None, clip=None):
        start = [v.astype(np.float64) for v in SPEC.layout().views(first_params()).values()]
        self.anchor, self.velocity = start, [0 * v for v in start]
        self.theta = [start] * size
        self.m, self.v = [[0 * v for v in start]] * size, [[0 * v for v in start]] * size
        self.ema = [start] * size
        self.seen = np.zeros(size)      # weight of a round
        self.size, self.adam, self.outer, self.decay, self.clip = size, adam, outer, ema, clip

    def step(self, number, absent=()):
        """One local step of each rank but the `absent`; return weighted loss sum and weight."""
        x, labels, weights = (a.astype(np.float64) if a.dtype.kind == "f" else a for a in samples(number))
        loss_sum = weight_sum = 0.0
        for r in range(self.size):
            a, b = shares(r, self.size)
            if a == b or r in absent:
                continue
            loss, g = gradient(self.theta[r], x[a:b], labels[a:b], weights[a:b])
            weight = weights[a:b].sum()
            self.seen[r] += weight
            loss_sum, weight_sum = loss_sum + loss * weight, weight_sum + weight
            norm = np.sqrt(sum((v**2).sum() for v in g))
            if self.clip is not None and norm > self.clip:
                g = [v * self.clip / norm for v in g]
            if self.adam:   # decoupled decay 0.01, betas 0.9 and 0.999, eps after the correction
                t = number + 1
                self.m[r] = [0.9 * m + 0.1 * v for m, v in zip(self.m[r], g, strict=True)]
                self.v[r] = [0.999 * s + 0.001 * v * v for s, v in zip(self.v[r], g, strict=True)]
                g = [m / (1 - 0.9**t) / (np.sqrt(s / (1 - 0.999**t)) + 1e-8) + 0.01 * p
                     for m, s, p in zip(self.m[r], self.v[r], self.theta[r], strict=True)]
            self.theta[r] = [p - LR * v for p, v in zip(self.theta[r], g, strict=True)]
            if self.decay is not None:
                self.ema[r] = [self.decay * e + (1 - self.decay) * p
                               for e, p in zip(self.ema[r], self.theta[r], strict=True)]
        return loss_sum, weight_sum

    def mean(self, vectors, weights):
        return [sum(w * v[k] for w, v in zip(weights, vectors, strict=True)) / sum(weights) for k in range(4)]

    def meet(self):
        mean = self.mean(self.theta, self.seen)
        self.last_mean, self.last_theta, self.last_anchor = mean, self.theta, self.anchor
        if self.outer:
            lr, mu = self.outer["outer_lr"], self.outer["outer_momentum"]
            delta = [a - p for a, p in zip(self.anchor, mean, strict=True)]
            self.velocity = [mu * v + d for v, d in zip(self.velocity, delta, strict=True)]
            mean = [a - lr * (d + mu * v) for a, d, v in zip(self.anchor, delta, self.velocity, strict=True)]
        self.anchor, self.theta = mean, [mean] * self.size
        self.last_seen, self.seen = self.seen, np.zeros(self.size)

    def flat(self, vector):
        return SPEC.layout().pack(dict(zip(SPEC.layout().views(first_params()), vector, strict=True)), np.float64)


def distance(a, b):
    return np.sqrt(sum(((p - q)**2).sum() for p, q in zip(a, b, strict=True)))


def assert_same_bits(comm, array):
    everyone = np.empty((comm.size, array.size), np.float32)
    comm.Allgather(np.ascontiguousarray(array), everyone)
    assert (everyone.view(np.uint32) == everyone.view(np.uint32)[0]).all()


@pytest.mark.mpi
@pytest.mark.parametrize("outer", [None, OUTER], ids=["average", "diloco"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name, whole", [("ring", False), ("shared", False), ("native", True)])
def test_rounds_are_those_of_the_simulation(comm, name, whole, optimizer, outer, opened):
    step = make_step(opened(name), comm.size, 4, optimizer=optimizer, whole=whole, outer=outer,
                     ema=0.9, clip_norm=0.4)
    simulation = Simulation(comm.size, optimizer == "adamw", outer, ema=0.9, clip=0.4)
    since = np.zeros(comm.size)
    loss = weight = 0.0
    for k in range(12):
        result = step.run(Rows(*shares(comm.rank, comm.size), k), k, LR, check=True, want_norm=True)
        more = simulation.step(k)
        loss, weight = loss + more[0], weight + more[1]
        if (k + 1) % 4:
            assert result.steps == 0 and result.rows == 0
            continue
        simulation.meet()
        since += simulation.last_seen
        assert result.steps == 4 and result.rows == 4 * ROWS and result.replicas_agree and not result.skipped
        assert result.loss == pytest.approx(loss / weight, rel=2e-5)
        loss = weight = 0.0
        np.testing.assert_allclose(step.network.params, simulation.flat(simulation.anchor), rtol=2e-4, atol=2e-5)
        assert_same_bits(comm, step.network.params)
        assert_same_bits(comm, step.outer.params)
        check_statistics(simulation, result.round)
    step.settle()
    np.testing.assert_allclose(step.average.array, simulation.flat(simulation.mean(simulation.ema, since)), rtol=2e-4,
                               atol=2e-5)
    if optimizer == "adamw":
        for mine, theirs in ((step.optimizer.state["m"], simulation.m), (step.optimizer.state["v"], simulation.v)):
            np.testing.assert_allclose(mine, simulation.flat(simulation.mean(theirs, since)), rtol=2e-3, atol=2e-6)
            assert_same_bits(comm, mine)


def check_statistics(simulation, told):
    """Drift, norm and alignment by their definitions, from every rank's parameters."""
    mean, weights = simulation.last_mean, simulation.last_seen
    moved = [distance(theta, simulation.last_anchor)**2 for theta in simulation.last_theta]
    apart = [distance(theta, mean)**2 for theta in simulation.last_theta]
    norm = distance(mean, simulation.last_anchor)
    size = distance(simulation.last_anchor, [0.0] * 4)
    assert told.outer_norm == pytest.approx(norm, rel=1e-3)
    assert told.drift == pytest.approx(np.sqrt(np.average(apart, weights=weights)) / size, rel=1e-3, abs=2e-6)
    assert told.align == pytest.approx(norm**2 / np.average(moved, weights=weights), rel=1e-3)


@pytest.mark.mpi
def test_one_local_step_of_sgd_and_a_mean_is_the_synchronous_step(comm, opened):
    """mean(p - lr g_r) weighted by w_r is p - lr sum(w_r g_r) / sum(w_r): true without momentum, decay or clipping."""
    ring = opened("ring")
    local, synchronous = make_step(ring, comm.size, 1), make_step(ring, comm.size, None)
    for k in range(5):
        batch = Rows(*shares(comm.rank, comm.size), k)
        a, b = local.run(batch, k, LR), synchronous.run(batch, k, LR)
        assert a.loss == pytest.approx(b.loss, rel=1e-5) and a.rows == b.rows and a.weight == pytest.approx(b.weight)
    np.testing.assert_allclose(local.network.params, synchronous.network.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("local_steps", [2, 5, 100])
def test_one_rank_has_the_bits_of_plain_steps(optimizer, local_steps):
    local = make_step(Alone(), 1, local_steps, optimizer=optimizer, ema=0.9, clip_norm=0.3)
    plain = make_step(Alone(), 1, None, optimizer=optimizer, ema=0.9, clip_norm=0.3)
    for k in range(10):
        for step in (local, plain):
            step.run(Rows(0, ROWS, k), k, LR)
        if k == 4:
            local.settle()
    np.testing.assert_array_equal(local.network.params, plain.network.params)
    np.testing.assert_array_equal(local.average.array, plain.average.array)
    for name, array in plain.optimizer.state.items():
        np.testing.assert_array_equal(local.optimizer.state[name], array)


@pytest.mark.mpi
@pytest.mark.parametrize("outer", [None, OUTER], ids=["average", "diloco"])
def test_ranks_without_samples_do_not_count(comm, outer, opened):
    """Only the last rank has samples: the rounds are those of that rank alone."""
    step = make_step(opened("ring"), comm.size, 3, optimizer="adamw", outer=outer)
    alone = make_step(Alone(), 1, 3, optimizer="adamw", outer=outer)
    last = comm.rank == comm.size - 1
    for k in range(6):
        result = step.run(Rows(0, ROWS if last else 0, k), k, LR)
        expected = alone.run(Rows(0, ROWS, k), k, LR)
        assert result.loss == pytest.approx(expected.loss, rel=2e-5) and result.rows == expected.rows
    step.settle()
    np.testing.assert_allclose(step.network.params, alone.network.params, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(step.optimizer.state["v"], alone.optimizer.state["v"], rtol=2e-3, atol=1e-9)


@pytest.mark.mpi
def test_a_gradient_that_is_not_finite_leaves_one_step_of_one_rank_out(comm, opened):
    step = make_step(opened("shared"), comm.size, 4, optimizer="adamw")
    simulation, ill = Simulation(comm.size, adam=True), comm.size - 1
    for k in range(4):
        batch = Rows(*shares(comm.rank, comm.size), k)
        if k == 2 and comm.rank == ill:
            batch.source[:] = np.nan
        result = step.run(batch, k, LR)
        simulation.step(k, absent=(ill,) if k == 2 else ())
    simulation.meet()
    assert result.round.lost_steps == 1 and result.round.left_out == 0 and not result.skipped
    np.testing.assert_allclose(step.network.params, simulation.flat(simulation.anchor), rtol=2e-4, atol=2e-5)
    assert_same_bits(comm, step.network.params)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("where", ["params", "v", "average"])
def test_a_rank_that_is_not_finite_where_ranks_meet_takes_over_the_others(comm, where, opened):
    """One NaN in what a rank has: the round is that of the other ranks, and its state is theirs."""
    step = make_step(opened("ring"), comm.size, 2, optimizer="adamw", ema=0.9, outer=OUTER)
    simulation, ill = Simulation(comm.size, adam=True, outer=OUTER, ema=0.9), comm.size - 1
    step.run(Rows(*shares(comm.rank, comm.size), 0), 0, LR)
    simulation.step(0)
    if comm.rank == ill:
        vectors = {"params": step.network.params, "v": step.optimizer.state["v"], "average": step.average.array}
        vectors[where][3] = np.nan
    if where == "params" and comm.rank == ill:     # else the next gradient says so first
        batch = Rows(0, 0, 1)
    else:
        batch = Rows(*shares(comm.rank, comm.size), 1)
    result = step.run(batch, 1, LR)
    simulation.step(1)
    simulation.seen[ill] = 0.0
    weights = simulation.seen.copy()
    simulation.meet()
    assert result.round.left_out == 1 and not result.skipped
    np.testing.assert_allclose(step.network.params, simulation.flat(simulation.anchor), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(step.average.array, simulation.flat(simulation.mean(simulation.ema, weights)), rtol=2e-4,
                               atol=2e-5)
    np.testing.assert_allclose(step.optimizer.state["v"], simulation.flat(simulation.mean(simulation.v, weights)),
                               rtol=2e-3, atol=1e-9)
    for array in (step.network.params, step.average.array, *step.optimizer.state.values()):
        assert_same_bits(comm, array)
    after = [step.run(Rows(*shares(comm.rank, comm.size), k), k, LR) for k in (2, 3)][-1]
    assert after.round.left_out == 0 and np.isfinite(step.network.params).all()


@pytest.mark.mpi
@pytest.mark.parametrize("broken", ["batches", "params"])
def test_a_round_in_which_no_rank_counts_is_undone_everywhere(comm, broken, opened):
    step = make_step(opened("shared"), comm.size, 2, optimizer="adamw", ema=0.5, outer=OUTER)
    for k in range(2):
        step.run(Rows(*shares(comm.rank, comm.size), k), k, LR)
    before, momentum = step.network.params.copy(), step.outer_optimizer.state["momentum"].copy()
    for k in (2, 3):
        batch = Rows(*shares(comm.rank, comm.size), k)
        if broken == "batches":
            batch.source[:] = np.nan
        elif k == 3:
            step.network.params[:] = np.nan
        result = step.run(batch, k, LR)
    assert result.skipped and result.steps == 2
    np.testing.assert_array_equal(step.network.params, before)
    np.testing.assert_array_equal(step.outer_optimizer.state["momentum"], momentum)
    step.settle()
    for array in (step.average.array, *step.optimizer.state.values()):
        assert np.isfinite(array).all()
        assert_same_bits(comm, array)
    after = [step.run(Rows(*shares(comm.rank, comm.size), k), k, LR) for k in (4, 5)][-1]
    assert not after.skipped and np.abs(step.network.params - before).max() > 0


@pytest.mark.mpi
def test_a_stop_asked_within_a_round_reaches_all_where_they_meet(comm, opened):
    step = make_step(opened("ring"), comm.size, 3)
    stops = [step.run(Rows(*shares(comm.rank, comm.size), k), k, LR, stop=k >= 4 and comm.rank == comm.size - 1).stop
             for k in range(6)]
    assert stops == [False] * 5 + [True]


@pytest.mark.mpi(min_size=2)
def test_an_anchor_that_drifts_is_seen_by_all_where_they_meet(comm, opened):
    step = make_step(opened("ring"), comm.size, 2)
    if comm.rank == 1:
        step.outer.params.view(np.uint32)[5] ^= 1
    step.run(Rows(*shares(comm.rank, comm.size), 0), 0, LR, check=True)
    assert not step.run(Rows(*shares(comm.rank, comm.size), 1), 1, LR, check=True).replicas_agree


@pytest.mark.mpi
@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_narrow_wires_round_what_the_ranks_have_moved(comm, wire, given_back):
    step = make_step(given_back(make_ring(comm, wire)), comm.size, 4, optimizer="adamw", outer=OUTER)
    simulation = Simulation(comm.size, adam=True, outer=OUTER)
    for k in range(12):
        step.run(Rows(*shares(comm.rank, comm.size), k), k, LR)
        simulation.step(k)
        if (k + 1) % 4 == 0:
            simulation.meet()
            assert_same_bits(comm, step.network.params)
    start = first_params()
    moved = np.linalg.norm(simulation.flat(simulation.anchor) - start)
    assert np.linalg.norm(step.network.params - simulation.flat(simulation.anchor)) < 0.02 * moved
    step.settle()
    for array in step.optimizer.state.values():
        assert_same_bits(comm, array)


@pytest.mark.mpi
def test_bytes_fall_with_the_number_of_rounds(comm, opened):
    step = make_step(opened("native"), comm.size, 4)
    for k in range(8):
        step.run(Rows(*shares(comm.rank, comm.size), k), k, LR, want_norm=k == 7)
    told = step.statistics("float32")
    elements, size, whole = SPEC.layout().size, comm.size, told["bytes_per_step_synchronous"]
    assert told["rounds"] == 2 and told["steps"] == 8 and told["bytes_per_step"] == whole / 4
    assert whole == pytest.approx(2 * (size - 1) / size * 4 * elements)
    assert step.statistics("bf16")["bytes_per_step_synchronous"] == pytest.approx((size - 1) / size * 4 * elements)
    assert "2 rounds for 8 steps" in step.report("float32") and "25 %" in step.report("float32") or size == 1


@pytest.mark.mpi
def test_the_device_side_takes_the_same_rounds(comm, opened):
    """DeviceOps over a NumPy array type of its own: messages are staged through host copies."""
    class DeviceArray(np.ndarray):
        """Stands in for a CuPy array."""

    class Module:
        """NumPy whose new arrays are DeviceArray."""

        def __getattr__(self, name):
            found = getattr(np, name)
            if name not in ("empty", "zeros", "asarray", "arange"):
                return found
            return lambda *a, **k: found(*a, **k).copy().view(DeviceArray)

    step = make_step(opened("ring"), comm.size, 4, optimizer="adamw", outer=OUTER,
                     ops=DeviceOps(Module()))
    simulation = Simulation(comm.size, adam=True, outer=OUTER)
    for k in range(8):
        step.run(Rows(*shares(comm.rank, comm.size), k), k, LR, check=True)
        simulation.step(k)
        if (k + 1) % 4 == 0:
            simulation.meet()
    step.settle()
    got = np.asarray(step.network.params)
    np.testing.assert_allclose(got, simulation.flat(simulation.anchor), rtol=2e-4, atol=2e-5)
    assert_same_bits(comm, got)
    assert_same_bits(comm, np.asarray(step.optimizer.state["m"]))
