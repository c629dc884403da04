"""Tests of nn/losses.py: which loss fits what, shapes of targets, predictions, options."""

import json
import math

import numpy as np
import pytest

from hpcmlp.errors import ConfigError
from hpcmlp.nn.losses import KINDS_OF_TASK, OPTIONS, Loss, balanced_class_weights, default_loss
from hpcmlp.ops.host import HostOps
from hpcmlp.ops.plain import PlainOps

OPS = {"plain": PlainOps(np), "host": HostOps()}


def test_every_task_has_a_default_and_every_loss_a_task():
    assert {default_loss(task) for task in KINDS_OF_TASK} <= set(OPTIONS)
    assert set().union(*KINDS_OF_TASK.values()) == set(OPTIONS)
    assert all(default_loss(task) in kinds for task, kinds in KINDS_OF_TASK.items())


@pytest.mark.parametrize(("kind", "options", "task", "outputs", "wanted"), [
    ("softmax_cross_entropy", {}, "classification", 10, 10), ("softmax_cross_entropy", {}, "classification", 2, 2),
    ("binary_cross_entropy", {}, "classification", 2, 1), ("binary_cross_entropy", {}, "multilabel", 7, 7),
    ("mean_squared", {}, "regression", 3, 3), ("huber", {"delta": 0.5}, "regression", 1, 1),
    ("mean_absolute", {}, "regression", 2, 2), ("quantile", {"quantiles": (0.1, 0.9)}, "regression", 3, 6)])
def test_num_outputs(kind, options, task, outputs, wanted):
    assert Loss(kind, **options).num_outputs(task, outputs) == wanted


@pytest.mark.parametrize(("kind", "options", "task", "outputs", "text"), [
    ("mean_squared", {}, "classification", 10, "mean_squared does not fit classification; use softmax_cross_entropy"),
    ("softmax_cross_entropy", {}, "regression", 1, "does not fit regression"),
    ("binary_cross_entropy", {}, "classification", 3, "takes two classes, and the data have 3"),
    ("softmax_cross_entropy", {"class_weights": (1, 2)}, "classification", 3, "has 2 numbers and the data have 3")])
def test_a_loss_that_does_not_fit_the_data_is_a_sentence(kind, options, task, outputs, text):
    with pytest.raises(ConfigError, match=text):
        Loss(kind, **options).num_outputs(task, outputs)


@pytest.mark.parametrize(("kind", "options", "text"), [
    ("hinge", {}, "'hinge' is not known"), ("huber", {"label_smoothing": 0.1}, "huber has no option label_smoothing"),
    ("softmax_cross_entropy", {"label_smoothing": 1.0}, "label_smoothing = 1.0"),
    ("huber", {"delta": 0.0}, "huber_delta"),
    ("softmax_cross_entropy", {"class_weights": (1.0, math.nan)}, "class_weights must be finite"),
    ("softmax_cross_entropy", {"class_weights": (0.0, 0.0)}, "not all 0"), ("quantile", {"quantiles": ()}, "quantiles"),
    ("quantile", {"quantiles": (0.9, 0.1)}, "smallest first"),
    ("quantile", {"quantiles": (0.5, 1.0)}, "between 0 and 1")])
def test_options_are_checked(kind, options, text):
    with pytest.raises(ConfigError, match=text):
        Loss(kind, **options)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_one_logit_for_two_classes_is_softmax_of_two_logits(ops, dtype, rows):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(rows, 1)).astype(dtype), rng.integers(0, 2, rows).astype(np.int32)
    weights = rng.uniform(0.5, 2.0, rows).astype(dtype)
    two = np.concatenate([np.zeros_like(z), z], axis=1)
    one_gradient, two_gradient = np.empty_like(z), np.empty_like(two)
    binary, softmax = Loss("binary_cross_entropy"), Loss("softmax_cross_entropy")
    for given in (weights, None):
        got = binary(ops, z, y, given, one_gradient)
        assert got == pytest.approx(softmax(ops, two, y, given, two_gradient), rel=1e-5)
        np.testing.assert_allclose(one_gradient[:, 0], two_gradient[:, 1], rtol=1e-4, atol=1e-6)
    a, b = binary.prediction(z, "classification"), softmax.prediction(two, "classification")
    assert a.dtype == b.dtype == dtype and a.shape == b.shape == (rows, 2)
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_sums_of_parts_are_the_sum_of_the_whole_for_every_loss(ops):
    rng = np.random.default_rng(1)
    for kind in OPTIONS:
        options = {"class_weights": (1.0, 2.0, 0.0)} if kind == "softmax_cross_entropy" else {}
        loss, logits = Loss(kind, **options), rng.normal(size=(11, 3))
        targets = rng.normal(size=(11, 1 if kind == "quantile" else 3))
        if kind == "softmax_cross_entropy":
            targets = rng.integers(0, 3, 11).astype(np.int32)
        elif kind == "binary_cross_entropy":
            targets = (targets > 0).astype(float)
        weights, gradient, parts = rng.uniform(size=11), np.empty((11, 3)), np.empty((11, 3))
        whole = np.array(loss(ops, logits, targets, weights, gradient))
        summed = np.zeros(2)
        for start, stop in ((0, 5), (5, 5), (5, 11)):
            summed += loss(ops, logits[start:stop], targets[start:stop], weights[start:stop], parts[start:stop])
        np.testing.assert_allclose(summed, whole, rtol=1e-12)
        np.testing.assert_allclose(parts, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_are_probabilities_without_overflow_and_values_unchanged(dtype):
    z = np.array([[1e4, -1e4, 0.0], [0.0, 0.0, math.log(2.0)], [-800.0, -801.0, -1e4]], dtype)
    p = Loss("softmax_cross_entropy").prediction(z, "classification")
    np.testing.assert_allclose(p, [[1, 0, 0], [0.25, 0.25, 0.5], [1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0]],
                               rtol=1e-5, atol=1e-30)
    s = Loss("binary_cross_entropy").prediction(z, "multilabel")
    np.testing.assert_allclose(s[:2], [[1, 0, 0.5], [0.5, 0.5, 2 / 3]], rtol=1e-6)
    values = Loss("mean_squared").prediction(z, "regression")
    assert np.array_equal(values, z) and not np.shares_memory(values, z)
    assert p.dtype == s.dtype == values.dtype == dtype


def test_metadata_goes_through_json_and_back():
    for loss in (Loss("softmax_cross_entropy", label_smoothing=0.1, class_weights=(1, 2)), Loss("mean_squared"),
                 Loss("quantile", quantiles=[0.2, 0.8]), Loss("huber", delta=2.0)):
        back = Loss.from_metadata(json.loads(json.dumps(loss.metadata())))
        assert back.kind == loss.kind and back.options == loss.options


def test_balanced_class_weights_give_every_class_the_same_total():
    counts = (90, 9, 1)
    weights = balanced_class_weights(counts)
    np.testing.assert_allclose(np.multiply(weights, counts), [100 / 3] * 3)
    assert all(math.isfinite(w) for w in balanced_class_weights((5, 0)))
