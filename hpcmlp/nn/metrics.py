"""Exact metrics as counts and sums that add over blocks of samples and over ranks.

An accumulator takes blocks of (logits, targets, weights) with `add`, sums itself over ranks with `total(all_reduce)`
and gives its figures with `result()`. Its counts stand in one flat float64 vector: they stay exact integers below 2^53,
so that one sum over ranks carries all of them, and unweighted counts do not depend on the number of ranks.
Spreads are merged by the update of Chan, Golub and LeVeque (1979), without cancellation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

AllReduce = Callable[[np.ndarray], None]

NAN = float("nan")  # a figure that does not exist
CONFUSION_LIMIT = 1024  # classes; above it the K x K table would outweigh the network


def _ratio(above: Any, below: Any) -> Any:
    """Divide, 0 where there is nothing to divide by (scikit-learn's zero_division=0)."""
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=np.asarray(below) != 0)


def _weights(weights: np.ndarray | None, n: int) -> np.ndarray:
    return np.ones(n) if weights is None else np.asarray(weights, np.float64)


class ClassMetrics:
    """Accuracy, top-k, log loss, precision, recall, F1 and confusion of a problem with K classes.

    Local, but for `total`. A tie between logits goes to the lowest class index, in the accuracy and in the top k alike:
    class c stands behind every class with a larger logit and every lower-numbered class with an equal one. A row whose
    logits are not finite is counted in `not_finite`, is wrong in both and has no part in the other figures.
    Precision, recall and F1 are weighted by sample; macro means go over the classes that occur among targets or
    predictions (scikit-learn's convention), 0 standing for 0 / 0. The confusion table counts rows, unweighted:
    `confusion[target][prediction]`.

    Parameters
    ----------
    num_classes : number K of logits
    top_k : k of the top-k accuracy; left out of the result when k >= K
    full : False keeps accuracy alone
    """

    main = "accuracy"

    def __init__(self, num_classes: int, top_k: int = 5, full: bool = True):
        self.num_classes = num_classes
        self.top_k = top_k if 1 < top_k < num_classes else None
        self.full = full
        self.has_table = full and num_classes <= CONFUSION_LIMIT
        table = num_classes**2 if self.has_table else 0
        self.state = np.zeros(6 + (4 * num_classes + table if full else 0))

    def add(self, logits: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Count a block of samples. Local.

        Parameters
        ----------
        logits : (n, K) float
        targets : (n,) integer, in 0..K-1
        weights : (n,) float or None
        """
        n = len(logits)
        if n == 0:
            return
        w, finite = _weights(weights, n), np.isfinite(logits).all(axis=1)
        predicted = logits.argmax(axis=1)
        hit = (predicted == targets) & finite
        self.state[:4] += n, w.sum(), np.dot(w, hit), n - np.count_nonzero(finite)
        if not self.full:
            return
        if self.top_k:
            self.state[4] += np.dot(w, self._in_top_k(logits, targets) & finite)
        if not finite.all():
            logits, targets, predicted, w = logits[finite], targets[finite], predicted[finite], w[finite]
        self._add_classes(np.asarray(logits, np.float64), targets, predicted, w)

    def _in_top_k(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        own = logits[np.arange(len(logits)), targets][:, None]
        lower = np.arange(self.num_classes) < targets[:, None]
        return ((logits > own) | ((logits == own) & lower)).sum(axis=1) < self.top_k

    def _add_classes(self, z: np.ndarray, targets: np.ndarray, predicted: np.ndarray, w: np.ndarray) -> None:
        n, k = z.shape
        if n == 0:
            return
        top = z.max(axis=1)
        nats = top + np.log(np.exp(z - top[:, None]).sum(axis=1)) - z[np.arange(n), targets]
        self.state[5] += np.dot(w, nats)
        support, guessed, hits, rows = self.state[6:6 + 4 * k].reshape(4, k)
        support += np.bincount(targets, w, k)
        guessed += np.bincount(predicted, w, k)
        hits += np.bincount(targets, w * (targets == predicted), k)
        rows += np.bincount(targets, minlength=k)
        if self.has_table:
            self.state[6 + 4 * k:] += np.bincount(targets.astype(np.int64) * k + predicted, minlength=k * k)

    def total(self, all_reduce: AllReduce) -> None:
        """Add up over ranks: ``all_reduce(array)`` sums in place. Collective over the ranks behind `all_reduce`."""
        all_reduce(self.state)

    def result(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the figures; `names` are the classes (default "0".."K-1"). Local."""
        rows, weight, hit, bad, top, nats = self.state[:6].tolist()
        figures: dict[str, Any] = {"rows": int(rows), "weight": weight, "accuracy": hit / weight if weight else NAN}
        if bad:
            figures["not_finite"] = int(bad)
        if not self.full or not weight:
            return figures
        k = self.num_classes
        if self.top_k:
            figures[f"top{self.top_k}_accuracy"] = top / weight
        figures["log_loss"] = nats / weight if not bad else NAN
        support, guessed, hits, counts = self.state[6:6 + 4 * k].reshape(4, k)
        figures.update(_precision_recall(hits, guessed, support, (support != 0) | (guessed != 0), figures_for="classes",
                                         rows=counts, names=names))
        if self.has_table:
            figures["confusion"] = self.state[6 + 4 * k:].astype(np.int64).reshape(k, k).tolist()
        return figures


def _precision_recall(hits: np.ndarray, guessed: np.ndarray, support: np.ndarray, present: np.ndarray, *,
                      figures_for: str, rows: np.ndarray, names: Sequence[str] | None) -> dict[str, Any]:
    """Return macro and weighted means and, under `figures_for`, the figures of each class or label."""
    each = {"precision": _ratio(hits, guessed), "recall": _ratio(hits, support),
            "f1": _ratio(2 * hits, guessed + support)}
    figures: dict[str, Any] = {}
    for name, values in each.items():
        figures[f"{name}_macro"] = float(values[present].mean()) if present.any() else 0.0
        figures[f"{name}_weighted"] = float(_ratio(np.dot(values, support), support.sum()))
    names = names or [str(c) for c in range(len(hits))]
    figures[figures_for] = {str(name): {**{key: float(v[c]) for key, v in each.items()}, "rows": int(rows[c])}
                            for c, name in enumerate(names)}
    return figures


class LabelMetrics:
    """Subset and label accuracy, log loss, micro and macro F1 of a problem with L independent labels.

    Local, but for `total`. A label is predicted where its logit is above 0 (probability above 1/2). `log_loss` is the
    mean over labels, then over samples. A row with a logit that is not finite is counted in `not_finite`, has every
    label wrong and no part in `log_loss`.

    Parameters
    ----------
    num_labels : number L of logits
    full : False keeps the accuracies alone
    """

    main = "label_accuracy"

    def __init__(self, num_labels: int, full: bool = True):
        self.num_labels, self.full = num_labels, full
        self.state = np.zeros(6 + (4 * num_labels if full else 0))

    def add(self, logits: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Count a block of samples. Local.

        Parameters
        ----------
        logits : (n, L) float
        targets : (n, L), 0 or 1
        weights : (n,) float or None
        """
        n = len(logits)
        if n == 0:
            return
        w, finite = _weights(weights, n), np.isfinite(logits).all(axis=1)
        truth = targets > 0.5
        guess = np.where(finite[:, None], logits > 0, ~truth)
        right = guess == truth
        self.state[:5] += (n, w.sum(), np.dot(w, right.all(axis=1)), n - np.count_nonzero(finite),
                           np.dot(w, right.sum(axis=1)))
        if not self.full:
            return
        z = np.where(finite[:, None], logits, 0.0).astype(np.float64)
        nats = np.maximum(z, 0.0) - z * truth + np.log1p(np.exp(-np.abs(z)))
        self.state[5] += np.dot(w * finite, nats.mean(axis=1))
        hits, guessed, support, rows = self.state[6:].reshape(4, -1)
        hits += w @ (guess & truth)
        guessed += w @ guess
        support += w @ truth
        rows += truth.sum(axis=0)

    def total(self, all_reduce: AllReduce) -> None:
        """Add up over ranks: ``all_reduce(array)`` sums in place. Collective over the ranks behind `all_reduce`."""
        all_reduce(self.state)

    def result(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the figures; `names` are the labels (default "0".."L-1"). Local."""
        rows, weight, subset, bad, right, nats = self.state[:6].tolist()
        figures: dict[str, Any] = {"rows": int(rows), "weight": weight,
                                   "label_accuracy": right / weight / self.num_labels if weight else NAN,
                                   "subset_accuracy": subset / weight if weight else NAN}
        if bad:
            figures["not_finite"] = int(bad)
        if not self.full or not weight:
            return figures
        figures["log_loss"] = nats / weight if not bad else NAN
        hits, guessed, support, counts = self.state[6:].reshape(4, -1)
        figures["f1_micro"] = float(_ratio(2 * hits.sum(), (guessed + support).sum()))
        figures.update(_precision_recall(hits, guessed, support, np.ones(len(hits), bool), figures_for="labels",
                                         rows=counts, names=names))
        return figures


class OutputMetrics:
    """RMSE, MAE and R2 of k regressed outputs, in standardised units and, where the scale is known, physical ones.

    Local, but for `total`. R2 = 1 - squared error / spread of the targets about their weighted mean; 1 or 0 where the
    targets do not vary (scikit-learn's convention), NaN below two rows. The overall `rmse` is the root of the mean
    over rows and outputs, `r2` the plain mean over outputs. A row with an output that is not finite is counted in
    `not_finite` and left out.

    Parameters
    ----------
    num_outputs : k
    full : False keeps the RMSE alone
    """

    main = "rmse"

    def __init__(self, num_outputs: int, full: bool = True):
        self.num_outputs, self.full = num_outputs, full
        self.head = np.zeros(4)  # rows, weight, rows not finite, weight of the rows that count
        self.squared, self.absolute, self.mean, self.spread = np.zeros((4, num_outputs))

    def add(self, outputs: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Count a block of samples. Local.

        Parameters
        ----------
        outputs, targets : (n, k) float, standardised units
        weights : (n,) float or None
        """
        n = len(outputs)
        if n == 0:
            return
        w, finite = _weights(weights, n), np.isfinite(outputs).all(axis=1)
        self.head[:3] += n, w.sum(), n - np.count_nonzero(finite)
        if not finite.all():
            outputs, targets, w = outputs[finite], targets[finite], w[finite]
        y = np.asarray(targets, np.float64)  # (n, k)
        error = np.asarray(outputs, np.float64) - y
        self.squared += w @ np.square(error)
        if self.full:
            self.absolute += w @ np.abs(error)
            self._merge_spread(y, w)
        self.head[3] += w.sum()

    def _merge_spread(self, y: np.ndarray, w: np.ndarray) -> None:
        """Join a block's weight, mean and spread to those so far (Chan et al.)."""
        block, before = w.sum(), self.head[3]
        if block == 0 or before + block == 0:
            return
        # the mean about the first row, so that nothing large is summed
        mean = y[0] + (w @ (y - y[0])) / block
        self.spread += w @ np.square(y - mean)
        apart = mean - self.mean
        self.spread += np.square(apart) * (before * block / (before + block))
        self.mean += apart * (block / (before + block))

    def total(self, all_reduce: AllReduce) -> None:
        """Add up over ranks in two sums: the common mean must be known before the spreads about it can be added.

        Collective over the ranks behind `all_reduce`, which sums a float64 array in place.
        """
        weight = self.head[3]
        first = np.concatenate([self.head, self.squared, self.absolute, self.mean * weight])
        all_reduce(first)
        k, mean = self.num_outputs, self.mean.copy()
        self.head[:] = first[:4]
        self.squared[:], self.absolute[:], weighted_mean = first[4:].reshape(3, k)
        if not self.full:
            return
        self.mean[:] = _ratio(weighted_mean, self.head[3])
        self.spread += weight * np.square(mean - self.mean)
        all_reduce(self.spread)

    def result(self, names: Sequence[str] | None = None, scale: Sequence[float] | None = None) -> dict[str, Any]:
        """Return the figures; `names` of the outputs, `scale` (k,) from standardised to physical units. Local."""
        rows, weight, bad, used = self.head.tolist()
        figures: dict[str, Any] = {"rows": int(rows), "weight": weight}
        if bad:
            figures["not_finite"] = int(bad)
        if not used:
            return {**figures, "rmse": NAN}
        mean_square = self.squared / used
        figures["rmse"] = float(np.sqrt(mean_square.mean()))
        if not self.full:
            return figures
        each = {"rmse": np.sqrt(mean_square), "mae": self.absolute / used}
        if scale is not None:
            each |= {f"{key}_physical": values * np.abs(scale) for key, values in each.items()}
        flat = self.spread <= 0
        r2 = np.where(flat, self.squared == 0, 1.0 - self.squared / np.where(flat, 1.0, self.spread))
        figures["mae"] = float(each["mae"].mean())
        figures["r2"] = float(r2.mean()) if rows - bad >= 2 else NAN
        names = names or [str(j) for j in range(self.num_outputs)]
        figures["outputs"] = {str(name): {**{key: float(v[j]) for key, v in each.items()},
                                          "r2": float(r2[j]) if rows - bad >= 2 else NAN}
                              for j, name in enumerate(names)}
        return figures


class QuantileMetrics:
    """Pinball loss and coverage of predicted quantiles, and the errors of the one closest to the median.

    Local, but for `total`. `coverage` of the quantile q is the weighted share of targets at or below it (ideal: q);
    `interval_coverage` the share between the outermost two.

    Parameters
    ----------
    num_outputs : k
    quantiles : the Q levels, each in (0, 1)
    full : False keeps the RMSE of the middle quantile alone
    """

    main = "rmse"

    def __init__(self, num_outputs: int, quantiles: Sequence[float], full: bool = True):
        self.levels = np.array(quantiles, np.float64)
        self.middle = int(np.abs(self.levels - 0.5).argmin())
        self.errors = OutputMetrics(num_outputs, full)
        self.num_outputs, self.full = num_outputs, full
        q = len(self.levels)
        self.state = np.zeros(num_outputs * (2 * q + 1) if full else 0)

    def add(self, outputs: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Count a block of samples. Local.

        Parameters
        ----------
        outputs : (n, k * Q) float, the Q quantiles of an output side by side
        targets : (n, k) float
        weights : (n,) float or None
        """
        n, k, q = len(outputs), self.num_outputs, len(self.levels)
        outputs = outputs.reshape(n, k, q)
        finite = np.isfinite(outputs).all(axis=(1, 2))
        middle = np.where(finite[:, None], outputs[:, :, self.middle], np.nan)
        self.errors.add(middle, targets, weights)
        if not self.full or n == 0:
            return
        w = _weights(weights, n)[finite]
        guess = np.asarray(outputs[finite], np.float64)
        y = np.asarray(targets[finite], np.float64)[:, :, None]
        short = y - guess  # (n, k, Q)
        pinball, below = self.state[:2 * k * q].reshape(2, k, q)
        pinball += np.tensordot(w, np.maximum(self.levels * short, (self.levels - 1.0) * short), 1)
        below += np.tensordot(w, short <= 0, 1)
        low, high = int(self.levels.argmin()), int(self.levels.argmax())
        self.state[2 * k * q:] += w @ ((short[:, :, low] >= 0) & (short[:, :, high] <= 0))

    def total(self, all_reduce: AllReduce) -> None:
        """Add up over ranks: ``all_reduce(array)`` sums in place. Collective over the ranks behind `all_reduce`."""
        self.errors.total(all_reduce)
        if self.full:
            all_reduce(self.state)

    def result(self, names: Sequence[str] | None = None, scale: Sequence[float] | None = None) -> dict[str, Any]:
        """Return the figures; arguments as for `OutputMetrics.result`. Local."""
        figures = self.errors.result(names, scale)
        used = float(self.errors.head[3])
        if not self.full or not used:
            return figures
        k, q = self.num_outputs, len(self.levels)
        pinball, below = self.state[:2 * k * q].reshape(2, k, q) / used
        inside = self.state[2 * k * q:] / used
        figures["pinball"] = float(pinball.mean())
        for j, entry in enumerate(figures["outputs"].values()):
            entry["quantiles"] = {str(level): {"pinball": float(pinball[j, i]), "coverage": float(below[j, i])}
                                  for i, level in enumerate(self.levels.tolist())}
            if q > 1:
                entry["interval_coverage"] = float(inside[j])
        return figures
