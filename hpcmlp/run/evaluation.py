"""Exact metrics of a network over every sample of a split once, at any number of ranks.

Each rank takes its contiguous rows through the network in blocks; counts and sums are added over ranks (`nn.metrics`).
The area under the ROC curve is exact too, and no rank ever holds all scores: each rank sorts its own scores into groups
of equal value, a sample of everybody's scores gives size - 1 splitters, one Alltoallv brings rank r the r-th range of
scores, and the pair counts of the ranges join exactly (`nn.auc`). Per score: O(log n) to sort and 24 bytes once over
the wire. Unweighted counts are integers, so the area has the same bits at any number of ranks.
"""

import json
import math
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.messages import broadcast, broadcast_bytes, sum_in_place
from hpcmlp.errors import ConfigError
from hpcmlp.nn.auc import area, log_odds, merge_groups, pair_counts, score_groups
from hpcmlp.nn.metrics import NAN, ClassMetrics, LabelMetrics, OutputMetrics, QuantileMetrics
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.run.checkpoint import Model, load_model

SAMPLES_PER_RANK = 64  # scores per class that a rank shows to find the splitters
SCORE_LIMIT_BYTES = 1 << 30  # of one rank's scores; above it the AUC is left out and the result says so
EXCHANGE_BYTES = 1 << 26  # of one rank's groups sent at once


def open_model(run: str, which: str, comm: Any) -> tuple[Model, np.ndarray]:
    """Return the model of a run and its flat parameter vector: rank 0 reads, all ranks get the same state.

    Collective over `comm`. Raises what `run.checkpoint.load_model` raises, on all ranks.
    """
    text = flat = None
    with agreed(comm):
        if comm.rank == 0:
            model = load_model(run, which)
            flat = model.spec.layout().pack(model.params)
            text = json.dumps({**asdict(model), "params": {}}, allow_nan=False).encode()
    values = json.loads(broadcast_bytes(comm, text))
    values["spec"] = NetworkSpec(**{**values["spec"], "sizes": tuple(values["spec"]["sizes"])})
    layout = values["spec"].layout()
    if comm.rank != 0:
        flat = np.empty(layout.size, np.float32)
    broadcast(comm, flat)
    return Model(**{**values, "params": layout.views(flat)}), flat


def open_network(model: Model, flat: np.ndarray, ops: Any, max_rows: int) -> Network:
    """Return a network that predicts with the host parameters `flat`, which it may keep. Local."""
    params = ops.zeros(flat.shape, np.float32)
    ops.from_host(flat, params)
    return Network(model.spec, ops, max_rows, params)


def check_fits(model: Model, manifest: Any, directory: str, run: str) -> None:
    """Raise ConfigError naming the difference when the model of `run` was not trained on data prepared like these.

    Local. Two data sets fit each other when everything that turns raw rows into inputs and outputs is the same.
    """
    named = {"task": "task", "num_features": "number of features", "classes": "list of classes",
             "target_names": "list of targets", "feature_names": "list of features", "x_dtype": "type of x",
             "load_shift": "shift of x", "load_scale": "scale of x", "target_shift": "shift of the targets",
             "target_scale": "scale of the targets"}
    for key, what in named.items():
        ours, theirs = getattr(model, key), getattr(manifest, key)
        if ours != theirs:
            raise ConfigError(f"the model of {run} does not fit the data of {directory}: another {what} "
                              f"({_short(ours)} in the model, {_short(theirs)} in the data); give the data set it was "
                              "trained on, or one prepared in the same way.")
    if model.preprocessing_digest != manifest.preprocessing_digest():
        raise ConfigError(f"the model of {run} does not fit the data of {directory}: another preprocessing of the raw "
                          "columns (levels, fill values or statistics); give the data set it was trained on.")


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)}: {', '.join(map(str, value[:4]))}{', ...' if len(value) > 4 else ''}"
    return str(value)


class Inputs:
    """The way of raw samples into a network: gathered, shifted and scaled into one kept buffer.

    Local. `shift`, `scale` : (d,) lists of the manifest or the model, or None.
    """

    def __init__(self, network: Any, ops: Any, shift: Any, scale: Any):
        self.network, self.ops = network, ops
        self._x = ops.empty((network.max_rows, network.spec.sizes[0]), network.dtype)
        self._logits = np.empty((network.max_rows, network.spec.sizes[-1]), network.dtype)
        self._shift, self._scale = (self._vector(v) for v in (shift, scale))

    def _vector(self, values: Any) -> Any:
        if values is None:
            return None
        host = np.asarray(values, self.network.dtype)
        vector = self.ops.empty(host.shape, host.dtype)
        self.ops.from_host(host, vector)
        return vector

    def forward(self, source: np.ndarray, index: np.ndarray) -> tuple[Any, np.ndarray]:
        """Return the logits of ``source[index]`` where `ops` works, and on the host.

        Local. Both (n, k), valid until the next call.
        """
        x = self._x[:len(index)]
        self.ops.gather(source, index, x, self._shift, self._scale)
        logits = self.network.forward(x)
        host = self._logits[:len(index)]
        self.ops.to_host(logits, host)
        return logits, host


def evaluate_split(network: Any, ops: Any, loss: Any, loader: Any, comm: Any, manifest: Any, *, top_k: int = 5,
                   full: bool = True) -> dict[str, Any]:
    """Return the metrics of `network` over every sample of the loader's split, each exactly once.

    Collective over `comm`; the same result on all ranks. Ranks without rows take part. `loss` is the mean of the
    training loss over the sample weights.

    Parameters
    ----------
    network : `nn.Network`; blocks of up to ``network.max_rows`` samples go through it.
    loss : `nn.losses.Loss`.
    loader : `data.loader.Loader` of the split.
    manifest : `data.manifest.Manifest` of the data set: task, names, scales.
    top_k : k of the top-k accuracy.
    full : False computes loss and main metric alone (accuracy, label_accuracy or rmse), for use during training.

    Returns
    -------
    Plain values; NaN where a figure does not exist, `not_finite` when outputs are not finite numbers. For a
    split without samples only `rows` (0) and a `note`.
    """
    if loader.num_rows == 0:
        return {"rows": 0, "note": f"data set {manifest.name} has no samples in this split"}
    metrics = _metrics_for(loss, manifest, top_k, full)
    scores = _Scores(manifest, loader.num_rows, comm.size) if full else None
    losses = np.zeros(2)  # sum, weight
    with agreed(comm):
        _visit(network, ops, loss, loader, manifest, metrics, scores, losses)
    all_reduce = partial(sum_in_place, comm)
    all_reduce(losses)
    metrics.total(all_reduce)
    facts = {"scale": manifest.target_scale} if manifest.task == "regression" else {}
    names = manifest.classes if manifest.task == "classification" else manifest.target_names
    figures = metrics.result(names, **facts)
    result = {"rows": figures.pop("rows"), "loss": float(losses[0] / losses[1]) if losses[1] else NAN, **figures}
    if not manifest.weighted:
        del result["weight"]
    if full and manifest.task != "regression":
        _add_areas(result, scores, names, comm)
    return result


def _metrics_for(loss: Any, manifest: Any, top_k: int, full: bool) -> Any:
    if manifest.task == "classification":
        return ClassMetrics(len(manifest.classes), top_k, full)
    outputs = len(manifest.target_names)
    if manifest.task == "multilabel":
        return LabelMetrics(outputs, full)
    if loss.kind == "quantile":
        return QuantileMetrics(outputs, loss.options["quantiles"], full)
    return OutputMetrics(outputs, full)


def _visit(network: Any, ops: Any, loss: Any, loader: Any, manifest: Any, metrics: Any, scores: Any,
           losses: np.ndarray) -> None:
    """Take this rank's rows through the network. Local."""
    inputs = Inputs(network, ops, manifest.load_shift, manifest.load_scale)
    dlogits = ops.empty((network.max_rows, network.spec.sizes[-1]), network.dtype)
    for batch in loader.sequential(network.max_rows):
        logits, host = inputs.forward(batch.source, batch.index)
        losses += loss(ops, logits, batch.targets, batch.weights, dlogits[:batch.rows])
        if manifest.task == "classification" and host.shape[1] == 1:
            host = np.concatenate([np.zeros_like(host), host], axis=1)  # one logit stands for class 1 against 0
        metrics.add(host, batch.targets, batch.weights)
        if scores is not None:
            scores.add(host, batch.targets, batch.weights)


class _Scores:
    """The scores, targets and weights of this rank's samples, kept for the AUC while they fit."""

    def __init__(self, manifest: Any, rows: int, size: int):
        self.task, self.weighted = manifest.task, manifest.weighted
        if self.task == "classification":
            self.columns = len(manifest.classes) if len(manifest.classes) > 2 else 1
        else:
            self.columns = len(manifest.target_names)
        self.rows_per_rank = -(-rows // size)  # the same on all ranks, and so are the decisions made by it
        self.needed_bytes = 8 * self.rows_per_rank * self.columns
        self.fits = self.needed_bytes <= SCORE_LIMIT_BYTES
        self._blocks: tuple[list, list, list] = ([], [], [])

    def add(self, logits: np.ndarray, targets: np.ndarray, weights: np.ndarray | None) -> None:
        if not self.fits or self.task == "regression":
            return
        logits = np.nan_to_num(logits.astype(np.float64))  # where that changes anything, no area will be computed
        scores = log_odds(logits) if self.task == "classification" else logits
        for blocks, values in zip(self._blocks, (scores, targets, weights), strict=True):
            blocks.append(None if values is None else values.copy())

    def areas(self, comm: Any) -> list[float]:
        """Return the area under the ROC curve of each column. Collective over `comm`."""
        scores, targets, weights = self._joined()
        at_once = max(1, EXCHANGE_BYTES // (24 * max(1, self.rows_per_rank)))
        areas: list[float] = []
        for first in range(0, self.columns, at_once):
            groups = []
            for c in range(first, min(first + at_once, self.columns)):
                if self.task == "multilabel":
                    positive = targets[:, c] > 0.5
                else:
                    positive = targets == (c if self.columns > 1 else 1)
                groups.append(score_groups(scores[:, c], positive, weights))
            areas += _areas_of(groups, not self.weighted, comm)
        return areas

    def _joined(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        scores, targets, weights = self._blocks
        if not scores:  # a rank without rows
            shape = (0, self.columns) if self.task == "multilabel" else (0,)
            return np.zeros((0, self.columns)), np.zeros(shape, np.int32), None
        return (np.concatenate(scores), np.concatenate(targets),
                np.concatenate(weights) if self.weighted else None)


def _add_areas(result: dict[str, Any], scores: _Scores, names: list[str], comm: Any) -> None:
    """Put `auc` into the result, and the area of each class or label beside its other figures."""
    result["auc"] = NAN
    if "not_finite" in result:
        return
    if not scores.fits:
        result["auc_note"] = (f"left out: the scores of a rank take {scores.needed_bytes >> 20} MiB; use more ranks "
                              f"for less than {SCORE_LIMIT_BYTES >> 20} MiB")
        return
    areas = scores.areas(comm)
    known = [a for a in areas if not math.isnan(a)]
    result["auc"] = sum(known) / len(known) if known else NAN
    table = result["classes" if scores.task == "classification" else "labels"]
    if len(areas) == len(names):
        for name, value in zip(names, areas, strict=True):
            table[str(name)]["auc"] = value


def roc_areas(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None, comm: Any, *,
              weighted: bool = False) -> list[float]:
    """Return the exact area under the ROC curve of each column, ties counting half, over the samples of all ranks.

    Collective over `comm`; every rank passes its own samples, perhaps none, and gets the same result. Unweighted, the
    result has the same bits however the samples are spread over ranks. NaN for a column without both classes.

    Parameters
    ----------
    scores : (n, columns) finite float
    positive : (n, columns) bool
    weights : (n,) float, or None
    weighted : weights count, on all ranks
    """
    groups = [score_groups(scores[:, c], positive[:, c], weights if weighted else None)
              for c in range(scores.shape[1])]
    return _areas_of(groups, not weighted, comm)


def _areas_of(groups: list[np.ndarray], whole: bool, comm: Any) -> list[float]:
    if comm.size > 1:
        groups = _exchange(groups, comm)
    counts = np.zeros((comm.size, len(groups), 4), np.int64 if whole else np.float64)
    for c, own in enumerate(groups):
        counts[comm.rank, c] = pair_counts(own, whole)
    sum_in_place(comm, counts)
    return [area(counts[:, c]) for c in range(len(groups))]


def _exchange(groups: list[np.ndarray], comm: Any) -> list[np.ndarray]:
    """Give rank r, for each column, the groups of all ranks in the r-th range of scores, merged. Collective."""
    size, columns = comm.size, len(groups)
    splitters = _splitters(groups, comm)
    cuts = [np.concatenate([[0], np.searchsorted(own[:, 0], at), [len(own)]])
            for own, at in zip(groups, splitters, strict=True)]
    counts = np.ascontiguousarray(np.diff(cuts, axis=1).T, np.int64)  # (size, columns): groups for each rank
    arriving = np.empty_like(counts)
    comm.Alltoall(counts, arriving)
    leave = np.concatenate([groups[c][cuts[c][r]:cuts[c][r + 1]] for r in range(size) for c in range(columns)])
    come = np.empty((int(arriving.sum()), 3))
    comm.Alltoallv([leave, 3 * counts.sum(axis=1)], [come, 3 * arriving.sum(axis=1)])
    ends = np.cumsum(arriving.reshape(-1)).reshape(size, columns)
    starts = ends - arriving
    return [merge_groups(np.concatenate([come[starts[r, c]:ends[r, c]] for r in range(size)]))
            for c in range(columns)]


def _splitters(groups: list[np.ndarray], comm: Any) -> list[np.ndarray]:
    """Return for each column at most size - 1 ascending scores, the same on all ranks. Collective.

    Equal scores lie on one side of a splitter, so a group never spans two ranges.
    """
    shown = np.zeros((comm.size, len(groups), SAMPLES_PER_RANK))
    for c, own in enumerate(groups):
        at = (np.arange(SAMPLES_PER_RANK) * len(own) + len(own) // 2) // SAMPLES_PER_RANK
        shown[comm.rank, c] = own[at, 0] if len(own) else np.nan
    sum_in_place(comm, shown)
    splitters = []
    for c in range(len(groups)):
        pool = np.sort(shown[:, c][~np.isnan(shown[:, c])])
        at = np.arange(1, comm.size) * len(pool) // comm.size
        splitters.append(pool[at] if len(pool) else np.zeros(comm.size - 1))
    return splitters
