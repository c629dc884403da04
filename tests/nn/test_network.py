"""Tests of nn/network.py: logits and gradients against PyTorch's and finite differences, padding, dtypes, memory."""

import itertools
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest

from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.losses import OPTIONS, Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.ops.host import BLOCK, HostOps
from hpcmlp.ops.plain import PlainOps

ORACLE = Path(__file__).parents[1] / "oracle" / "nn.npz"
ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "elu", "selu", "tanh", "sigmoid", "softplus", "identity")
OPS = {"plain": PlainOps(np), "host": HostOps()}


@pytest.fixture(scope="module")
def oracle():
    with np.load(ORACLE) as file:
        return {name: file[name] for name in file}


def from_logical(layout, vector, dtype=np.float64):
    """The padded flat vector of an unpadded one."""
    flat, at = np.zeros(layout.size, dtype), 0
    for tensor in layout.tensors:
        flat[tensor.start:tensor.stop] = vector[at:at + tensor.stop - tensor.start]
        at += tensor.stop - tensor.start
    assert at == len(vector)
    return flat


def to_logical(layout, flat):
    """The unpadded vector of a padded one."""
    return np.concatenate([flat[tensor.start:tensor.stop] for tensor in layout.tensors])


def random_network(spec, ops, rows, dtype=np.float64, seed=0):
    """A network none of whose parameters is special."""
    rng, params = np.random.default_rng(seed), initialize(spec, seed, dtype=dtype)
    for tensor in spec.layout().tensors:
        params[tensor.start:tensor.stop] += 0.1 * rng.normal(size=tensor.stop - tensor.start)
    return Network(spec, ops, rows, params, dtype=dtype)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("case", ["plain", "norm", "residual", "both"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_logits_and_gradients_are_those_of_pytorch(oracle, ops, case, activation):
    norm = case in ("norm", "both")
    spec = NetworkSpec((5, 7, 7, 7, 3), activation, layer_norm=norm, residual=case in ("residual", "both"))
    layout, place = spec.layout(), f"network/{'norm' if norm else 'plain'}"
    x, y = oracle[f"{place}/x"], oracle[f"{place}/y"]
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 2e-5)):
        net = Network(spec, ops, 9, from_logical(layout, oracle[f"{place}/params"], dtype), dtype=dtype)
        dlogits = np.empty((6, 3), dtype)
        logits = net.forward(x.astype(dtype))
        Loss("softmax_cross_entropy")(ops, logits, y, None, dlogits)
        net.backward(dlogits)
        np.testing.assert_allclose(logits, oracle[f"network/{activation}/{case}/logits"], rtol=tolerance,
                                   atol=tolerance)
        np.testing.assert_allclose(to_logical(layout, net.grads), oracle[f"network/{activation}/{case}/grads"],
                                   rtol=tolerance, atol=10 * tolerance)


def check_gradient(net, loss, x, targets, weights, rng, training=True):
    """Compare `backward` with central differences in a few elements of every tensor."""
    ops, dlogits = net.ops, np.empty((len(x), net.spec.sizes[-1]))

    def value():
        return loss(ops, net.forward(x, training, 3, 5, 11), targets, weights, dlogits)[0]

    value()
    net.backward(dlogits)
    for tensor in net.layout.tensors:
        for i in rng.choice(np.arange(tensor.start, tensor.stop), min(2, tensor.stop - tensor.start), replace=False):
            kept, h = net.params[i], 1e-5
            net.params[i] = kept + h
            above = value()
            net.params[i] = kept - h
            below = value()
            net.params[i] = kept
            assert net.grads[i] == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-7), (tensor.name, i)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_is_that_of_finite_differences_for_every_kind_of_layer(ops, activation):
    rng = np.random.default_rng(4)
    for dropout, norm, residual in itertools.product((0.0, 0.4), (False, True), (False, True)):
        spec = NetworkSpec((4, 6, 6, 6, 5, 3), activation, dropout, norm, residual)
        net = random_network(spec, ops, 7)
        x, y = rng.normal(size=(7, 4)), rng.integers(0, 3, 7).astype(np.int32)
        check_gradient(net, Loss("softmax_cross_entropy"), x, y, None, rng)
    check_gradient(net, Loss("softmax_cross_entropy"), x, y, None, rng, training=False)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_gradient_is_that_of_finite_differences_for_every_loss(ops, kind, weighted):
    options = {"softmax_cross_entropy": {"label_smoothing": 0.1, "class_weights": (1.0, 2.0, 0.5, 3.0)},
               "huber": {"delta": 0.7}, "quantile": {"quantiles": (0.2, 0.9)}}.get(kind, {})
    rng, rows, outputs = np.random.default_rng(5), 5, 4
    if kind == "softmax_cross_entropy":
        targets = rng.integers(0, outputs, rows).astype(np.int32)
    elif kind == "binary_cross_entropy":
        targets = rng.integers(0, 2, (rows, outputs)).astype(float)
    else:
        targets = rng.normal(size=(rows, 2 if kind == "quantile" else outputs))
    weights = rng.uniform(0.0, 2.0, rows) if weighted else None
    net = random_network(NetworkSpec((3, 6, outputs), "tanh"), ops, rows)
    check_gradient(net, Loss(kind, **options), rng.normal(size=(rows, 3)), targets, weights, rng)


@pytest.mark.parametrize("sizes", [(3, 2), (3, 4, 2), (3, 8, 4, 4, 2)])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_closed_ranges_cover_the_vector_once_from_the_end_and_are_final(sizes, rows):
    spec = NetworkSpec(sizes, layer_norm=True, residual=True, dropout=0.2)
    net, rng = random_network(spec, OPS["host"], 7), np.random.default_rng(6)
    net.grads[...] = 0.0
    closed, parts = [], []
    net.forward(rng.normal(size=(rows, 3)), training=True)
    net.backward(rng.normal(size=(rows, 2)), lambda a, b: (closed.append((a, b)), parts.append(net.grads[a:b].copy())))
    assert closed[0][1] == net.layout.size and closed[-1][0] == 0
    assert all(a == stop for (a, _), (_, stop) in itertools.pairwise(closed))
    assert np.array_equal(np.concatenate(parts[::-1]), net.grads)
    assert np.all(net.grads == 0.0) == (rows == 0)


def test_large_weights_are_cut_into_rows_that_cover_them():
    spec = NetworkSpec((784, 2048, 2048, 10))
    assert [spec.row_cuts(layer) for layer in range(3)] == [[0, 2048], [0, 2048], [0, 10]]
    assert spec.closings() == spec.layer_starts()
    for piece in (1, 2**18, 2**20, 2**30):
        for layer in range(3):
            cuts, width = spec.row_cuts(layer, piece), spec.sizes[layer]
            assert cuts[0] == 0 and cuts[-1] == spec.sizes[layer + 1] and cuts == sorted(set(cuts))
            for first, last in itertools.pairwise(cuts):
                assert first % 64 == 0
                # all but a rounding to multiples of 64 rows: no piece is much smaller than asked for
                asked = piece / 4 if layer == 0 else piece
                assert len(cuts) == 2 or (last - first + 64) * width >= asked and last - first + 64 >= 512
        assert spec.closings(piece)[0] == 0 and spec.closings(piece) == sorted(spec.closings(piece))
        assert set(spec.layer_starts()) <= set(spec.closings(piece))
        assert all(start % 16 == 0 for start in spec.closings(piece))
    assert len(spec.closings(1)) == 4 + 4 + 1
    assert len(spec.closings(2**21)) == 3 + 2 + 1   # nothing hides the first layer's: quarters there


class Watched(HostOps):
    """Arithmetic that notes which parameters a product reads and which gradients it writes, by their addresses."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def linear(self, x, w, b, pre):
        self.seen.append(("read", w.ctypes.data, w.nbytes))
        super().linear(x, w, b, pre)

    def bias_activation(self, kind, pre, b, out):
        self.seen.append(("read", b.ctypes.data, b.nbytes))
        super().bias_activation(kind, pre, b, out)

    def layer_norm(self, x, gamma, beta, *rest):
        self.seen += [("read", a.ctypes.data, a.nbytes) for a in (gamma, beta)]
        super().layer_norm(x, gamma, beta, *rest)

    def linear_backward(self, dz, x, w, dw=None, dx=None):
        self.seen.append(("dw", dw.ctypes.data, dw.nbytes) if dx is None else ("dx", 0, 0))
        super().linear_backward(dz, x, w, dw, dx)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("activation, norm", [("relu", True), ("gelu", True), ("gelu", False), ("tanh", False)])
def test_pieces_of_weights_change_nothing_and_are_told_in_time(monkeypatch, activation, norm, micro_batches):
    monkeypatch.setattr("hpcmlp.nn.network.PIECE_ROWS", 64)
    spec, rng, ops = NetworkSpec((5, 200, 200, 3), activation, 0.2, norm, True), np.random.default_rng(8), Watched()
    whole, cut = random_network(spec, OPS["plain"], 11), random_network(spec, ops, 11)
    cut = Network(spec, ops, 11, cut.params, dtype=np.float64, piece=300)
    assert len(spec.closings(300)) == 3 + 3 + 1   # at least 64 rows
    x, dlogits = rng.normal(size=(11, 5)), rng.normal(size=(11, 3))
    places = [0, 11] if micro_batches == 1 else [0, 5, 11]
    expected = whole.forward(x, True, 1, 2).copy()
    whole.backward(dlogits)
    base = cut.params.ctypes.data
    closed, finals, told = [], [], 0

    def need(start, stop):
        nonlocal told
        check_reads()
        assert start == told
        told = stop

    def check_reads():
        for what, address, length in ops.seen:
            assert what == "read" and base <= address and (address - base + length) // 8 <= told
        ops.seen.clear()

    for start, stop in itertools.pairwise(places):
        told = 0
        logits = cut.forward(x[start:stop], True, 1, 2, start, need=need)
        check_reads()
        assert told == cut.layout.size
        np.testing.assert_allclose(logits, expected[start:stop], rtol=1e-12)
        last = stop == 11
        cut.backward(dlogits[start:stop], (lambda a, b: (closed.append((a, b)), finals.append(cut.grads[a:b].copy()),
                                                         ops.seen.append(("closed", a, b)))) if last else None,
                     add=start > 0)
        # Of every layer all gradients of the weight are told before the gradient of its input is computed.
        kinds = [what for what, *_ in ops.seen]
        expected_kinds = ["dw", "dx"] + ["dw"] * 3 + ["dx"] + ["dw"] * 3
        assert [kind for kind in kinds if kind != "closed"] == expected_kinds
        if last:
            assert kinds == [k for kind in expected_kinds for k in ((kind, "closed") if kind == "dw" else (kind,))]
        ops.seen.clear()
    np.testing.assert_allclose(cut.grads, whole.grads, rtol=1e-10, atol=1e-12)
    assert [a for a, _ in closed] == spec.closings(300)[::-1]
    assert closed[0][1] == cut.layout.size and all(a == stop for (a, _), (_, stop) in itertools.pairwise(closed))
    assert np.array_equal(np.concatenate(finals[::-1]), cut.grads)


def test_layers_are_told_in_both_directions():
    spec, told = NetworkSpec((5, 7, 3)), []
    net = random_network(spec, OPS["host"], 4)
    logits = net.forward(np.ones((4, 5)), on_layer=told.append)
    net.backward(logits, on_layer=told.append)
    assert told == [0, 1, 1, 0]


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_micro_batches_add_up_to_the_batch_and_padding_stays_zero(ops):
    for activation, norm in (("relu", True), ("gelu", False), ("tanh", True)):
        spec, rng = NetworkSpec((5, 7, 7, 3), activation, 0.3, norm, True), np.random.default_rng(7)
        whole, cut = (random_network(spec, ops, 11) for _ in range(2))
        x, dlogits = rng.normal(size=(11, 5)), rng.normal(size=(11, 3))
        logits = whole.forward(x, True, 1, 2, 100).copy()
        whole.backward(dlogits)
        for start, stop in ((0, 4), (4, 4), (4, 11)):  # dropout knows the place in the global batch
            part = cut.forward(x[start:stop], True, 1, 2, 100 + start)
            np.testing.assert_allclose(part, logits[start:stop], rtol=1e-12)
            cut.backward(dlogits[start:stop], add=start > 0 or stop == start)
        np.testing.assert_allclose(cut.grads, whole.grads, rtol=1e-10, atol=1e-12)
        mask = spec.layout().pack({t.name: np.ones(t.shape) for t in spec.layout().tensors}, bool)
        for net in (whole, cut):
            assert np.all(net.grads[~mask] == 0.0) and np.all(net.params[~mask] == 0.0)


def test_dropout_acts_in_training_only_and_follows_the_counters():
    spec, x = NetworkSpec((4, 50, 2), dropout=0.5), np.random.default_rng(8).normal(size=(6, 4))
    net = random_network(spec, OPS["host"], 6)
    plain = net.forward(x).copy()
    assert np.array_equal(plain, random_network(NetworkSpec((4, 50, 2)), OPS["host"], 6).forward(x))
    first = net.forward(x, True, seed=1, step=2, first=3).copy()
    assert not np.allclose(first, plain)
    assert np.array_equal(first, net.forward(x, True, seed=1, step=2, first=3))
    for changed in ({"seed": 2}, {"step": 3}, {"first": 4}):
        assert not np.allclose(first, net.forward(x, True, **({"seed": 1, "step": 2, "first": 3} | changed)))
    assert np.array_equal(plain, net.forward(x))


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_stays_float32_and_is_the_rounded_float64(ops, activation):
    spec, rng = NetworkSpec((5, 8, 8, 3), activation, 0.25, True, True), np.random.default_rng(9)
    x, y, results = rng.normal(size=(6, 5)), rng.integers(0, 3, 6).astype(np.int32), {}
    params = random_network(spec, ops, 6).params
    for dtype in (np.float32, np.float64):
        net = Network(spec, ops, 6, params.astype(dtype), dtype=dtype)
        dlogits = np.empty((6, 3), dtype)
        logits = net.forward(x.astype(dtype), True)
        Loss("softmax_cross_entropy")(ops, logits, y, None, dlogits)
        net.backward(dlogits)
        arrays = [a for b in net._buffers for name, a in b.items() if a is not None and name != "mask"]
        assert all(a.dtype == dtype for a in [*arrays, *net._flow, net.grads, net.params, logits])
        results[dtype] = logits.copy(), net.grads.copy()
    for single, double in zip(results[np.float32], results[np.float64], strict=True):
        np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-4)


def test_more_rows_than_planned_are_refused_and_any_fewer_are_welcome():
    net = random_network(NetworkSpec((3, 4, 2)), OPS["host"], 20)
    rng = np.random.default_rng(10)
    with pytest.raises(AssertionError, match="21 rows"):
        net.forward(rng.normal(size=(21, 3)))
    x = rng.normal(size=(20, 3))
    whole = net.forward(x).copy()
    for rows in [*range(21), 3, 0]:  # more row counts than plans are kept for
        logits = net.forward(x[:rows])
        np.testing.assert_allclose(logits, whole[:rows], rtol=1e-12)
        net.backward(logits)
    assert len(net._forward_plans) <= 8 and len(net._backward_plans) <= 8


def test_given_vectors_are_used_and_a_network_that_only_predicts_has_no_gradient():
    spec = NetworkSpec((3, 4, 2))
    params, grads = (np.zeros(spec.layout().size, np.float32) for _ in range(2))
    net = Network(spec, OPS["host"], 5, params, grads)
    assert net.params is params and net.grads is grads
    reader = Network(spec, OPS["host"], 5, params)
    reader.forward(np.ones((5, 3), np.float32))
    assert reader._grads is None and reader._flow is None


def traced(step):
    """Bytes that one more step takes at its peak, and that it keeps."""
    for count in range(1, 3):
        step(count)
    tracemalloc.start()
    step(3)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    step(4)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - before, after - before


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_steady_step_allocates_nothing(activation, extras):
    spec = NetworkSpec((60, 128, 128, 10), activation, 0.2 if extras else 0.0, extras, extras)
    net, rng, rows = Network(spec, OPS["host"], 1500), np.random.default_rng(11), 1500
    net.params[...] = initialize(spec, 0)
    x, y = rng.normal(size=(rows, 60)).astype(np.float32), rng.integers(0, 10, rows).astype(np.int32)
    loss, dlogits = Loss("softmax_cross_entropy"), np.empty((rows, 10), np.float32)

    def step(count):
        for n, add in ((rows, False), (77, True)):
            logits = net.forward(x[:n], True, 0, count, 0)
            loss(net.ops, logits, y[:n], None, dlogits[:n])
            net.backward(dlogits[:n], add=add)

    peak, kept = traced(step)
    # An activation takes 768,000 bytes; without the C kernels NumPy works through temporary cache blocks.
    assert peak < (16384 if net.ops.fused else 16 * 4 * BLOCK) and kept < 1024, (peak, kept)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("dropout, norm, residual", [*itertools.product((0.0, 0.4), (False, True), (False, True))])
def test_recomputed_activations_give_the_same_bits_in_less_memory(ops, activation, dropout, norm, residual):
    spec = NetworkSpec((5, *[12] * 5, *[16] * 6, 3), activation, dropout, norm, residual)
    rng = np.random.default_rng(3)
    plain = random_network(spec, ops, 9, np.float32)
    again = Network(spec, ops, 9, plain.params, dtype=np.float32, recompute=True)
    for rows, piece in ((9, None), (4, lambda start, stop: None), (0, None)):
        x, dlogits = (rng.normal(size=(rows, width)).astype(np.float32) for width in (5, 3))
        for net in (plain, again):
            net.forward(x, True, 3, 5, 11, need=piece)
            net.backward(dlogits)
        np.testing.assert_array_equal(again.grads, plain.grads)
    needs_pre = activation in ops.NEEDS_PRE
    kept = spec.kept_activations(needs_pre, spec.segments(needs_pre))
    assert kept < 0.75 * spec.kept_activations(needs_pre)
    if ops is OPS["plain"]:     # the other one aligns, which takes a little more
        assert [held_numbers(net) for net in (plain, again)] == [spec.kept_activations(needs_pre), kept]


def held_numbers(net):
    """Numbers per sample in the buffers that forward fills, each counted once."""
    owners = {}
    for name, buffer in ((name, b) for layer in net._buffers for name, b in layer.items() if b is not None):
        if name in ("out", "f", "pre", "z"):
            base = buffer
            while base.base is not None:
                base = base.base
            owners[base.__array_interface__["data"][0]] = base.size
    return sum(owners.values()) / net.max_rows


def test_a_shallow_network_has_nothing_to_recompute():
    assert NetworkSpec((784, 256, 128, 10)).segments(False) == [0, 3]
    assert len(NetworkSpec((784, *[512] * 15, 10)).segments(False)) - 1 in (3, 4, 5)


def test_an_input_goes_when_the_network_is_told_to_forget_it():
    net, x = random_network(NetworkSpec((4, 50, 2)), OPS["host"], 6), np.ones((6, 4))
    seen = weakref.ref(x)
    net.forward(x)
    del x
    assert seen() is not None
    net.forget()
    assert seen() is None
