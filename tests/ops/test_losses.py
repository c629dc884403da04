"""Losses: sums, weights and gradients against PyTorch, finite differences and hand-computed values."""

import numpy as np
import pytest

from hpcmlp.ops import losses
from hpcmlp.ops.plain import PlainOps

CASES = [
    ("softmax_cross_entropy", {}),
    ("softmax_cross_entropy", {"label_smoothing": 0.1}),
    ("softmax_cross_entropy", {"class_weights": True}),
    ("softmax_cross_entropy", {"class_weights": True, "label_smoothing": 0.3}),
    ("binary_cross_entropy", {}),
    ("mean_squared", {}),
    ("mean_absolute", {}),
    ("huber", {}),
    ("huber", {"delta": 0.3}),
    ("quantile", {"quantiles": (0.5,)}),
    ("quantile", {"quantiles": (0.1, 0.5, 0.8)}),
]
IDS = [f"{kind}-{'-'.join(options)}" for kind, options in CASES]
SHAPES = [(0, 3), (1, 1), (1, 10), (5, 7), (64, 10), (129, 33), (3, 9001), (70, 1)]


def problem(rng, kind, options, n, k):
    """Logits, targets, weights and options of a random problem with k targets."""
    options = dict(options)
    if "class_weights" in options:
        options["class_weights"] = rng.uniform(0.2, 2.0, k)
    targets = rng.integers(0, k, n).astype(np.int32) if kind == "softmax_cross_entropy" else rng.uniform(size=(n, k))
    width = k * len(options.get("quantiles", (1,)))
    return rng.normal(size=(n, width)) * 2, targets, rng.uniform(0.1, 2.0, n), options


def run(side, kind, logits, targets, weights, options, gradient=True):
    """The loss on one side: the two sums and the gradient."""
    if "class_weights" in options:
        options = {**options, "class_weights": side.array(options["class_weights"])}
    dlogits = side.out(*logits.shape) if gradient else None
    weights = None if weights is None else side.array(weights)
    sums = side.ops.loss(kind, side.array(logits), side.array(targets), weights, dlogits, **options)
    assert all(type(value) is float for value in sums)
    return sums, dlogits


def test_losses_are_those_of_pytorch(side, oracle):
    for case, (kind, options, weighted) in oracle["cases"]["losses"].items():
        if "class_weights" in options:
            options = {**options, "class_weights": np.array(options["class_weights"])}
        targets = oracle["loss/labels" if kind == "softmax_cross_entropy" else "loss/values"]
        weights = oracle["loss/weights"] if weighted else None
        sums, dlogits = run(side, kind, oracle["loss/logits"], targets, weights, options)
        np.testing.assert_allclose(sums, oracle[f"loss/{case}/sums"], rtol=1e-13 if side.exact else 2e-6, err_msg=case)
        side.check(dlogits, oracle[f"loss/{case}/dlogits"])


@pytest.mark.parametrize("kind, options", CASES, ids=IDS)
def test_gradients_agree_with_finite_differences(exact_side, kind, options, rng):
    logits, targets, weights, options = problem(rng, kind, options, 4, 5)
    _, dlogits = run(exact_side, kind, logits, targets, weights, options)
    for at in np.ndindex(logits.shape):
        sums = []
        for h in (1e-6, -1e-6):
            moved = logits.copy()
            moved[at] += h
            sums.append(run(exact_side, kind, moved, targets, weights, options, gradient=False)[0][0])
        assert dlogits[at] == pytest.approx((sums[0] - sums[1]) / 2e-6, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("kind, options", CASES, ids=IDS)
def test_every_side_agrees_with_plain_float64(side, kind, options, rng):
    for shape in SHAPES:
        logits, targets, weights, given = problem(rng, kind, options, *shape)
        logits, weights = (side.array(array).astype(np.float64) for array in (logits, weights))
        targets = side.array(targets).astype(np.float64) if targets.dtype.kind == "f" else targets
        for used in (None, weights):
            wanted = np.empty(logits.shape)
            wanted_sums = PlainOps().loss(kind, logits, targets, used, wanted, **given)
            sums, dlogits = run(side, kind, logits, targets, used, given)
            np.testing.assert_allclose(sums, wanted_sums, rtol=1e-12 if side.exact else 5e-6, atol=1e-6)
            side.check(dlogits, wanted)
            assert run(side, kind, logits, targets, used, given, gradient=False)[0] == sums


@pytest.mark.parametrize("kind, options", CASES, ids=IDS)
def test_the_gradient_may_overwrite_the_logits(side, kind, options, rng):
    logits, targets, weights, options = problem(rng, kind, options, 9, 5)
    _, apart = run(side, kind, logits, targets, weights, options)
    if "class_weights" in options:
        options["class_weights"] = side.array(options["class_weights"])
    same = side.array(logits)
    side.ops.loss(kind, same, side.array(targets), side.array(weights), same, **options)
    assert (same == apart).all()


@pytest.mark.parametrize("kind, options", CASES, ids=IDS)
def test_a_nan_in_one_row_reaches_the_sum_and_that_row_alone(side, kind, options, rng):
    logits, targets, _, options = problem(rng, kind, options, 6, 40)
    logits[2, 17] = np.nan
    with np.errstate(invalid="ignore"):
        (loss, weight), dlogits = run(side, kind, logits, targets, None, options)
    assert np.isnan(loss) and np.isfinite(weight)
    assert np.isnan(dlogits[2, 17]) and np.isfinite(np.delete(dlogits, 2, axis=0)).all()


def test_huge_logits_stay_finite(side):
    logits = np.array([[1e4, -1e4, 0.0], [-1e30, 1e30, 3.0]])
    (loss, _), dlogits = run(side, "softmax_cross_entropy", logits, np.array([0, 1], np.int32), None, {})
    assert loss == 0.0 and (dlogits == 0).all()
    targets = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    (loss, _), dlogits = run(side, "binary_cross_entropy", logits, targets, None, {})
    assert np.isfinite(loss) and np.isfinite(dlogits).all()


def test_quantile_by_hand(side):
    logits, targets = np.array([[0.0, 3.0]]), np.array([[1.0]])
    (loss, weight), dlogits = run(side, "quantile", logits, targets, None, {"quantiles": (0.9, 0.25)})
    # under by 1: 0.9 * 1; over by 2: 0.75 * 2; mean over both
    assert loss == pytest.approx((0.9 + 1.5) / 2) and weight == 1.0
    np.testing.assert_allclose(dlogits, [[-0.45, 0.375]], rtol=1e-6)


def test_sums_over_many_rows_are_accumulated_in_float64(side):
    n = 20011
    logits, targets = np.zeros((n, 1)), np.full((n, 1), 0.1)
    (loss, weight), _ = run(side, "mean_squared", logits, targets, None, {})
    value = float(side.dtype.type(0.1) * side.dtype.type(0.1))
    assert loss == pytest.approx(n * value, rel=1e-6 if side.dtype == np.float32 else 1e-12) and weight == n


def test_labels_out_of_range_are_refused(side):
    for label in (5, 2**31 - 1):
        with pytest.raises(IndexError):
            run(side, "softmax_cross_entropy", np.zeros((3, 5)), np.array([0, 1, label], np.int32), None, {})


def test_the_kinds_are_those_of_the_contract():
    assert losses.KINDS == PlainOps.LOSSES == tuple(dict.fromkeys(kind for kind, _ in CASES))
