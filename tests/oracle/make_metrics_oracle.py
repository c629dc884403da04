"""Make metrics.npz: scikit-learn's values of every metric on small samples, for tests/nn/test_metrics.py.

Run with a Python that has scikit-learn: python tests/oracle/make_metrics_oracle.py
"""

from pathlib import Path

import numpy as np

PLACE = Path(__file__).with_name("metrics.npz")
NAMES = ("precision", "recall", "f1", "rows")


def make_inputs() -> dict[str, np.ndarray]:
    """Return the samples: odd lengths, weights, ties in the binary scores, targets far from 0."""
    random = np.random.default_rng(2)
    inputs = {"classes.targets": random.integers(0, 5, 97).astype(np.int32)}
    inputs["classes.logits"] = random.normal(size=(97, 5)).astype(np.float32)
    inputs["classes.logits"][np.arange(97), inputs["classes.targets"]] += 1.0
    inputs["classes.weights"] = random.uniform(0.1, 3.0, 97).astype(np.float32)
    binary = np.zeros((101, 2), np.float32)
    inputs["binary.targets"] = random.integers(0, 2, 101).astype(np.int32)
    binary[:, 1] = np.round(2 * (random.normal(size=101) + inputs["binary.targets"])) / 2
    inputs["binary.logits"] = binary
    inputs["binary.weights"] = random.uniform(0.1, 3.0, 101).astype(np.float32)
    inputs["labels.targets"] = random.integers(0, 2, (53, 4)).astype(np.float32)
    inputs["labels.logits"] = (random.normal(size=(53, 4)) + inputs["labels.targets"] - 0.4).astype(np.float32)
    inputs["labels.weights"] = random.uniform(0.1, 3.0, 53).astype(np.float32)
    inputs["outputs.targets"] = (random.normal(size=(67, 3)) * [1.0, 5.0, 30.0] + [0.0, 2.0, 5e6]).astype(np.float32)
    inputs["outputs.logits"] = (inputs["outputs.targets"] + random.normal(size=(67, 3))).astype(np.float32)
    inputs["outputs.weights"] = random.uniform(0.1, 3.0, 67).astype(np.float32)
    inputs["quantiles.targets"] = random.normal(size=(71, 2)).astype(np.float32)
    middle = inputs["quantiles.targets"] + 0.3 * random.normal(size=(71, 2)).astype(np.float32)
    inputs["quantiles.logits"] = (middle[:, :, None] + np.array([-0.4, 0.0, 0.4], np.float32)).reshape(71, 6)
    inputs["quantiles.weights"] = random.uniform(0.1, 3.0, 71).astype(np.float32)
    return inputs


def figures(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return scikit-learn's figures by name, with and without weights (`.w`)."""
    found = {}
    for tail in ("", ".w"):
        for make in (_classes, _binary, _labels, _outputs, _quantiles):
            group = make.__name__[1:]
            targets, logits = inputs[f"{group}.targets"], inputs[f"{group}.logits"].astype(np.float64)
            weights = inputs[f"{group}.weights"].astype(np.float64) if tail else None
            found |= {f"{group}.{name}{tail}": np.asarray(value, np.float64)
                      for name, value in make(targets, logits, weights).items()}
    return found


def _prf(targets, predicted, weights, each):
    from sklearn.metrics import precision_recall_fscore_support as prf

    found = {}
    for average in ("macro", "weighted", None):
        values = prf(targets, predicted, average=average, sample_weight=weights, zero_division=0)
        for name, value in zip(NAMES[:3], values[:3], strict=True):
            found[f"{name}_{average}" if average else f"{each}.{name}"] = value
    return found


def _classes(targets, logits, weights):
    from scipy.special import softmax
    from sklearn import metrics

    p = softmax(logits, axis=1)
    predicted = logits.argmax(axis=1)
    return {"accuracy": metrics.accuracy_score(targets, predicted, sample_weight=weights),
            "top3_accuracy": metrics.top_k_accuracy_score(targets, logits, k=3, sample_weight=weights),
            "log_loss": metrics.log_loss(targets, p, sample_weight=weights),
            "confusion": metrics.confusion_matrix(targets, predicted),
            "auc": metrics.roc_auc_score(targets, p, multi_class="ovr", average="macro", sample_weight=weights),
            "classes.auc": [metrics.roc_auc_score(targets == c, p[:, c], sample_weight=weights) for c in range(5)],
            **_prf(targets, predicted, weights, "classes")}


def _binary(targets, logits, weights):
    from sklearn import metrics

    return {"accuracy": metrics.accuracy_score(targets, logits[:, 1] > 0, sample_weight=weights),
            "auc": metrics.roc_auc_score(targets, logits[:, 1], sample_weight=weights)}


def _labels(targets, logits, weights):
    from scipy.special import expit
    from sklearn import metrics

    p, predicted = expit(logits), logits > 0
    truth = targets.astype(bool)
    return {"subset_accuracy": metrics.accuracy_score(truth, predicted, sample_weight=weights),
            "label_accuracy": 1 - metrics.hamming_loss(truth, predicted, sample_weight=weights),
            "log_loss": np.mean([metrics.log_loss(targets[:, j], p[:, j], sample_weight=weights) for j in range(4)]),
            "f1_micro": metrics.f1_score(truth, predicted, average="micro", sample_weight=weights),
            "auc": metrics.roc_auc_score(truth, p, average="macro", sample_weight=weights),
            "labels.auc": metrics.roc_auc_score(truth, p, average=None, sample_weight=weights),
            **_prf(truth, predicted, weights, "labels")}


def _outputs(targets, logits, weights):
    from sklearn import metrics

    y = targets.astype(np.float64)
    squared = metrics.mean_squared_error(y, logits, sample_weight=weights, multioutput="raw_values")
    absolute = metrics.mean_absolute_error(y, logits, sample_weight=weights, multioutput="raw_values")
    r2 = metrics.r2_score(y, logits, sample_weight=weights, multioutput="raw_values")
    return {"rmse": np.sqrt(np.mean(squared)), "outputs.rmse": np.sqrt(squared), "mae": np.mean(absolute),
            "outputs.mae": absolute, "r2": np.mean(r2), "outputs.r2": r2}


def _quantiles(targets, logits, weights):
    from sklearn.metrics import mean_pinball_loss

    y, guess = targets.astype(np.float64), logits.reshape(-1, 2, 3)
    pinball = [[mean_pinball_loss(y[:, j], guess[:, j, i], alpha=q, sample_weight=weights)
                for i, q in enumerate((0.1, 0.5, 0.9))] for j in range(2)]
    return {"pinball": pinball}


if __name__ == "__main__":
    samples = make_inputs()
    np.savez_compressed(PLACE, **samples, **{f"expected.{name}": value for name, value in figures(samples).items()})
    print(f"{PLACE}: {PLACE.stat().st_size} bytes")
