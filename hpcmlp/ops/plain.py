"""The arithmetic contract in plain array code for any array module: the form to read, and the oracle of the others.

Every operation writes into arrays that the caller made and keeps their dtype (float32 or float64). Arrays are
C-contiguous, weights (out, in) as in PyTorch, n is the number of rows in use and may be 0. Unless a docstring says
more, an output may be the input of the same shape and must not overlap another one.
"""

from typing import Any

import numpy as np

from hpcmlp.ops import activations, counter, losses
from hpcmlp.ops.staging import InPlace

Array = Any  # an array of the module in use: numpy.ndarray or cupy.ndarray

LAYER_NORM_EPS = 1e-5


class PlainOps:
    """The operations over the array module `xp`; the other sides inherit what they do not do better."""

    plans = False       # whether its arrays are a device's that runs planned launches (`ops.open_planned`)
    NEEDS_PRE = activations.NEEDS_PRE
    ACTIVATIONS = activations.KINDS
    LOSSES = losses.KINDS

    def __init__(self, xp: Any = np):
        self.xp = xp

    # Memory

    def empty(self, shape: int | tuple[int, ...], dtype: type) -> Array:
        """Return an array with undefined content.

        Local.
        """
        return self.xp.empty(shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: type) -> Array:
        """Return an array of zeros.

        Local.
        """
        return self.xp.zeros(shape, dtype)

    def to_host(self, a: Array, out: Array) -> None:
        """Copy an array of this side into the NumPy array `out`.

        Local.
        """
        out[...] = a

    def from_host(self, a: Array, out: Array) -> None:
        """Copy the NumPy array `a` into an array of this side.

        Local.
        """
        out[...] = a

    def stage(self, a: Array, host: np.ndarray | None = None) -> Any:
        """Return the way of ranges of the flat vector `a` to the host and back (`ops.staging`).

        Local. `host`, of the same size, is what they are copied into where `a` is on a device; None: it is made.
        """
        return InPlace(a)

    def bring(self, a: np.ndarray | None) -> Array | None:
        """Return the NumPy array `a` as an array of this side: itself on the host, a copy on a device; None stays None.

        Local.
        """
        return a

    def gather(
        self, source: Array, rows: Array, out: Array, shift: Array | None = None, scale: Array | None = None
    ) -> None:
        """Write out[i] = (source[rows[i]] - shift) * scale, in the dtype of `out`.

        Local.

        source : (N, d) of any integer or float dtype; rows : (n,) int64; out : (n, d); shift, scale : (d,) or None.
        """
        picked = source[rows].astype(out.dtype)
        if shift is not None:
            picked = picked - shift
        out[...] = picked if scale is None else picked * scale

    # Layers

    def linear(self, x: Array, w: Array, b: Array | None, pre: Array) -> None:
        """Write pre = x @ w.T + b.

        Local.

        x : (n, in); w : (out, in); b : (out,) or None; pre : (n, out), none of the others; it may be some columns of a
        wider array when b is None.
        """
        self.xp.matmul(x, w.T, out=pre)
        if b is not None:
            pre += b

    def linear_activation(
        self, x: Array, w: Array, b: Array | None, kind: str, out: Array, pre: Array | None = None
    ) -> None:
        """Write out = f(x @ w.T + b); kinds in `NEEDS_PRE` leave x @ w.T + b in `pre`, for the others it is None.

        Local.

        x : (n, in); w : (out, in); b : (out,) or None; out, pre : (n, out).
        """
        z = out if pre is None else pre
        self.linear(x, w, b, z)
        self.activation(kind, z, out)

    def activation(self, kind: str, pre: Array, out: Array) -> None:
        """Write out = f(pre).

        Local.
        """
        out[...] = activations.activate(self.xp, kind, pre)

    def bias_activation(self, kind: str, pre: Array, b: Array, out: Array) -> None:
        """Write out = f(pre + b); kinds in `NEEDS_PRE` leave pre + b in `pre`, others leave anything there.

        Local.

        pre, out : (n, k), may be one array for kinds not in `NEEDS_PRE`; b : (k,).
        """
        pre += b
        self.activation(kind, pre, out)

    def activation_backward(
        self, kind: str, da: Array, out: Array | None, pre: Array | None, dz: Array, db: Array | None = None
    ) -> None:
        """Write dz = da * f'(.), and into db (k,) the column sums of dz when it is given.

        Local.

        da, out, pre, dz : (n, k); dz may be da. Of `out` and `pre` only the one that the kind needs is read.
        """
        dz[...] = activations.activate_backward(self.xp, kind, da, out, pre)
        if db is not None:
            self.column_sum(dz, db)

    def linear_backward(
        self, dz: Array, x: Array | None, w: Array | None, dw: Array | None = None, dx: Array | None = None
    ) -> None:
        """Write dw = dz.T @ x when dw is given, and dx = dz @ w when dx is given.

        Local.

        dz : (n, out), for dw alone it may be some columns of a wider array; x, dx : (n, in); w, dw : (out, in). `x` may
        be None without dw, `w` without dx. The bias gradient comes from the pass that made dz.
        """
        if dw is not None:
            self.xp.matmul(dz.T, x, out=dw)
        if dx is not None:
            self.xp.matmul(dz, w, out=dx)

    def column_sum(self, dz: Array, db: Array) -> None:
        """Write db[j] = sum of dz[:, j]: the bias gradient.

        Local.
        """
        db[...] = dz.sum(axis=0, dtype=self.xp.float64)

    def layer_norm(
        self, x: Array, gamma: Array, beta: Array, out: Array, mean: Array, rstd: Array,
        eps: float = LAYER_NORM_EPS,
    ) -> None:
        """Write out = (x - mean) * rstd * gamma + beta per row; biased variance, eps inside the root, as in PyTorch.

        Local.

        x, out : (n, d); gamma, beta : (d,); mean, rstd : (n,) written, kept for the backward pass.
        """
        mean[...] = x.mean(axis=1)
        centred = x - mean[:, None]
        rstd[...] = 1.0 / self.xp.sqrt((centred * centred).mean(axis=1) + eps)
        out[...] = centred * rstd[:, None] * gamma + beta

    def layer_norm_backward(
        self, dout: Array, x: Array, gamma: Array, mean: Array, rstd: Array, dx: Array, dgamma: Array,
        dbeta: Array,
    ) -> None:
        """Write the gradients of `layer_norm`: dx (n, d), dgamma and dbeta (d,). dx may be dout.

        Local.
        """
        normed = (x - mean[:, None]) * rstd[:, None]
        dnormed = dout * gamma
        self.column_sum(dout * normed, dgamma)
        self.column_sum(dout, dbeta)
        along = (dnormed * normed).mean(axis=1)
        dx[...] = (dnormed - dnormed.mean(axis=1)[:, None] - normed * along[:, None]) * rstd[:, None]

    def dropout_mask(self, mask: Array, rate: float, seed: int, step: int, layer: int, first: int) -> None:
        """Write the keep-mask of rows first .. first + n - 1, a function of (seed, step, layer, row, column) alone.

        Local.

        mask : (n, d) bool or uint8, 1 where the element is kept; rate : the share that is dropped.
        """
        keys = counter.row_keys(seed, step, layer, first, mask.shape[0], self.xp)
        mask[...] = counter.uniform_bits(keys, mask.shape[1], self.xp) >= counter.threshold(rate)

    def dropout(self, a: Array, mask: Array, rate: float, out: Array) -> None:
        """Write out = a * mask / (1 - rate); the same for the gradient.

        Local.
        """
        out[...] = a * mask.astype(a.dtype) * (1.0 / (1.0 - rate))

    # Losses

    def loss(
        self, kind: str, logits: Array, targets: Array, weights: Array | None, dlogits: Array | None,
        **options,
    ) -> tuple[float, float]:
        """Write the gradient of the loss sum into `dlogits` and return (loss_sum, weight_sum): sums, not means.

        Local.

        logits, dlogits : (n, k), dlogits may be None (loss only) or logits itself; weights : (n,) or None.
        softmax_cross_entropy : targets (n,) int32; options label_smoothing=0.0, class_weights=None (k,); the weight of
            a row is weights[i] * class_weights[y_i], so that loss_sum / weight_sum is PyTorch's mean.
        binary_cross_entropy, mean_squared, mean_absolute, huber (delta=1.0) : targets (n, k); mean over columns.
        quantile : quantiles=(q, ...), targets (n, j), logits (n, j * len(quantiles)), the quantiles of one target
            side by side; mean over columns.
        The two sums are accumulated in float64.
        """
        xp = self.xp
        row_loss, gradient, row_weights = losses.row_losses(xp, kind, logits, targets, options)
        if weights is not None:
            row_loss = row_loss * weights
            gradient = gradient * weights[:, None]
            row_weights = weights if row_weights is None else row_weights * weights
        if dlogits is not None:
            dlogits[...] = gradient
        weight_sum = float(logits.shape[0]) if row_weights is None else float(row_weights.sum(dtype=xp.float64))
        return float(row_loss.sum(dtype=xp.float64)), weight_sum

    # Vectors

    def add(self, a: Array, b: Array, out: Array) -> None:
        """Write out = a + b.

        Local.
        """
        self.xp.add(a, b, out=out)

    def add_scaled(self, p: Array, u: Array, factor: float) -> None:
        """Add factor * u to p.

        Local.
        """
        p += u * factor

    def scale(self, g: Array, factor: float) -> None:
        """Multiply g by a number, in place.

        Local.
        """
        g *= factor

    def sum_squares(self, g: Array) -> float:
        """Return the sum of squares of a 1-D array, accumulated in float64.

        Local.
        """
        return float((g.astype(self.xp.float64) ** 2).sum())

    def finite(self, g: Array) -> bool:
        """Tell whether every element of a 1-D array is finite.

        Local.
        """
        return bool(self.xp.isfinite(g).all())

    def checksum(self, p: Array) -> int:
        """Return an integer below 2**53 made of every bit of the 1-D array p and of their positions.

        Local.

        The wrapping 64-bit sum of the 32-bit words w_i times (2 i + 1), mixed: any single changed word shows.
        """
        xp = self.xp
        words = p.view(xp.uint32).astype(xp.uint64)
        odd = xp.arange(words.size, dtype=xp.uint64) * xp.uint64(2) + xp.uint64(1)
        return self.finish_checksum(int((words * odd).sum(dtype=xp.uint64)), words.size)

    @staticmethod
    def finish_checksum(total: int, count: int) -> int:
        """Turn the wrapping sum over `count` words into the checksum.

        Local.
        """
        return counter.mix64(total, count) >> 11

    # Optimizers: in place on 1-D arrays; g is read only, and stands for g * grad_scale

    def sgd(
        self, p: Array, g: Array, buf: Array | None, lr: float, momentum: float, dampening: float,
        nesterov: bool, weight_decay: float, grad_scale: float, first: bool,
    ) -> None:
        """Take one step of torch.optim.SGD; `buf` is None without momentum, `first` marks the step that starts it.

        Local.
        """
        g = g * grad_scale
        if weight_decay:
            g = g + weight_decay * p
        if momentum:
            buf[...] = g if first else momentum * buf + (1.0 - dampening) * g
            g = g + momentum * buf if nesterov else buf
        p -= lr * g

    def adam(
        self, p: Array, g: Array, m: Array, v: Array, lr: float, beta1: float, beta2: float, eps: float,
        weight_decay: float, decoupled: bool, step: int, grad_scale: float,
    ) -> None:
        """Take one step of torch.optim.Adam, or AdamW when `decoupled`; `step` counts from 1.

        Local.

        eps is added after the bias correction, as in PyTorch.
        """
        g = g * grad_scale
        if weight_decay:
            if decoupled:
                p *= 1.0 - lr * weight_decay
            else:
                g = g + weight_decay * p
        m += (1.0 - beta1) * (g - m)
        v *= beta2
        v += (1.0 - beta2) * (g * g)
        p -= (lr / (1.0 - beta1**step)) * m / (self.xp.sqrt(v) * (1.0 - beta2**step) ** -0.5 + eps)

    def adam_direction(
        self, p: Array, g: Array, m: Array, v: Array, u: Array, beta1: float, beta2: float, eps: float,
        weight_decay: float, step: int, grad_scale: float,
    ) -> None:
        """Update Adam's moments and write u = m' / (sqrt(v') + eps) + weight_decay * p: the direction of LAMB.

        Local.
        """
        g = g * grad_scale
        m += (1.0 - beta1) * (g - m)
        v *= beta2
        v += (1.0 - beta2) * (g * g)
        u[...] = m / (1.0 - beta1**step) / (self.xp.sqrt(v) * (1.0 - beta2**step) ** -0.5 + eps) + weight_decay * p

    def rmsprop(
        self, p: Array, g: Array, v: Array, buf: Array | None, lr: float, alpha: float, eps: float,
        momentum: float, weight_decay: float, grad_scale: float,
    ) -> None:
        """Take one step of torch.optim.RMSprop, not centred; `buf` is None without momentum.

        Local.
        """
        g = g * grad_scale
        if weight_decay:
            g = g + weight_decay * p
        v *= alpha
        v += (1.0 - alpha) * (g * g)
        u = g / (self.xp.sqrt(v) + eps)
        if momentum:
            buf *= momentum
            buf += u
            u = buf
        p -= lr * u

    def adagrad(
        self, p: Array, g: Array, s: Array, lr: float, eps: float, lr_decay: float, weight_decay: float,
        step: int, grad_scale: float,
    ) -> None:
        """Take one step of torch.optim.Adagrad; `step` counts from 1.

        Local.
        """
        g = g * grad_scale
        if weight_decay:
            g = g + weight_decay * p
        s += g * g
        p -= (lr / (1.0 + (step - 1) * lr_decay)) * (g / (self.xp.sqrt(s) + eps))

    def ema(self, e: Array, p: Array, decay: float) -> None:
        """Move the average e towards p: e = decay * e + (1 - decay) * p.

        Local.
        """
        e += (1.0 - decay) * (p - e)
