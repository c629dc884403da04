"""Tests of nn/optimizers.py: PyTorch's trajectories, the papers of LAMB and LARS, ranges, dtypes, state."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hpcmlp.errors import ConfigError
from hpcmlp.nn.layout import Layout
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import HYPER, Average, make_optimizer, merge
from hpcmlp.ops.host import BLOCK, HostOps
from hpcmlp.ops.plain import PlainOps

ORACLE = Path(__file__).parents[1] / "oracle" / "nn.npz"
OPS = {"plain": PlainOps(np), "host": HostOps()}
CASES = {
    "sgd": ("sgd", {}),
    "sgd-momentum": ("sgd", {"momentum": 0.9}),
    "sgd-dampening": ("sgd", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd-nesterov": ("sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    "adam": ("adam", {}),
    "adam-decay": ("adam", {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.99, "eps": 1e-3}),
    "adamw": ("adamw", {}),
    "adamw-decay": ("adamw", {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.99, "eps": 1e-3}),
    "rmsprop": ("rmsprop", {}),
    "rmsprop-momentum": ("rmsprop", {"alpha": 0.9, "momentum": 0.7, "weight_decay": 0.1, "eps": 1e-3}),
    "adagrad": ("adagrad", {}),
    "adagrad-decay": ("adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3}),
}
LAYERWISE = {
    "lamb": ("lamb", {}),
    "lamb-decay": ("lamb", {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.99, "eps": 1e-3}),
    "lars": ("lars", {}),
    "lars-decay": ("lars", {"weight_decay": 0.2, "momentum": 0.7, "trust": 0.02}),
    "lars-plain": ("lars", {"momentum": 0.0}),
}
LAYOUT = Layout([("w0", (7, 5)), ("b0", (7,)), ("w1", (40, 7)), ("b1", (40,)), ("w2", (2, 40)), ("b2", (2,))])


def vectors(dtype=np.float64, seed=0, layout=LAYOUT):
    """Parameters, and the gradients of a few steps; padding zero."""
    rng = np.random.default_rng(seed)
    return [layout.pack({t.name: rng.normal(size=t.shape) for t in layout.tensors}, dtype) for _ in range(6)]


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", CASES)
def test_training_follows_the_trajectory_of_pytorch(ops, dtype, case):
    with np.load(ORACLE) as file:
        x, y, start, wanted = (file[f"optimizer/{name}"] for name in ("x", "y", "params", case))
    spec = NetworkSpec((4, 6, 3), "tanh")
    layout, name, options = spec.layout(), *CASES[case]
    inside = layout.pack({t.name: np.ones(t.shape) for t in layout.tensors}, bool)
    net = Network(spec, ops, len(x), dtype=dtype)
    net.params[inside] = start
    opt, dlogits = make_optimizer(name, ops, layout, [(0, layout.size)], dtype, **options), np.empty((len(x), 3), dtype)
    for step, expected in enumerate(wanted, 1):
        _, count = Loss("softmax_cross_entropy")(ops, net.forward(x.astype(dtype)), y, None, dlogits)
        net.backward(dlogits)
        opt.update(net.params, net.grads, 0.05, step, 1.0 / count)
        tolerance = 1e-10 if dtype == np.float64 else 2e-5
        np.testing.assert_allclose(net.params[inside], expected, rtol=tolerance, atol=tolerance)
        assert not net.params[~inside].any()


def lamb_of_the_paper(w, gradients, lr, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.0):
    """You et al. 2020, algorithm 2, one tensor, with phi(z) = z."""
    m = v = 0.0 * w
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        update = r + weight_decay * w
        norms = np.linalg.norm(w), np.linalg.norm(update)
        w = w - lr * (norms[0] / norms[1] if w.ndim == 2 and min(norms) > 0 else 1.0) * update
    return w


def lars_of_the_paper(w, gradients, lr, momentum=0.9, trust=0.001, weight_decay=0.0):
    """You, Gitman, Ginsburg 2017, algorithm 1, one tensor, at a constant global rate."""
    velocity = 0.0 * w
    for g in gradients:
        norms = np.linalg.norm(w), np.linalg.norm(g)
        local = trust * norms[0] / (norms[1] + weight_decay * norms[0]) if w.ndim == 2 and min(norms) > 0 else 1.0
        velocity = momentum * velocity + lr * local * (g + weight_decay * w)
        w = w - velocity
    return w


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("case", LAYERWISE)
def test_lamb_and_lars_follow_their_papers(ops, case):
    name, options = LAYERWISE[case]
    params, *gradients = vectors()
    params[LAYOUT.tensors[4].start:LAYOUT.tensors[4].stop] = 0.0  # a weight of norm 0 has ratio 1
    rule = {"lamb": lamb_of_the_paper, "lars": lars_of_the_paper}[name]
    wanted = {t.name: rule(LAYOUT.unpack(params)[t.name], [0.25 * LAYOUT.unpack(g)[t.name] for g in gradients], 0.05,
                           **options) for t in LAYOUT.tensors}
    opt = make_optimizer(name, ops, LAYOUT, [(0, LAYOUT.size)], np.float64, **options)
    assert opt.needs_norms
    for step, g in enumerate(gradients, 1):
        opt.update(params, g, 0.05, step, 0.25)
    np.testing.assert_allclose(params, LAYOUT.pack(wanted, np.float64), rtol=1e-9, atol=1e-12)


def cut_in_ranges(size, owners, seed):
    """Random ranges dealt to `owners`, the last of whom gets nothing."""
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted(int(c) for c in rng.integers(0, size + 1, 9)), size]
    dealt = [[] for _ in range(owners)]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        dealt[rng.integers(0, owners - 1)].append((start, stop))
    return dealt


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", CASES)
def test_any_cut_into_ranges_gives_the_same_bits(ops, dtype, case):
    name, options = CASES[case]
    layout = Layout([("w", (53, 97)), ("b", (53,))])
    whole, *gradients = vectors(dtype, 1, layout)
    cut = whole.copy()
    opt = make_optimizer(name, ops, layout, [(0, layout.size)], dtype, **options)
    parts = [make_optimizer(name, ops, layout, ranges, dtype, **options) for ranges in cut_in_ranges(layout.size, 4, 2)]
    assert sum(part.size for part in parts) == layout.size and parts[-1].size == 0
    for step, g in enumerate(gradients, 1):
        opt.update(whole, g, 0.05, step, 0.3)
        for part in parts:
            part.update(cut, g, 0.05, step, 0.3)
    assert whole.dtype == cut.dtype == dtype and np.array_equal(whole, cut)
    for key, array in opt.state.items():
        joined = np.zeros_like(array)
        for part in parts:
            at = 0
            for start, stop in part.ranges:
                joined[start:stop] = part.state[key][at:at + stop - start]
                at += stop - start
        assert array.dtype == dtype and np.array_equal(array, joined)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("case", LAYERWISE)
def test_norms_over_owners_give_the_whole_to_rounding(ops, case):
    name, options = LAYERWISE[case]
    whole, *gradients = vectors()
    cut = whole.copy()
    opt = make_optimizer(name, ops, LAYOUT, [(0, LAYOUT.size)], np.float64, **options)
    dealt = cut_in_ranges(LAYOUT.size, 4, 3)
    parts = [make_optimizer(name, ops, LAYOUT, ranges, np.float64, **options) for ranges in dealt]
    for step, g in enumerate(gradients, 1):
        # First only the owners' sums, from copies; then the update with the total, as an all_reduce would give it.
        total, before = np.zeros(2 * len(LAYOUT.tensors)), cut.copy()
        for ranges in dealt:
            probe = make_optimizer(name, ops, LAYOUT, ranges, np.float64, **options)
            probe.load(parts[dealt.index(ranges)].state)
            probe.update(before.copy(), g, 0.05, step, 0.3, lambda sums: np.add(total, sums, out=total))  # noqa: B023
        for part in parts:
            part.update(cut, g, 0.05, step, 0.3, lambda sums: np.copyto(sums, total))  # noqa: B023
        opt.update(whole, g, 0.05, step, 0.3)
        np.testing.assert_allclose(cut, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("case", CASES | LAYERWISE)
def test_float32_stays_float32_gradients_are_not_written_and_padding_stays_zero(ops, case):
    name, options = (CASES | LAYERWISE)[case]
    params, *gradients = vectors(np.float32)
    double, kept = params.astype(np.float64), [g.copy() for g in gradients]
    opts = [make_optimizer(name, ops, LAYOUT, [(0, LAYOUT.size)], dtype, **options)
            for dtype in (np.float32, np.float64)]
    for step, g in enumerate(gradients, 1):
        opts[0].update(params, g, 0.05, step, 0.3)
        opts[1].update(double, g.astype(np.float64), 0.05, step, 0.3)
    assert params.dtype == np.float32 and all(a.dtype == np.float32 for a in opts[0].state.values())
    assert all(np.array_equal(a, b) for a, b in zip(kept, gradients, strict=True))
    np.testing.assert_allclose(params, double, rtol=1e-4, atol=1e-5)
    assert np.array_equal(LAYOUT.pack(LAYOUT.unpack(params)), params)


@pytest.mark.parametrize("case", CASES | LAYERWISE)
def test_state_loads_into_a_new_optimizer_that_goes_on_bit_for_bit(case):
    name, options = (CASES | LAYERWISE)[case]
    ranges = [(3, 20), (30, 90), (90, 100)]
    params, *gradients = vectors(np.float32)
    one, other = (make_optimizer(name, OPS["host"], LAYOUT, ranges, np.float32, **options) for _ in range(2))
    for step, g in enumerate(gradients[:3], 1):
        one.update(params, g, 0.05, step)
    saved, again = {key: array.copy() for key, array in one.state.items()}, params.copy()
    other.load(saved)
    for step, g in enumerate(gradients[3:], 4):
        one.update(params, g, 0.05, step)
        other.update(again, g, 0.05, step)
    assert np.array_equal(params, again)
    assert all(np.array_equal(one.state[key], other.state[key]) for key in one.state)
    with pytest.raises(ValueError, match="does not fit"):
        other.load({"z": np.zeros(3)})


@pytest.mark.parametrize("name", HYPER)
def test_an_owner_of_nothing_changes_nothing_but_takes_part_in_the_sums(name):
    opt, calls = make_optimizer(name, OPS["host"], LAYOUT, [(5, 5)]), []
    params, grads = vectors(np.float32)[:2]
    kept = params.copy()
    opt.update(params, grads, 0.1, 1, 1.0, lambda sums: calls.append(sums.shape))
    assert np.array_equal(params, kept) and opt.size == 0
    assert calls == ([(2 * len(LAYOUT.tensors),)] if opt.needs_norms else [])


@pytest.mark.parametrize("name", HYPER)
def test_steady_update_allocates_nothing(name):
    layout = Layout([("w", (200, 300)), ("b", (200,))])
    params, *gradients = vectors(np.float32, 0, layout)
    opt = make_optimizer(name, OPS["host"], layout, [(0, 20_000), (30_000, layout.size)])
    opt.update(params, gradients[0], 0.01, 1)
    opt.update(params, gradients[0], 0.01, 2)
    tracemalloc.start()
    opt.update(params, gradients[0], 0.01, 3)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    opt.update(params, gradients[0], 0.01, 4)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A vector takes 240,000 bytes; without the C kernels NumPy works through temporary cache blocks.
    limit = 16384 if opt.ops.fused else 6 * 4 * BLOCK
    assert peak - before < limit and after - before < 1024, (peak - before, after - before)


@pytest.mark.parametrize(("name", "options", "text"), [
    ("adamx", {}, "'adamx' is not known"), ("adam", {"momentum": 0.9}, "adam has no option momentum"),
    ("adam", {"beta2": 1.0}, "beta2 = 1.0"), ("sgd", {"weight_decay": -0.1}, "weight_decay = -0.1"),
    ("lars", {"trust": 0.0}, "trust = 0.0"), ("sgd", {"nesterov": True}, "nesterov needs")])
def test_constants_are_checked(name, options, text):
    with pytest.raises(ConfigError, match=text):
        make_optimizer(name, OPS["host"], LAYOUT, [(0, LAYOUT.size)], **options)


def test_adjacent_ranges_become_one():
    assert merge([(0, 4), (4, 8), (8, 8), (10, 12)]) == [(0, 8), (10, 12)] and merge([]) == []
    with pytest.raises(AssertionError):
        merge([(4, 8), (6, 9)])


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_average_is_the_weighted_sum_of_the_past(ops, dtype):
    history, ranges = [v.astype(dtype) for v in vectors(np.float64)], [(3, 20), (40, LAYOUT.size)]
    owned = np.concatenate([np.arange(*r) for r in ranges])
    average = Average(ops, ranges, 0.8, dtype)
    average.start(history[0])
    for params in history[1:]:
        average.update(params)
    weights = [0.8**5] + [0.2 * 0.8 ** (5 - i) for i in range(1, 6)]
    wanted = np.einsum("i,ij->j", weights, np.array(history, np.float64))[owned]
    np.testing.assert_allclose(average.array, wanted, rtol=1e-5, atol=1e-6)
    assert average.array.dtype == dtype
    out, other = np.zeros(LAYOUT.size, dtype), Average(ops, ranges, 0.8, dtype)
    other.load(average.array.copy())
    other.copy_to(out)
    assert np.array_equal(out[owned], average.array) and not np.delete(out, owned).any()
    with pytest.raises(ValueError, match="does not fit"):
        average.load(np.zeros(3, dtype))
