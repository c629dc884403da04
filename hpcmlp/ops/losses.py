"""The loss functions and their gradients, row by row, as formulas over any array module.

Each takes (xp, logits, targets, **options) and returns (row losses (n,), gradient (n, k), row weights (n,) or None).
The gradient is that of the sum of the row losses. Row weights are what a row counts in the mean beside its sample
weight (class weights of the cross entropy, as in PyTorch). Multi-column losses are the mean over the columns.
"""

from typing import Any

Array = Any  # an array of the module `xp`
KINDS = (
    "softmax_cross_entropy", "binary_cross_entropy", "mean_squared", "mean_absolute", "huber", "quantile",
)


def row_losses(xp: Any, kind: str, logits: Array, targets: Array, options: dict) -> tuple[Array, Array, Array | None]:
    """Return (row losses, gradient, row weights or None) of the loss `kind`.

    Local.
    """
    return _LOSSES[kind](xp, logits, targets, **options)


def _softmax_cross_entropy(xp, logits, targets, label_smoothing=0.0, class_weights=None):
    """As torch.nn.functional.cross_entropy: the mean divides by the sum of the class weights of the labels.

    With class weights c and smoothing e, the target of class j is (1 - e) c_y [j = y] + e / k c_j.
    """
    k = logits.shape[1]
    z = logits - logits.max(axis=1, keepdims=True)  # (n, k)
    exponentials = xp.exp(z)
    total = exponentials.sum(axis=1, keepdims=True)  # (n, 1)
    wanted = xp.zeros_like(z)
    wanted[xp.arange(z.shape[0]), targets] = 1.0 - label_smoothing
    if label_smoothing:
        wanted += label_smoothing / k
    row_weights = None
    if class_weights is not None:
        class_weights = class_weights.astype(z.dtype, copy=False)
        row_weights = class_weights[targets]
        at_label = xp.zeros_like(z)
        at_label[xp.arange(z.shape[0]), targets] = (1.0 - label_smoothing) * row_weights
        wanted = at_label + (label_smoothing / k) * class_weights
    losses = (wanted * (xp.log(total) - z)).sum(axis=1)
    return losses, exponentials / total * wanted.sum(axis=1, keepdims=True) - wanted, row_weights


def _binary_cross_entropy(xp, logits, targets):
    """With logits, stable: max(z, 0) - z t + log(1 + exp(-|z|)); targets may lie between 0 and 1."""
    e = xp.exp(-xp.abs(logits))
    losses = xp.maximum(logits, 0.0) - logits * targets + xp.log1p(e)
    return _mean(losses), (xp.where(logits >= 0, 1.0, e) / (1.0 + e) - targets) * (1.0 / logits.shape[1]), None


def _mean_squared(xp, logits, targets):
    """(z - t)^2."""
    difference = logits - targets
    return _mean(difference * difference), difference * (2.0 / logits.shape[1]), None


def _mean_absolute(xp, logits, targets):
    """|z - t|; the gradient at 0 is 0."""
    difference = logits - targets
    return _mean(xp.abs(difference)), xp.sign(difference) * (1.0 / logits.shape[1]), None


def _huber(xp, logits, targets, delta=1.0):
    """As torch.nn.functional.huber_loss: d^2 / 2 up to delta, then delta (|d| - delta / 2)."""
    difference = logits - targets
    inside = xp.clip(difference, -delta, delta)
    return _mean(inside * (difference - 0.5 * inside)), inside * (1.0 / logits.shape[1]), None


def _quantile(xp, logits, targets, quantiles=(0.5,)):
    """Pinball loss max(q d, (q - 1) d), d = t - z; column j * len(quantiles) + i is quantile i of target j."""
    n, k = targets.shape
    q = xp.asarray(quantiles, dtype=logits.dtype)  # (Q,)
    d = targets[:, :, None] - logits.reshape(n, k, q.size)  # (n, k, Q)
    losses = xp.maximum(q * d, (q - 1.0) * d)
    slope = xp.where(d > 0, -q, xp.where(d < 0, 1.0 - q, 0.0 * d)) * (1.0 / (k * q.size))
    return _mean(losses.reshape(n, k * q.size)), slope.reshape(n, k * q.size), None


def _mean(losses):
    """Mean over the columns."""
    return losses.sum(axis=1) * (1.0 / losses.shape[1])


_LOSSES = {
    "softmax_cross_entropy": _softmax_cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mean_squared": _mean_squared,
    "mean_absolute": _mean_absolute,
    "huber": _huber,
    "quantile": _quantile,
}
