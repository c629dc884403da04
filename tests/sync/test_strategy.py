"""Both strategies leave the same bits on all ranks and agree with one rank that has all samples."""

import numpy as np
import pytest

from hpcmlp.comm import make_ring, open_direct, open_exchange
from hpcmlp.comm.shared import Shared
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import RULES, Average, make_optimizer
from hpcmlp.ops.device import DeviceOps, DirectOps
from hpcmlp.ops.host import HostOps
from hpcmlp.ops.staging import Late
from hpcmlp.sync import make_strategy
from hpcmlp.sync.buckets import cut, cut_evenly
from hpcmlp.sync.narrow import NarrowUpdate
from hpcmlp.sync.step import Step

SPEC = NetworkSpec((7, 19, 19, 3), "tanh", layer_norm=True)
ROWS = 23


class Rows:
    """A local batch in the form of data.loader.Batch: the slice [start, stop) of fixed samples."""

    def __init__(self, start, stop, step=0, weighted=False):
        random = np.random.default_rng(step)
        self.source = random.standard_normal((ROWS, 7), dtype=np.float32)
        labels = random.integers(0, 3, ROWS).astype(np.int32)
        self.index = np.arange(start, stop)
        self.targets = labels[start:stop]
        self.weights = random.random(ROWS, dtype=np.float32)[start:stop] if weighted else None
        self.first, self.rows, self.global_rows = start, stop - start, ROWS


class Alone:
    """The collective of one rank."""

    part = rank = bytes_sent = 0
    narrow = False

    def empty(self, size, dtype):
        return np.zeros(size, dtype)

    def reduce_scatter(self, array, bounds, words=None):
        pass

    def all_gather(self, array, bounds):
        pass

    def all_reduce(self, array, words=None):
        pass


def make_step(collective, size, *, whole=False, optimizer="adamw", bucket=300, rows=ROWS, spec=SPEC, **options):
    ops = HostOps()
    layout = spec.layout()
    own = whole or isinstance(collective, Alone)
    params = (collective.empty if own else collective.common)(layout.size, np.float32)
    network = Network(spec, ops, ROWS, params, collective.empty(layout.size, np.float32))
    network.params[...] = initialize(spec, 3, "auto", np.float32)
    buckets = cut(network.layout.size, spec.layer_starts(), bucket, size)
    strategy = make_strategy(whole, collective.narrow)(collective, buckets, size, network.params, network.grads, ops)
    rule = make_optimizer(optimizer, ops, network.layout, strategy.ranges, np.float32)
    average = Average(ops, strategy.ranges, 0.9, np.float32)
    average.start(network.params)
    return Step(network, Loss("softmax_cross_entropy"), rule, strategy, ops, rows=rows, average=average, **options)


def own_slice(comm):
    return comm.rank * ROWS // comm.size, (comm.rank + 1) * ROWS // comm.size


def reference(steps, **options):
    step = make_step(Alone(), 1, **options)
    losses = [step.run(Rows(0, ROWS, k, weighted=True), k, 0.01).loss for k in range(steps)]
    return step, losses


@pytest.mark.mpi
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["ring", "shared", "native"])
@pytest.mark.parametrize("optimizer", sorted(RULES))
def test_ranks_take_the_step_of_one_rank(comm, name, whole, optimizer, opened):
    step = make_step(opened(name), comm.size, whole=whole, optimizer=optimizer)
    alone, losses = reference(5, optimizer=optimizer)
    for k in range(5):
        result = step.run(Rows(*own_slice(comm), k, weighted=True), k, 0.01, check=True)
        assert result.replicas_agree and not result.skipped and result.rows == ROWS
        assert result.loss == pytest.approx(losses[k], rel=2e-5)
    np.testing.assert_allclose(step.network.params, alone.network.params, rtol=2e-4, atol=2e-5)
    everyone = np.empty((comm.size, step.network.params.size), np.float32)
    comm.Allgather(step.network.params, everyone)
    assert (everyone.view(np.uint32) == everyone.view(np.uint32)[0]).all()


@pytest.mark.mpi
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sliced_and_whole_updates_give_the_same_bits(comm, optimizer, opened):
    ring = opened("ring")
    results = []
    for whole in (False, True):
        step = make_step(ring, comm.size, whole=whole, optimizer=optimizer)
        for k in range(4):
            step.run(Rows(*own_slice(comm), k), k, 0.01)
        average = step.strategy.whole(step.average.array)
        results.append((step.network.params.copy(), average))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.mpi
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("wire", ["bf16", "float16", "int8"])
def test_narrow_wires_keep_replicas_equal_and_train_like_float32(comm, wire, whole, given_back):
    step = make_step(given_back(make_ring(comm, wire)), comm.size, whole=whole)
    got = []
    for k in range(60):
        result = step.run(Rows(*own_slice(comm), k % 5, weighted=True), k, 0.01, check=True)
        assert result.replicas_agree and not result.skipped and result.rows == ROWS
        got.append(result.loss)
    alone = make_step(Alone(), 1)
    losses = [alone.run(Rows(0, ROWS, k % 5, weighted=True), k, 0.01).loss for k in range(60)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    np.testing.assert_allclose(got, losses, rtol=0.05)
    everyone = np.empty((comm.size, step.network.params.size), np.float32)
    comm.Allgather(step.network.params, everyone)
    assert (everyone.view(np.uint32) == everyone.view(np.uint32)[0]).all()


@pytest.fixture(params=["ring", "shared"])
def narrow(request, comm, nodes_of, given_back):
    """A function that opens collectives with bf16 on the wire: between ranks, or between nodes of one rank each."""
    def open_narrow():
        return given_back(make_ring(comm, "bf16") if request.param == "ring" else
                          Shared(nodes_of(1), lambda cross: make_ring(cross, "bf16")))
    return open_narrow


@pytest.mark.mpi(min_size=2)
def test_replicas_stay_within_a_rounding_of_the_masters_and_a_skipped_step_changes_neither(comm, narrow):
    step = make_step(narrow(), comm.size)
    strategy, params = step.strategy, step.network.params
    assert isinstance(strategy, NarrowUpdate)
    for k in range(10):
        before = params.copy()
        step.run(Rows(*own_slice(comm), k), k, 0.01)
        master = strategy.carried()["master"]
        way = np.abs(master.astype(np.float64) - before)
        assert (np.abs(master.astype(np.float64) - params) <= 2.0**-8 * way + 2.0**-23 * np.abs(master)).all()
    assert (master != params).any()     # there is something to keep
    before, state = params.copy(), [a.copy() for a in step.optimizer.state.values()]
    batch = Rows(*own_slice(comm))
    if comm.rank == 0:
        batch.source[:] = np.nan
    assert step.run(batch, 10, 0.01).skipped
    np.testing.assert_array_equal(params, before)
    np.testing.assert_array_equal(strategy.carried()["master"], master)
    assert strategy.carried(keep=False) == {}
    for old, new in zip(state, step.optimizer.state.values(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.mpi(min_size=2)
def test_what_a_strategy_carries_makes_another_one_go_on_with_the_same_bits(comm, narrow, opened):
    first, second = (make_step(narrow(), comm.size, optimizer="sgd") for _ in range(2))
    for k in range(5):
        first.run(Rows(*own_slice(comm), k), k, 0.05)
    carried = first.strategy.carried()
    second.network.params[...] = first.network.params
    comm.Barrier()
    second.strategy.take_up(carried)
    for k in range(5, 9):
        for step in (first, second):
            step.run(Rows(*own_slice(comm), k), k, 0.05)
        np.testing.assert_array_equal(first.network.params, second.network.params)
    for name, flat in second.strategy.carried().items():
        np.testing.assert_array_equal(flat, first.strategy.carried()[name])
    plain = make_step(opened("ring"), comm.size)
    plain.strategy.take_up(carried)     # in float32 the masters are the parameters
    np.testing.assert_array_equal(plain.network.params, carried["master"])


@pytest.mark.mpi
def test_micro_batches_and_clipping_do_not_depend_on_the_ranks(comm, opened):
    options = {"micro_batches": 3, "clip_norm": 0.05}
    step = make_step(opened("ring"), comm.size, **options)
    alone, _ = reference(3, **options)
    for k in range(3):
        result = step.run(Rows(*own_slice(comm), k, weighted=True), k, 0.01)
        assert result.grad_norm > 0.05
    np.testing.assert_allclose(step.network.params, alone.network.params, rtol=2e-4, atol=2e-5)


@pytest.mark.mpi
def test_dropout_masks_do_not_depend_on_the_ranks(comm, opened):
    spec = NetworkSpec((7, 19, 3), "relu", dropout=0.4)
    step = make_step(opened("ring"), comm.size, spec=spec, seed=5)
    alone, losses = reference(4, spec=spec, seed=5)
    got = [step.run(Rows(*own_slice(comm), k, weighted=True), k, 0.01).loss for k in range(4)]
    np.testing.assert_allclose(got, losses, rtol=2e-5)


@pytest.mark.mpi
def test_one_rank_with_nan_makes_all_ranks_skip_alike(comm, opened):
    step = make_step(opened("ring"), comm.size)
    before = step.network.params.copy()
    batch = Rows(*own_slice(comm))
    if comm.rank == comm.size - 1:
        batch.source[:] = np.nan
    result = step.run(batch, 0, 0.01)
    assert result.skipped
    np.testing.assert_array_equal(step.network.params, before)
    after = step.run(Rows(*own_slice(comm)), 1, 0.01)
    assert not after.skipped and np.isfinite(step.network.params).all()


@pytest.mark.mpi
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["ring", "shared", "native"])
def test_a_rank_whose_loss_comes_out_otherwise_is_named_to_all_and_the_step_is_as_ever(comm, name, whole, opened):
    plain, step = (make_step(opened(name), comm.size, whole=whole, micro_batches=2) for _ in range(2))
    odd, wrong, honest = comm.size - 1, [], step.loss

    def loss(*arguments):
        total, weight = honest(*arguments)
        return total + (wrong.pop() if wrong else 0.0), weight

    step.loss = loss
    for k, (suspected, error, expected) in enumerate([(False, 0.5, None), (True, 0.0, []), (True, 0.5, [odd]),
                                                      (True, np.nan, [odd])]):
        step.suspects = lambda result, suspected=suspected: suspected
        if comm.rank == odd:
            wrong.append(error)
        result = step.run(Rows(*own_slice(comm), k), k, 0.01)
        assert result.deviants == expected and result.skipped == np.isnan(error)
        if not result.skipped:
            plain.run(Rows(*own_slice(comm), k), k, 0.01)
        np.testing.assert_array_equal(step.network.params, plain.network.params)


@pytest.mark.mpi(min_size=2)
def test_a_replica_that_drifts_is_seen_by_all_at_the_next_check(comm, opened):
    step = make_step(opened("ring"), comm.size)
    step.run(Rows(*own_slice(comm)), 0, 0.01, check=True)
    if comm.rank == 1:
        step.network.params.view(np.uint32)[5] ^= 1
    result = step.run(Rows(*own_slice(comm)), 1, 0.01, check=True)
    assert not result.replicas_agree and result.skipped


@pytest.mark.mpi
def test_a_stop_asked_by_one_rank_reaches_all_in_the_same_step(comm, opened):
    step = make_step(opened("ring"), comm.size)
    assert not step.run(Rows(*own_slice(comm)), 0, 0.01).stop
    assert step.run(Rows(*own_slice(comm)), 1, 0.01, stop=comm.rank == comm.size - 1).stop
    assert not step.run(Rows(*own_slice(comm)), 2, 0.01).stop


@pytest.mark.mpi
def test_ranks_without_samples_take_part(comm, opened):
    """Only the last rank has samples: the others' empty batches are ordinary."""
    step = make_step(opened("ring"), comm.size)
    alone, losses = reference(2)
    last = comm.rank == comm.size - 1
    for k in range(2):
        batch = Rows(0, ROWS, k, weighted=True) if last else Rows(0, 0, k, weighted=True)
        assert step.run(batch, k, 0.01).loss == pytest.approx(losses[k], rel=2e-5)
    np.testing.assert_allclose(step.network.params, alone.network.params, rtol=2e-4, atol=2e-5)


@pytest.mark.mpi
@pytest.mark.parametrize("whole, wire", [(False, "float32"), (True, "float32"), (False, "float16")])
def test_the_device_side_takes_the_same_steps(comm, whole, wire, given_back):
    """DeviceOps over a NumPy array type of its own: staged messages, rows picked on the host, targets brought over."""
    class DeviceArray(np.ndarray):
        """Stands in for a CuPy array."""

    class Module:
        """NumPy whose new arrays are DeviceArray."""

        def __getattr__(self, name):
            found = getattr(np, name)
            if name not in ("empty", "zeros", "asarray", "arange"):
                return found
            return lambda *a, **k: found(*a, **k).copy().view(DeviceArray)

    ring = given_back(make_ring(comm, wire))
    ops = DeviceOps(Module())
    layout = SPEC.layout()
    network = Network(SPEC, ops, ROWS)
    ops.from_host(initialize(SPEC, 3, "auto", np.float32), network.params)
    buckets = cut(layout.size, SPEC.layer_starts(), 300, comm.size)
    strategy = make_strategy(whole, ring.narrow)(ring, buckets, comm.size, network.params, network.grads, ops)
    rule = make_optimizer("adamw", ops, layout, strategy.ranges, np.float32)
    step = Step(network, Loss("softmax_cross_entropy"), rule, strategy, ops, rows=ROWS)
    alone, losses = reference(3)
    for k in range(3):
        result = step.run(Rows(*own_slice(comm), k, weighted=True), k, 0.01, check=True)
        assert result.loss == pytest.approx(losses[k], rel=2e-5 if wire == "float32" else 1e-3)
        assert result.replicas_agree
    slack = {"rtol": 2e-4, "atol": 2e-5} if wire == "float32" else {"rtol": 1e-2, "atol": 1e-3}
    np.testing.assert_allclose(np.asarray(network.params), alone.network.params, **slack)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ("ring", "shared"))
@pytest.mark.parametrize("missing", (None, "arrival", "settle"))
def test_buckets_are_staged_beside_each_other_and_a_wait_that_is_missing_shows(comm, name, missing, monkeypatch,
                                                                               topology):
    """`staging.Late` copies as late as it may; the sums and the parameters are those of plain sums, or not numbers."""
    if missing == "settle":
        monkeypatch.setattr(Late, "settle", lambda stage: None)
    if missing == "arrival":
        fetch = Late.fetch
        monkeypatch.setattr(Late, "fetch", lambda stage, *piece: fetch(stage, *piece) and int)
    size, length = comm.size, 1000
    exchange = open_exchange(name, topology, length, np.float32)
    params, grads = np.zeros(length, np.float32), np.arange(length, dtype=np.float32) * (comm.rank + 1)
    buckets = cut_evenly(length, 128 * 4 / 2**20, size)
    assert len(buckets) == 7
    strategy = make_strategy(False)(exchange.collective, buckets, size, params, grads, DeviceOps(np),
                                    (exchange.params, exchange.grads))
    with np.errstate(invalid="ignore"):
        strategy.reduce(np.zeros(4))
    wanted = np.arange(length) * sum(range(1, size + 1))
    good = all(np.array_equal(grads[start:stop], wanted[start:stop]) for start, stop in strategy.ranges)
    for start, stop in strategy.ranges:
        params[start:stop] = -wanted[start:stop]
    strategy.share()
    assert (good and np.array_equal(params, -wanted)) == (missing is None)
    # The collective works on its own memory, not on a copy of somebody else's.
    assert strategy._sent_grads is exchange.grads and strategy._sent_params is exchange.params
    exchange.collective.free()


@pytest.mark.mpi
@pytest.mark.parametrize("whole", (False, True))
def test_what_goes_straight_from_the_device_has_the_bits_of_the_hosts_ring(comm, whole, topology, given_back):
    """No copy is made; what is gathered between steps comes to the host, and leaves the device's vectors alone."""
    size, length = comm.size, 1000
    buckets, sums, found = cut_evenly(length, 384 * 4 / 2**20, size), [], []
    for ops in (DirectOps(np), DeviceOps(np)):
        direct = isinstance(ops, DirectOps)
        exchange = open_direct(topology, length, np.float32, ops.sums) if direct else \
            open_exchange("ring", topology, length, np.float32)
        given_back(exchange.collective)
        grads = np.random.default_rng(comm.rank).standard_normal(length, dtype=np.float32)
        params = np.zeros(length, np.float32)
        strategy = make_strategy(whole)(exchange.collective, buckets, size, params, grads, ops,
                                        (exchange.params, exchange.grads))
        if direct:
            assert strategy._sent_grads is grads and strategy._sent_params is params
            own, grads[:] = grads.copy(), 0
            ops.sums.add(own, np.zeros_like(own), grads)       # still to be computed
        words = np.array([comm.rank + 0.5])
        strategy.reduce(words)
        if direct:
            ops.sums.wait()     # for one rank, which sends nothing
        norm = strategy.grad_norm()
        for start, stop in strategy.ranges:
            params[start:stop] = -grads[start:stop]
        before = grads.copy()
        strategy.share()
        owned = np.concatenate([params[start:stop] for start, stop in strategy.ranges])
        flat = strategy.whole(owned)
        assert flat.tobytes() == params.tobytes() and (not direct or grads.tobytes() == before.tobytes())
        sums.append([grads[start:stop].tobytes() for start, stop in strategy.ranges])
        found.append((params.tobytes(), norm, words.tobytes()))
    assert sums[0] == sums[1] and found[0] == found[1] and np.isfinite(params).all() and params.any()
    assert len(set(comm.allgather(found[0][0]))) == 1
