"""Evaluation uses every sample once and gives one result at any number of ranks, empty ranks included."""

import math
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from hpcmlp.data.samples import Batch
from hpcmlp.errors import DataError
from hpcmlp.nn.auc import area, pair_counts, score_groups
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.ops.host import HostOps
from hpcmlp.run.evaluation import evaluate_split
from hpcmlp.run.roc import roc_areas


@dataclass
class Facts:
    """The part of a manifest that evaluation reads."""

    task: str
    classes: list = None
    target_names: list = field(default_factory=list)
    target_scale: list = None
    load_shift: list = None
    load_scale: list = None
    weighted: bool = False
    name: str = "made up"


class Rows:
    """A loader over arrays that every rank holds: rank r visits its contiguous rows."""

    def __init__(self, x, y, weight, comm):
        self.x, self.y, self.weight, self.num_rows = x, y, weight, len(x)
        self.own = [self.num_rows * r // comm.size for r in (comm.rank, comm.rank + 1)]
        self.visited = []

    def sequential(self, max_rows):
        for start in range(*self.own, max_rows):
            index = np.arange(start, min(start + max_rows, self.own[1]))
            self.visited += index.tolist()
            yield Batch(len(index), start, self.num_rows, self.x, index, self.y[index],
                        None if self.weight is None else self.weight[index])


CASES = {
    "classes": (Facts("classification", classes=["a", "b", "c"]),
                Loss("softmax_cross_entropy", label_smoothing=0.1), 3),
    "two classes": (Facts("classification", classes=["a", "b"]), Loss("softmax_cross_entropy"), 2),
    "one logit": (Facts("classification", classes=["a", "b"]), Loss("binary_cross_entropy"), 1),
    "labels": (Facts("multilabel", target_names=["p", "q"]), Loss("binary_cross_entropy"), 2),
    "outputs": (Facts("regression", target_names=["u", "v"], target_scale=[2.0, 3.0]), Loss("mean_squared"), 2),
    "quantiles": (Facts("regression", target_names=["u"], target_scale=[2.0]), Loss("quantile"), 3),
}


def samples(facts, rows, seed=0):
    random = np.random.default_rng(seed)
    x = random.integers(0, 5, (rows, 6)).astype(np.uint8)
    if facts.task == "classification":
        y = random.integers(0, len(facts.classes), rows).astype(np.int32)
    elif facts.task == "multilabel":
        y = random.integers(0, 2, (rows, 2)).astype(np.float32)
    else:
        y = random.normal(size=(rows, len(facts.target_names))).astype(np.float32)
    return x, y, random.uniform(0.5, 2, rows).astype(np.float32)


def evaluate(case, rows, comm, weighted=False, full=True, max_rows=16, params=None):
    facts, loss, outputs = CASES[case]
    facts = Facts(**{**vars(facts), "weighted": weighted, "load_shift": [2.0] * 6, "load_scale": [0.5] * 6})
    x, y, weight = samples(facts, rows)
    ops, spec = HostOps(), NetworkSpec((6, 8, outputs))
    flat = initialize(spec, 3, "auto", np.float32) if params is None else params
    network = Network(spec, ops, max_rows, flat)
    loader = Rows(x, y, weight if weighted else None, comm)
    result = evaluate_split(network, ops, loss, loader, comm, facts, top_k=2, full=full)
    return result, loader


def flatten(value, path=""):
    if isinstance(value, dict):
        return [leaf for key, v in value.items() for leaf in flatten(v, f"{path}.{key}")]
    if isinstance(value, list):
        return [leaf for k, v in enumerate(value) for leaf in flatten(v, f"{path}.{k}")]
    return [(path, value)]


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_any_number_of_ranks_gives_one_result(comm, case, weighted):
    for rows in (1, 2, 97):
        alone = flatten(evaluate(case, rows, MPI.COMM_SELF, weighted)[0])
        together = flatten(evaluate(case, rows, comm, weighted)[0])
        assert [path for path, _ in alone] == [path for path, _ in together]
        for (path, one), (_, many) in zip(alone, together, strict=True):
            if path.endswith("auc") and not weighted and not math.isnan(one):
                assert many == one, path  # integers: the same bits
            elif isinstance(one, float):
                np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-7, err_msg=f"{rows} {path}")
            else:
                assert many == one, path


@pytest.mark.mpi
def test_every_sample_is_visited_once(comm):
    visited = np.zeros(53, np.int64)
    _, loader = evaluate("classes", 53, comm, max_rows=5)
    np.add.at(visited, loader.visited, 1)
    comm.Allreduce(MPI.IN_PLACE, visited)
    assert (visited == 1).all()


@pytest.mark.mpi
def test_an_empty_split_is_said_to_be_empty(comm):
    result, _ = evaluate("classes", 0, comm)
    assert result["rows"] == 0 and "no samples" in result["note"] and len(result) == 2


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
def test_the_short_form_agrees_with_the_full_one(comm, case):
    whole, short = (evaluate(case, 60, comm, full=full)[0] for full in (True, False))
    assert len(short) < len(whole) and len(short) <= 4
    for key, value in short.items():
        assert value == pytest.approx(whole[key], rel=1e-12), key


@pytest.mark.mpi
def test_outputs_that_are_not_finite_are_reported_on_all_ranks(comm):
    for case in CASES:
        facts, _, outputs = CASES[case]
        params = np.full(NetworkSpec((6, 8, outputs)).layout().size, np.nan, np.float32)
        with np.errstate(invalid="ignore"):
            result, _ = evaluate(case, 20, comm, params=params)
        assert result["not_finite"] == 20 and math.isnan(result["loss"])
        assert facts.task == "regression" or math.isnan(result["auc"])


@pytest.mark.mpi
def test_an_error_in_one_ranks_data_is_raised_on_all(comm):
    class Damaged(Rows):
        def sequential(self, max_rows):
            yield from super().sequential(max_rows)
            if comm.rank == comm.size - 1:
                raise DataError("train-00000.h5: truncated.")

    facts, loss, _ = CASES["classes"]
    ops = HostOps()
    network = Network(NetworkSpec((6, 3)), ops, 8, initialize(NetworkSpec((6, 3)), 0, "auto", np.float32))
    with pytest.raises(DataError, match="truncated"):
        evaluate_split(network, ops, loss, Damaged(*samples(facts, 30), comm), comm, facts)


def whole_areas(scores, positive, weights, weighted):
    return [area(pair_counts(score_groups(scores[:, c], positive[:, c], weights if weighted else None),
                             not weighted)[None]) for c in range(scores.shape[1])]


@pytest.mark.mpi
@pytest.mark.parametrize("spread", ["even", "last only", "first empty", "sorted"])
@pytest.mark.parametrize("levels", [1, 3, 10_000])
def test_auc_is_the_same_however_samples_are_spread(comm, spread, levels):
    random = np.random.default_rng(levels)  # the same on all ranks
    n = 701
    scores = random.integers(-levels, levels, (n, 3)) / 16.0
    positive = random.integers(0, 3, (n, 3)) == 0
    weights = random.uniform(0, 2, n)
    if spread == "sorted":
        order = np.argsort(scores[:, 0], kind="stable")
        scores, positive, weights = scores[order], positive[order], weights[order]
    parts = comm.size - 1 if spread == "first empty" and comm.size > 1 else comm.size
    place = comm.rank - (comm.size - parts)
    cuts = [n * place // parts, n * (place + 1) // parts]
    if spread == "last only":
        cuts = [0, n if comm.rank == comm.size - 1 else 0]
    own = slice(max(cuts[0], 0), max(cuts[1], 0))
    exact = roc_areas(scores[own], positive[own], None, comm)
    assert exact == whole_areas(scores, positive, None, False)
    weighted = roc_areas(scores[own], positive[own], weights[own], comm, weighted=True)
    np.testing.assert_allclose(weighted, whole_areas(scores, positive, weights, True), rtol=1e-12)


@pytest.mark.mpi
def test_auc_without_one_of_the_classes_does_not_exist(comm):
    scores = np.arange(5.0)[:, None]
    for positive in (np.ones((5, 1), bool), np.zeros((5, 1), bool)):
        assert math.isnan(roc_areas(scores, positive, None, comm)[0])
    assert math.isnan(roc_areas(scores[:0], positive[:0], None, comm)[0])


@pytest.mark.mpi
def test_classes_beyond_one_exchange_give_the_same_areas(comm, monkeypatch):
    before = evaluate("classes", 80, comm)[0]
    monkeypatch.setattr("hpcmlp.run.roc.EXCHANGE_BYTES", 1)
    assert evaluate("classes", 80, comm)[0]["auc"] == before["auc"]


@pytest.mark.mpi
def test_scores_beyond_the_limit_leave_the_auc_out_and_say_so(comm, monkeypatch):
    monkeypatch.setattr("hpcmlp.run.roc.SCORE_LIMIT_BYTES", 8)
    result = evaluate("classes", 80, comm)[0]
    assert math.isnan(result["auc"]) and "left out" in result["auc_note"] and "auc" not in result["classes"]["a"]


def test_nothing_of_a_validation_stays_in_memory(monkeypatch):
    """The network in training is the one that is judged: it must not keep the samples' buffer until the next step."""
    from hpcmlp.run import evaluation
    from hpcmlp.run.judge import Judge
    facts, loss, _ = CASES["classes"]
    x, y, _ = samples(facts, 40)
    network = Network(NetworkSpec((6, 8, 3)), HostOps(), 16)
    buffers = []

    class Watched(evaluation.Inputs):
        def __init__(self, *given):
            super().__init__(*given)
            memory = self._x
            while isinstance(memory.base, np.ndarray):
                memory = memory.base
            buffers.append(weakref.ref(memory))

    monkeypatch.setattr(evaluation, "Inputs", Watched)
    parts = SimpleNamespace(network=network, ops=network.ops, loss=loss, comm=MPI.COMM_SELF, manifest=facts,
                            sharded=False, on_device=None)
    found = Judge(parts, "loss").evaluate(Rows(x, y, None, MPI.COMM_SELF), network.params)
    assert found["rows"] == 40 and len(buffers) == 1 and buffers[0]() is None
