"""Metrics agree with scikit-learn, however the samples are cut into blocks and spread over ranks."""

import importlib.util
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from hpcmlp.nn.auc import area, log_odds, merge_groups, pair_counts, score_groups
from hpcmlp.nn.metrics import ClassMetrics, LabelMetrics, OutputMetrics, QuantileMetrics

ORACLE = Path(__file__).parents[1] / "oracle" / "metrics.npz"
QUANTILES = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def stored():
    with np.load(ORACLE, allow_pickle=False) as file:
        return dict(file)


def make(group, full=True):
    return {"classes": lambda: ClassMetrics(5, 3, full), "binary": lambda: ClassMetrics(2, 3, full),
            "labels": lambda: LabelMetrics(4, full), "outputs": lambda: OutputMetrics(3, full),
            "quantiles": lambda: QuantileMetrics(2, QUANTILES, full)}[group]()


def feed(metrics, stored, group, weighted, rows=slice(None), block=13):
    arrays = [stored[f"{group}.{name}"][rows] for name in ("logits", "targets", "weights")]
    for start in range(0, max(len(arrays[0]), 1), block):
        logits, targets, weights = (a[start:start + block] for a in arrays)
        metrics.add(logits, targets, weights if weighted else None)
    return metrics


def join(parts):
    """Sum accumulators as ranks do: each `all_reduce` of the first meets the same call of the others."""
    arrays = [[] for _ in parts]
    for recorded, part in zip(arrays, parts, strict=True):  # a dry run, to see what each would send first
        first = deepcopy(part)
        first.total(lambda a, recorded=recorded: recorded.append(a.copy()))
    sums = [np.sum([recorded[0] for recorded in arrays], axis=0)]
    calls = len(arrays[0])
    for call in range(1, calls):  # what is sent later may depend on the sums before
        later = []
        for part in parts:
            sent, totals = [], iter(sums)

            def replay(a, sent=sent, totals=totals):
                sent.append(a.copy())
                total = next(totals, None)
                if total is not None:
                    a[...] = total

            deepcopy(part).total(replay)
            later.append(sent[call])
        sums.append(np.sum(later, axis=0))
    totals = iter(sums)
    joined = deepcopy(parts[-1])
    joined.total(lambda a: a.__setitem__(..., next(totals)))
    return joined


def each(figures, where, key):
    return [entry[key] for entry in figures[where].values()]


def check(figures, expected, group, tail):
    names = [name.split(".", 2) for name in expected if name.startswith(f"expected.{group}.")]
    checked = 0
    for parts in names:
        name = parts[2]
        if name.endswith(".w") != bool(tail):
            continue
        wanted = expected[f"expected.{group}.{name}"]
        name = name.removesuffix(".w")
        if name.endswith("auc"):
            continue
        if name == "pinball":
            got = [[q["pinball"] for q in entry["quantiles"].values()] for entry in figures["outputs"].values()]
        else:
            got = each(figures, *name.split(".")) if "." in name else figures[name]
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=0, err_msg=f"{group} {name}")
        checked += 1
    assert checked


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("group", ["classes", "binary", "labels", "outputs", "quantiles"])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_figures_are_those_of_scikit_learn(stored, group, weighted, block):
    metrics = feed(make(group), stored, group, weighted, block=block)
    metrics.total(lambda a: None)
    check(metrics.result(), stored, group, ".w" if weighted else "")


def test_stored_values_are_those_of_the_installed_scikit_learn(stored):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("oracle", ORACLE.with_name("make_metrics_oracle.py"))
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    for name, value in oracle.figures({k: v for k, v in stored.items() if not k.startswith("expected.")}).items():
        np.testing.assert_allclose(stored[f"expected.{name}"], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("group", ["classes", "binary", "labels", "outputs", "quantiles"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_of_ranks_add_up_to_the_whole(stored, group, ranks):
    n = len(stored[f"{group}.logits"])
    cuts = [0, *(n * (r + 1) // ranks for r in range(ranks - 1)), n]
    parts = [feed(make(group), stored, group, True, slice(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
    empty = make(group)  # a rank without rows
    check(join([empty, *parts]).result(), stored, group, ".w")


@pytest.mark.parametrize("group", ["classes", "labels", "outputs", "quantiles"])
def test_the_short_form_gives_the_same_main_metric(stored, group):
    whole, short = (feed(make(group, full), stored, group, True) for full in (True, False))
    assert short.result()[short.main] == pytest.approx(whole.result()[whole.main], rel=1e-14)
    assert len(short.result()) <= 4


def test_coverage_counts_targets_at_or_below_the_quantile():
    metrics = QuantileMetrics(1, QUANTILES)
    metrics.add(np.array([[0.0, 1.0, 2.0]] * 5, np.float32), np.array([[-1], [0], [1], [2], [3]], np.float32))
    entry = metrics.result()["outputs"]["0"]
    assert [q["coverage"] for q in entry["quantiles"].values()] == [0.4, 0.6, 0.8]
    assert entry["interval_coverage"] == 0.6


def test_a_tie_goes_to_the_lowest_class():
    logits = np.array([[1, 1, 0, 1]] * 4, np.float32)
    targets = np.array([0, 1, 2, 3])
    top1, top2, top3 = (ClassMetrics(4, k) for k in (1, 2, 3))
    for metrics in (top1, top2, top3):
        metrics.add(logits, targets)
    assert top1.result()["accuracy"] == 0.25
    assert top2.result()["top2_accuracy"] == 0.5
    assert top3.result()["top3_accuracy"] == 0.75
    assert "top4_accuracy" not in ClassMetrics(4, 4).result()


def test_counts_of_a_large_problem_stay_whole():
    metrics = ClassMetrics(3)
    metrics.state[:3] = 2**52, 2**52, 2**51
    metrics.add(np.eye(3, dtype=np.float32), np.array([0, 1, 0]))
    assert metrics.result()["rows"] == 2**52 + 3
    assert int(metrics.state[2]) == 2**51 + 2


def test_numbers_that_are_not_finite_are_counted_and_wrong():
    logits = np.array([[np.nan, 0.0], [np.inf, 0.0], [2.0, 1.0]], np.float32)
    metrics = ClassMetrics(2)
    metrics.add(logits, np.zeros(3, np.int32))
    figures = metrics.result()
    assert figures["not_finite"] == 2 and figures["accuracy"] == 1 / 3 and np.isnan(figures["log_loss"])
    labels = LabelMetrics(2)
    labels.add(logits, np.ones((3, 2), np.float32))
    assert labels.result()["not_finite"] == 2 and labels.result()["label_accuracy"] == 1 / 3
    outputs = OutputMetrics(2)
    outputs.add(logits, np.ones((3, 2), np.float32))
    assert outputs.result()["not_finite"] == 2 and outputs.result()["rmse"] == np.sqrt(0.5)


@pytest.mark.parametrize("metrics", [ClassMetrics(3), LabelMetrics(3), OutputMetrics(3), QuantileMetrics(3, (0.5,))])
def test_no_samples_give_no_figures_and_no_warning(metrics):
    metrics.total(lambda a: None)
    figures = metrics.result()
    assert figures["rows"] == 0 and np.isnan(figures[metrics.main])


def test_spread_is_sound_far_from_zero():
    """R2 of float64 targets about 1e9 apart from 0 by their mean: naive sums of squares lose every digit."""
    random = np.random.default_rng(0)
    small = random.normal(size=(1000, 1))
    error = 0.1 * random.normal(size=(1000, 1))
    wanted = 1 - np.sum(error**2) / np.sum((small - small.mean()) ** 2)
    parts = [OutputMetrics(1) for _ in range(3)]
    for start in range(0, 1000, 50):
        rows = slice(start, start + 50)
        parts[start % 3].add(1e9 + small[rows] + error[rows], 1e9 + small[rows])
    assert join(parts).result()["r2"] == pytest.approx(wanted, rel=1e-6)


def test_r2_of_constant_targets_follows_scikit_learn():
    perfect, wrong = OutputMetrics(1), OutputMetrics(1)
    perfect.add(np.full((5, 1), 2.0), np.full((5, 1), 2.0))
    wrong.add(np.full((5, 1), 3.0), np.full((5, 1), 2.0))
    assert perfect.result()["r2"] == 1.0 and wrong.result()["r2"] == 0.0
    single = OutputMetrics(1)
    single.add(np.ones((1, 1)), np.ones((1, 1)))
    assert np.isnan(single.result()["r2"])


def test_physical_units_scale_the_errors():
    metrics = OutputMetrics(2)
    metrics.add(np.array([[1.0, 0.0], [1.0, 2.0]]), np.zeros((2, 2)))
    entry = metrics.result(["a", "b"], scale=[10.0, -3.0])["outputs"]
    assert entry["a"]["rmse_physical"] == 10.0 and entry["b"]["mae_physical"] == 3.0


def test_input_arrays_are_left_alone(stored):
    for group in ("classes", "labels", "outputs", "quantiles"):
        before = {k: v.copy() for k, v in stored.items()}
        feed(make(group), stored, group, True)
        for key, value in before.items():
            np.testing.assert_array_equal(stored[key], value)


def whole_area(scores, positive, weights=None):
    return area(pair_counts(score_groups(scores, positive, weights), weights is None)[None])


def pairs(scores, positive, weights=None):
    """The definition, pair by pair."""
    w = np.ones(len(scores)) if weights is None else weights
    won = total = Fraction(0)
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive):
            pair = Fraction(float(w[i])) * Fraction(float(w[j]))
            total += pair
            won += pair * (2 if scores[i] > scores[j] else 1 if scores[i] == scores[j] else 0) / 2
    return float(won / total) if total else float("nan")


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("n", [0, 1, 2, 31])
def test_auc_is_the_share_of_pairs(levels, n):
    random = np.random.default_rng(n * levels)
    scores = random.integers(0, levels, n) / 7.0
    positive = random.integers(0, 2, n) == 1
    weights = random.uniform(0, 3, n)
    np.testing.assert_equal(whole_area(scores, positive), pairs(scores, positive))
    np.testing.assert_allclose(whole_area(scores, positive, weights), pairs(scores, positive, weights), rtol=1e-12)


@pytest.mark.parametrize("tail", ["", ".w"])
def test_auc_is_that_of_scikit_learn(stored, tail):
    weights = {g: stored[f"{g}.weights"] if tail else None for g in ("classes", "binary", "labels")}
    odds = log_odds(stored["classes.logits"])
    areas = [whole_area(odds[:, c], stored["classes.targets"] == c, weights["classes"]) for c in range(5)]
    np.testing.assert_allclose(areas, stored[f"expected.classes.classes.auc{tail}"], rtol=1e-12)
    binary = whole_area(log_odds(stored["binary.logits"])[:, 0], stored["binary.targets"] == 1, weights["binary"])
    np.testing.assert_allclose(binary, stored[f"expected.binary.auc{tail}"], rtol=1e-12)
    labels = [whole_area(stored["labels.logits"][:, j], stored["labels.targets"][:, j] > 0.5, weights["labels"])
              for j in range(4)]
    np.testing.assert_allclose(labels, stored[f"expected.labels.labels.auc{tail}"], rtol=1e-12)


def test_auc_of_ranges_joins_bit_for_bit():
    random = np.random.default_rng(5)
    scores, positive = random.integers(0, 40, 500) / 3.0, random.integers(0, 3, 500) == 0
    groups = score_groups(scores, positive)
    for cuts in ([0, 1, 1, 17], [0, 39], [0, 5, 10, 20, 30]):
        ends = [*cuts[1:], len(groups)]
        counts = np.array([pair_counts(groups[a:b], True) for a, b in zip(cuts, ends, strict=True)])
        assert area(counts) == whole_area(scores, positive)


def test_auc_of_groups_beyond_64_bits_is_exact():
    groups = np.array([[0.0, 3e9, 5e9], [1.0, 5e9, 3e9]])
    won = Fraction(5 * 5) + Fraction(3 * 5 + 5 * 3, 2)
    assert area(pair_counts(groups, True)[None]) == float(won / 64)


def test_equal_scores_merge_into_one_group():
    groups = merge_groups(np.array([[2.0, 1, 0], [1.0, 0, 1], [2.0, 0, 3], [1.0, 2, 0]]))
    assert groups.tolist() == [[1.0, 2, 1], [2.0, 1, 3]]


def test_log_odds_tell_apart_what_probabilities_round_to_one():
    odds = log_odds(np.array([[900.0, 0.0, 0.0], [800.0, 0.0, 0.0], [1.0, 1.0, 1.0]], np.float32))
    assert odds[0, 0] > odds[1, 0] > 700
    np.testing.assert_allclose(odds[2], -np.log(2), rtol=1e-15)
    assert log_odds(np.zeros((0, 4))).shape == (0, 4) and log_odds(np.zeros((3, 1))).shape == (3, 1)
    assert log_odds(np.array([[1.0, 4.0]])).tolist() == [[3.0]]
