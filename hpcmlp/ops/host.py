"""The host side of the arithmetic contract: fused C kernels for float32 where they are built, else NumPy in blocks.

With the extension (`hpcmlp.ops._fused`; HPCMLP_FUSED=0 leaves it out) each float32 operation beside a GEMM is one pass
over its arrays; float64, and everything without the extension, takes the path of `blocked.py`.
What each operation writes is said in `plain.py`.
"""

import os
from typing import Any

import numpy as np

from hpcmlp.ops import activations, counter
from hpcmlp.ops.blocked import BLOCK as BLOCK
from hpcmlp.ops.blocked import BlockedOps
from hpcmlp.ops.plain import LAYER_NORM_EPS

try:
    from hpcmlp.ops import _fused
except ImportError:  # not built: the NumPy path does everything
    _fused = None

FLOAT32 = np.dtype(np.float32)
INT32 = np.dtype(np.int32)
GATHERED = (np.dtype(np.uint8), FLOAT32)
ACTIVATION_CODE = {kind: code for code, kind in enumerate(activations.KINDS)}  # the order of the enum in _fused.c
MEAN_LOSS_CODE = {"binary_cross_entropy": 0, "mean_squared": 1, "mean_absolute": 2, "huber": 3}


def kernels() -> Any:
    """Return the module of C kernels, or None where it is not built or HPCMLP_FUSED is 0. Local."""
    return None if os.environ.get("HPCMLP_FUSED", "1") == "0" else _fused


class HostOps(BlockedOps):
    """The operations on NumPy arrays.

    fused : True asks for the C kernels, False for NumPy alone; None takes the kernels when they are built and the
        environment variable HPCMLP_FUSED is not 0. The attribute `fused` tells what was taken.

    Raises ImportError for fused=True without the extension.
    """

    def __init__(self, fused: bool | None = None):
        super().__init__()
        if fused and _fused is None:
            raise ImportError("the C extension hpcmlp.ops._fused is not built; install with a C compiler or use NumPy")
        self.fused = kernels() is not None if fused is None else bool(fused)

    def gather(self, source, rows, out, shift=None, scale=None):
        if self.fused and out.dtype is FLOAT32 and source.dtype in GATHERED:
            _fused.gather(source, rows, out, shift, scale)
        else:
            super().gather(source, rows, out, shift, scale)

    # Layers

    def linear(self, x, w, b, pre):
        if b is not None and self.fused and pre.dtype is FLOAT32:
            x.dot(w.T, pre)
            _fused.bias_activation(0, pre, b, pre)
        else:
            super().linear(x, w, b, pre)

    def linear_activation(self, x, w, b, kind, out, pre=None):
        if self.fused and out.dtype is FLOAT32:
            z = out if pre is None else pre
            x.dot(w.T, z)
            _fused.bias_activation(ACTIVATION_CODE[kind], z, b, out)
        else:
            super().linear_activation(x, w, b, kind, out, pre)

    def bias_activation(self, kind, pre, b, out):
        if self.fused and out.dtype is FLOAT32:
            _fused.bias_activation(ACTIVATION_CODE[kind], pre, b, out)
        else:
            super().bias_activation(kind, pre, b, out)

    def activation(self, kind, pre, out):
        if self.fused and pre.dtype is FLOAT32:
            _fused.bias_activation(ACTIVATION_CODE[kind], pre, None, out)
        else:
            super().activation(kind, pre, out)

    def activation_backward(self, kind, da, out, pre, dz, db=None):
        if self.fused and dz.dtype is FLOAT32:
            y = pre if kind in activations.NEEDS_PRE else out
            _fused.activation_backward(ACTIVATION_CODE[kind], da, da if y is None else y, dz, db)
        else:
            super().activation_backward(kind, da, out, pre, dz, db)

    def column_sum(self, dz, db):
        if self.fused and dz.dtype is FLOAT32:
            _fused.column_sum(dz, db)
        else:
            super().column_sum(dz, db)

    def layer_norm(self, x, gamma, beta, out, mean, rstd, eps=LAYER_NORM_EPS):
        if self.fused and x.dtype is FLOAT32:
            _fused.layer_norm(x, gamma, beta, out, mean, rstd, eps)
        else:
            super().layer_norm(x, gamma, beta, out, mean, rstd, eps)

    def layer_norm_backward(self, dout, x, gamma, mean, rstd, dx, dgamma, dbeta):
        if self.fused and x.dtype is FLOAT32:
            _fused.layer_norm_backward(dout, x, gamma, mean, rstd, dx, dgamma, dbeta)
        else:
            super().layer_norm_backward(dout, x, gamma, mean, rstd, dx, dgamma, dbeta)

    def dropout_mask(self, mask, rate, seed, step, layer, first):
        if self.fused:
            _fused.dropout_mask(mask, counter.threshold(rate), counter.mix64(seed, step, layer), first)
        else:
            super().dropout_mask(mask, rate, seed, step, layer, first)

    def dropout(self, a, mask, rate, out):
        if self.fused and a.dtype is FLOAT32:
            _fused.dropout(a, mask, 1.0 / (1.0 - rate), out)
        else:
            super().dropout(a, mask, rate, out)

    # Losses

    def loss(self, kind, logits, targets, weights, dlogits, **options):
        if self.fused and logits.dtype is FLOAT32 and (weights is None or weights.dtype is FLOAT32):
            into = dlogits
            if into is None:
                into = self._scratch("dlogits", logits.size, FLOAT32).reshape(logits.shape)
            if kind == "softmax_cross_entropy" and targets.dtype is INT32:
                return _cross_entropy(logits, targets, weights, into, **options)
            if kind in MEAN_LOSS_CODE and targets.dtype is FLOAT32:
                delta = options.get("delta", 1.0)
                return _fused.mean_loss(MEAN_LOSS_CODE[kind], logits, targets, weights, into, delta)
        return super().loss(kind, logits, targets, weights, dlogits, **options)

    # Vectors

    def add_scaled(self, p, u, factor):
        if self.fused and p.dtype is FLOAT32:
            _fused.add_scaled(p, u, factor)
        else:
            super().add_scaled(p, u, factor)

    def sum_squares(self, g):
        if self.fused and g.dtype is FLOAT32:
            return _fused.sum_squares(g)
        return super().sum_squares(g)

    def finite(self, g):
        if self.fused and g.dtype is FLOAT32:
            return _fused.finite(g)
        return super().finite(g)

    def checksum(self, p):
        if self.fused:
            return self.finish_checksum(_fused.checksum(p), p.size * (p.itemsize // 4))
        return super().checksum(p)

    # Optimizers

    def sgd(self, p, g, buf, lr, momentum, dampening, nesterov, weight_decay, grad_scale, first):
        if self.fused and p.dtype is FLOAT32:
            keep = 1.0 - dampening
            if first and momentum:
                buf.fill(0)
                keep = 1.0
            buf = buf if momentum else None
            _fused.sgd(p, g, buf, lr, momentum, keep, bool(nesterov), weight_decay, grad_scale)
        else:
            super().sgd(p, g, buf, lr, momentum, dampening, nesterov, weight_decay, grad_scale, first)

    def adam(self, p, g, m, v, lr, beta1, beta2, eps, weight_decay, decoupled, step, grad_scale):
        if self.fused and p.dtype is FLOAT32:
            shrink, coupled = (1.0 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
            rate, root = lr / (1.0 - beta1**step), (1.0 - beta2**step) ** -0.5
            _fused.adam(
                p, g, m, v, rate, 1.0 - beta1, beta2, 1.0 - beta2, eps, coupled, shrink, root, grad_scale
            )
        else:
            super().adam(p, g, m, v, lr, beta1, beta2, eps, weight_decay, decoupled, step, grad_scale)

    def adam_direction(self, p, g, m, v, u, beta1, beta2, eps, weight_decay, step, grad_scale):
        if self.fused and p.dtype is FLOAT32:
            rate, root = 1.0 / (1.0 - beta1**step), (1.0 - beta2**step) ** -0.5
            _fused.adam_direction(
                p, g, m, v, u, rate, 1.0 - beta1, beta2, 1.0 - beta2, eps, weight_decay, root, grad_scale
            )
        else:
            super().adam_direction(p, g, m, v, u, beta1, beta2, eps, weight_decay, step, grad_scale)

    def rmsprop(self, p, g, v, buf, lr, alpha, eps, momentum, weight_decay, grad_scale):
        if self.fused and p.dtype is FLOAT32:
            buf = buf if momentum else None
            _fused.rmsprop(p, g, v, buf, lr, alpha, 1.0 - alpha, eps, momentum, weight_decay, grad_scale)
        else:
            super().rmsprop(p, g, v, buf, lr, alpha, eps, momentum, weight_decay, grad_scale)

    def adagrad(self, p, g, s, lr, eps, lr_decay, weight_decay, step, grad_scale):
        if self.fused and p.dtype is FLOAT32:
            _fused.adagrad(p, g, s, lr / (1.0 + (step - 1) * lr_decay), eps, weight_decay, grad_scale)
        else:
            super().adagrad(p, g, s, lr, eps, lr_decay, weight_decay, step, grad_scale)

    def ema(self, e, p, decay):
        if self.fused and e.dtype is FLOAT32:
            _fused.ema(e, p, 1.0 - decay)
        else:
            super().ema(e, p, decay)


def _cross_entropy(logits, targets, weights, dlogits, label_smoothing=0.0, class_weights=None):
    """The fused cross entropy with the options of the plain one."""
    if class_weights is not None:
        class_weights = class_weights.astype(FLOAT32, copy=False)
    return _fused.cross_entropy(logits, targets, weights, dlogits, label_smoothing, class_weights)
