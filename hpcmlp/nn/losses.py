"""The loss of a network as one object: its kind and options, what it wants of the data, and what its logits mean.

The arithmetic is `ops.loss`: sums over samples (never means), in the conventions of torch.nn.functional. Here are the
rules: which kind fits which task, how many logits it needs, how targets are shaped, how logits become predictions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcmlp.errors import ConfigError

DEFAULT_OF_TASK = {"classification": "softmax_cross_entropy", "multilabel": "binary_cross_entropy",
                   "regression": "mean_squared"}
KINDS_OF_TASK = {"classification": ("softmax_cross_entropy", "binary_cross_entropy"),
                 "multilabel": ("binary_cross_entropy",),
                 "regression": ("mean_squared", "mean_absolute", "huber", "quantile")}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax_cross_entropy": {"label_smoothing": 0.0, "class_weights": None},
    "binary_cross_entropy": {},
    "mean_squared": {},
    "mean_absolute": {},
    "huber": {"delta": 1.0},
    "quantile": {"quantiles": (0.1, 0.5, 0.9)},
}


def default_loss(task: str) -> str:
    """Return the kind of loss of a task: classification, multilabel or regression. Local."""
    return DEFAULT_OF_TASK[task]


def balanced_class_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Return one weight per class that gives all classes the same total weight.

    Local. samples / (classes * count), the convention of scikit-learn; a class without samples counts as one sample.
    """
    total = sum(counts)
    return tuple(total / (len(counts) * max(count, 1)) for count in counts)


class Loss:
    """A kind of loss with its options.

    Local. Raises ConfigError for an unknown kind or option, or a value out of range.

    Parameters
    ----------
    kind : a key of `OPTIONS`.
    options : softmax_cross_entropy: label_smoothing in [0, 1), class_weights (one number >= 0 per class) or None;
        huber: delta > 0; quantile: quantiles, ascending in (0, 1).
    """

    def __init__(self, kind: str, **options: Any) -> None:
        if kind not in OPTIONS:
            raise ConfigError(f"loss = {kind!r} is not known (legal: {', '.join(OPTIONS)}).")
        odd = sorted(set(options) - set(OPTIONS[kind]))
        if odd:
            raise ConfigError(f"loss {kind} has no option {', '.join(odd)} "
                              f"(it has: {', '.join(OPTIONS[kind]) or 'none'}).")
        self.kind = kind
        self.options = OPTIONS[kind] | options
        self._check()
        self._arguments = dict(self.options)
        self._class_weights: Any = None  # as an array where ops works, made at the first call
        self._column: Any = None  # integer targets as one float column, made at the first call

    def _check(self) -> None:
        o = self.options
        if not 0.0 <= o.get("label_smoothing", 0.0) < 1.0:
            raise ConfigError(f"label_smoothing = {o['label_smoothing']} is out of range; "
                              "it must be at least 0 and below 1.")
        if not o.get("delta", 1.0) > 0.0:
            raise ConfigError(f"huber_delta = {o['delta']} is out of range; it must be above 0.")
        if o.get("class_weights") is not None:
            o["class_weights"] = tuple(float(w) for w in o["class_weights"])
            if not all(0.0 <= w < float("inf") for w in o["class_weights"]) or sum(o["class_weights"]) <= 0.0:
                raise ConfigError("class_weights must be finite numbers of at least 0, one per class, not all 0.")
        if "quantiles" in o:
            q = o["quantiles"] = tuple(float(q) for q in o["quantiles"])
            if not q or list(q) != sorted(set(q)) or not all(0.0 < p < 1.0 for p in q):
                raise ConfigError(f"quantiles = {', '.join(map(str, q))} must be different numbers between 0 and 1, "
                                  "smallest first.")

    def num_outputs(self, task: str, outputs: int) -> int:
        """Return how many logits the network needs.

        Local. `outputs` is the data's: classes, labels or target columns. Binary cross entropy of two classes takes one
        logit, for class 1. Raises ConfigError when the loss does not fit the task.
        """
        legal = KINDS_OF_TASK[task]
        if self.kind not in legal:
            raise ConfigError(f"loss = {self.kind} does not fit {task}; use {' or '.join(legal)}.")
        if task == "classification" and self.kind == "binary_cross_entropy":
            if outputs != 2:
                raise ConfigError(f"loss = binary_cross_entropy takes two classes, and the data have {outputs}; "
                                  "use softmax_cross_entropy.")
            return 1
        class_weights = self.options.get("class_weights")
        if class_weights is not None and len(class_weights) != outputs:
            raise ConfigError(f"class_weights has {len(class_weights)} numbers and the data have {outputs} classes; "
                              "give one per class.")
        return outputs * len(self.options.get("quantiles", (0.5,)))

    def __call__(self, ops: Any, logits: Any, targets: Any, weights: Any, dlogits: Any) -> tuple[float, float]:
        """Return (sum of the weighted losses, sum of the weights) and write d(sum)/d(logits).

        Local. Sums, so that parts of a batch add up; the mean is loss sum / weight sum, which may both be 0.

        Parameters
        ----------
        logits, dlogits : (n, k) of one dtype; `dlogits` is overwritten.
        targets : (n,) int32 classes, else (n, columns) of the dtype of the logits.
        weights : (n,) of the dtype of the logits, or None for ones.
        """
        if targets.ndim == 1 and self.kind != "softmax_cross_entropy":
            targets = self._as_column(ops, targets, logits)
        if self.options.get("class_weights") is not None and (
                self._class_weights is None or self._class_weights.dtype != logits.dtype):
            self._class_weights = ops.empty((len(self.options["class_weights"]),), logits.dtype)
            ops.from_host(np.array(self.options["class_weights"], logits.dtype), self._class_weights)
            self._arguments["class_weights"] = self._class_weights
        return ops.loss(self.kind, logits, targets, weights, dlogits, **self._arguments)

    def _as_column(self, ops: Any, targets: Any, logits: Any) -> Any:
        """(n,) targets as (n, 1) of the dtype of the logits, in a buffer that is kept."""
        rows = targets.shape[0]
        if self._column is None or self._column.shape[0] < rows or self._column.dtype != logits.dtype:
            self._column = ops.empty((rows, 1), logits.dtype)
        column = self._column[:rows]
        column[:, 0] = targets
        return column

    def prediction(self, logits: np.ndarray, task: str) -> np.ndarray:
        """Return what host logits mean: probabilities, or values as they are.

        Local. A new array of the same dtype: (n, classes) probabilities for a classification (also from one logit),
        (n, labels) probabilities for multilabel, else the logits.
        """
        if self.kind == "softmax_cross_entropy":
            e = np.exp(logits - logits.max(axis=1, keepdims=True))
            return e / e.sum(axis=1, keepdims=True)
        if self.kind == "binary_cross_entropy":
            if task == "classification":
                return np.concatenate([_sigmoid(-logits), _sigmoid(logits)], axis=1)
            return _sigmoid(logits)
        return logits.copy()

    def metadata(self) -> dict[str, Any]:
        """Return kind and options as plain values, for a file; `from_metadata` is the way back. Local."""
        return {"kind": self.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}}

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "Loss":
        """Return the loss that `metadata` describes. Local."""
        return cls(**metadata)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) without overflow."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, z.dtype.type(1), e) / (1.0 + e)
