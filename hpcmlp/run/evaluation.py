"""Exact metrics of a network over every sample of a split once, at any number of ranks.

Each rank takes its contiguous rows through the network in blocks; counts and sums are added over ranks (`nn.metrics`),
and so are the pair counts of the area under the ROC curve (`run.roc`).
"""

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.messages import broadcast, broadcast_bytes, sum_in_place
from hpcmlp.errors import ConfigError
from hpcmlp.nn.metrics import NAN, ClassMetrics, LabelMetrics, OutputMetrics, QuantileMetrics
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.ops import open_planned
from hpcmlp.run.checkpoint import Model, load_model


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


def open_network(model: Model, flat: np.ndarray, ops: Any, max_rows: int) -> Any:
    """Return a network that predicts with the host parameters `flat`, which it may keep.

    Local: on a GPU a `nn.planned_forward.Predictor` where there can be one. Raises Unavailable where the device lacks
    something.
    """
    if ops.plans and not (model.spec.layer_norm or model.spec.residual):
        from hpcmlp.nn.planned_forward import Predictor
        predictor = Predictor(model.spec, open_planned(ops), max_rows)
        predictor.set_params(predictor.layout.pack(model.params))
        return predictor
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
    scores = None
    if full:
        from hpcmlp.run.roc import Scores, add_areas  # validation during training does without
        scores = Scores(manifest, loader.num_rows, comm.size)
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
        add_areas(result, scores, names, comm)
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
        losses += loss(ops, logits, ops.bring(batch.targets), ops.bring(batch.weights), dlogits[:batch.rows])
        if manifest.task == "classification" and host.shape[1] == 1:
            host = np.concatenate([np.zeros_like(host), host], axis=1)  # one logit stands for class 1 against 0
        metrics.add(host, batch.targets, batch.weights)
        if scores is not None:
            scores.add(host, batch.targets, batch.weights)
