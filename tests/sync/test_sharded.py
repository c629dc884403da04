"""Sharded parameters take the bits of the unsharded step, in the memory of the formula, at any number of layers."""

import random
import time

import numpy as np
import pytest

from hpcmlp.comm.shared import Shared
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import RULES, Average, make_optimizer
from hpcmlp.ops.host import HostOps
from hpcmlp.sync.buckets import cut
from hpcmlp.sync.memory import buffer_elements
from hpcmlp.sync.sharded import ShardedStep, ShardedUpdate
from hpcmlp.sync.step import Step
from hpcmlp.sync.strategy import SlicedUpdate

SPEC = NetworkSpec((7, 19, 33, 19, 3), "tanh", layer_norm=True)
ROWS = 23
NAMES = ("ring", "shared", "native", "nodes")


class Rows:
    """A local batch in the form of data.loader.Batch: the slice [start, stop) of fixed samples."""

    def __init__(self, start, stop, number=0):
        generator = np.random.default_rng(number)
        self.source = generator.standard_normal((ROWS, 7), dtype=np.float32)
        labels = generator.integers(0, 3, ROWS).astype(np.int32)
        self.index, self.targets = np.arange(start, stop), labels[start:stop]
        self.weights = generator.random(ROWS, dtype=np.float32)[start:stop]
        self.first, self.rows, self.global_rows = start, stop - start, ROWS


def own(comm, number=0):
    return Rows(comm.rank * ROWS // comm.size, (comm.rank + 1) * ROWS // comm.size, number)


@pytest.fixture
def make(comm, opened, nodes_of, given_back):
    """A function that returns a planned step; the unsharded one has one bucket a layer, for sums of the same order.

    "nodes" pretend that every two ranks are a node, or every rank where their number is odd.
    """
    def make_step(name, *arguments, **options):
        collective = given_back(Shared(nodes_of(2 - comm.size % 2))) if name == "nodes" else opened(name)
        step = make_over(comm, collective, *arguments, **options)
        given_back(step.strategy, "finish")     # a gathering is under way after every step
        return step
    return make_step


def make_over(comm, collective, sharded, *, spec=SPEC, optimizer="adamw", recompute=False, rows=None, **options):
    ops, layout = HostOps(), spec.layout()
    start = initialize(spec, 3, "auto", np.float32)
    if sharded:
        size = sum(buffer_elements(spec))
        strategy = ShardedUpdate(collective, spec, comm.size, collective.common(size, np.float32),
                                 collective.empty(size, np.float32), ops)
        network = Network(spec, ops, ROWS, [layer.params for layer in strategy.layers],
                          [layer.grads for layer in strategy.layers], recompute=recompute)
        for number, (a, b) in enumerate(spec.layer_spans()):
            strategy.take_layer(number, start[a:b], strategy.params)
    else:
        network = Network(spec, ops, ROWS, collective.common(layout.size, np.float32),
                          collective.empty(layout.size, np.float32), recompute=recompute)
        if getattr(collective, "local_rank", 0) == 0:
            network.params[...] = start
        comm.Barrier()
        strategy = SlicedUpdate(collective, cut(layout.size, spec.layer_starts(), 1, comm.size), comm.size,
                                network.params, network.grads, ops)
    rule = make_optimizer(optimizer, ops, layout, strategy.ranges, np.float32)
    average = Average(ops, strategy.ranges, 0.9, np.float32)
    average.start(strategy.params)
    kind = ShardedStep if sharded else Step
    return kind(network, Loss("softmax_cross_entropy"), rule, strategy, ops, rows=rows or -(-ROWS // comm.size),
                average=average, **options)


def params_of(step):
    strategy = step.strategy
    return strategy.whole(strategy.params) if isinstance(strategy, ShardedUpdate) else step.network.params


def assert_same_bits(comm, one, other, steps=4, batch=own):
    for k in range(steps):
        results = [step.run(batch(comm, k), k, 0.01, check=k == 2, want_norm=True) for step in (one, other)]
        assert results[0].loss == results[1].loss and results[0].grad_norm == results[1].grad_norm
        assert results[0].rows == results[1].rows == ROWS and results[0].replicas_agree
    np.testing.assert_array_equal(params_of(one), params_of(other))
    np.testing.assert_array_equal(one.strategy.whole(one.average.array), other.strategy.whole(other.average.array))


@pytest.mark.mpi
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimizer", sorted(RULES))
def test_it_takes_the_bits_of_the_unsharded_step(comm, name, optimizer, make):
    steps = [make(name, sharded, optimizer=optimizer, clip_norm=0.5) for sharded in (True, False)]
    if optimizer in ("lamb", "lars"):       # their sums over owners begin anew in each range
        for k in range(4):
            losses = [step.run(own(comm, k), k, 0.01).loss for step in steps]
            assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        np.testing.assert_allclose(params_of(steps[0]), params_of(steps[1]), rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(comm, *steps)


@pytest.mark.mpi
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", [(), (5,), (5, 9), (16, 16, 16), (9, 9, 5, 31), (8,) * 9])
@pytest.mark.parametrize("form", [{}, {"layer_norm": True}, {"residual": True, "dropout": 0.3}])
def test_any_number_of_layers_with_and_without_recomputation(comm, name, hidden, form, make):
    """The ranks wait at random places: a buffer filled too early would be seen."""
    spec = NetworkSpec((7, *hidden, 3), "relu", **form)
    step, other = (make(name, sharded, spec=spec, recompute=sharded, seed=4) for sharded in (True, False))
    waits = random.Random(comm.rank)
    through = step.network._through

    def slow(*arguments, **more):
        if waits.random() < 0.3:
            time.sleep(1e-3 * waits.random())
        return through(*arguments, **more)

    step.network._through = slow
    assert_same_bits(comm, step, other, steps=3)


@pytest.mark.mpi
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", [(9,), (9, 11), (9, 11, 5)])
def test_ranks_may_look_at_other_parameters_for_a_while(comm, name, hidden, make):
    """Forward alone, again and again, with odd and even numbers of layers, and every rank at its own speed."""
    spec = NetworkSpec((7, *hidden, 3), "gelu")
    step, other = (make(name, sharded, spec=spec) for sharded in (True, False))
    for k in range(2):
        for one in (step, other):
            one.run(own(comm, k), k, 0.01)
    plain = Network(spec, HostOps(), ROWS, other.strategy.whole(other.average.array))
    strategy, batch = step.strategy, Rows(0, ROWS, 5)
    with strategy.showing(step.average.array):
        strategy.begin(list(range(spec.num_layers)), 6)
        for turn in range(6):
            time.sleep(1e-3 * random.random())
            rows = batch.source[:ROWS if (turn + comm.rank) % 3 else 0]
            got = step.network.forward(rows, enter=strategy.enter)
            np.testing.assert_array_equal(got, plain.forward(rows))
    begin = time.perf_counter()
    result = step.run(own(comm, 2), 2, 0.01)
    # What was waited for meanwhile is not the step's.
    assert result.comm_s <= time.perf_counter() - begin and result.compute_s >= 0
    other.run(own(comm, 2), 2, 0.01)
    assert_same_bits(comm, step, other, steps=2)


@pytest.mark.mpi
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("micro_batches", [3, 8])
def test_micro_batches_agree_to_rounding(comm, name, micro_batches, make):
    step, other = (make(name, sharded, micro_batches=micro_batches) for sharded in (True, False))
    for k in range(5):
        losses = [one.run(own(comm, k), k, 0.01).loss for one in (step, other)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-6)
    np.testing.assert_allclose(params_of(step), params_of(other), rtol=1e-4, atol=1e-6)


@pytest.mark.mpi
@pytest.mark.parametrize("name", NAMES)
def test_ranks_without_samples_and_numbers_that_are_not_finite(comm, name, make):
    step, other = (make(name, sharded, rows=ROWS) for sharded in (True, False))
    last = comm.size - 1
    assert_same_bits(comm, step, other, 2, lambda comm, k: Rows(0, ROWS if comm.rank == last else 0, k))
    batch = own(comm, 7)
    if comm.rank == last:
        batch.source[:] = np.nan
    before = params_of(step).copy()
    assert step.run(batch, 2, 0.01).skipped and other.run(batch, 2, 0.01).skipped
    np.testing.assert_array_equal(params_of(step), before)
    assert_same_bits(comm, step, other, 2)


@pytest.mark.mpi(min_size=2)
def test_a_step_gathers_twice_and_reduces_once(comm, make):
    step = make("ring", True)
    sent, ring = {"start_all_gather": 0, "start_reduce_scatter": 0}, step.strategy.collective

    def counting(name, start):
        def count(array, bounds, *words):
            sent[name] += int(bounds[-1] - bounds[0])
            return start(array, bounds, *words)
        return count

    for name in sent:
        setattr(ring, name, counting(name, getattr(ring, name)))
    step.run(own(comm), 0, 0.01)
    for name in sent:
        sent[name] = 0
    step.run(own(comm, 1), 1, 0.01)
    lengths = [b - a for a, b in SPEC.layer_spans()]
    # Forward's last layer stands for backward, too; the first is read there for its norm.
    assert sent == {"start_all_gather": 2 * sum(lengths) - lengths[-1], "start_reduce_scatter": sum(lengths)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", [{}, {"layer_norm": True}, {"dropout": 0.3}])
@pytest.mark.parametrize("count", range(1, 12))
def test_layers_are_entered_as_foretold(count, form, recompute):
    spec = NetworkSpec((4, *[6] * (count - 1), 3), "relu", **form)
    net, entered = Network(spec, HostOps(), 5, recompute=recompute), []
    net.forward(np.ones((5, 4), np.float32), training=True, enter=entered.append)
    net.backward(np.ones((5, 3), np.float32))
    assert entered == net.entries()
