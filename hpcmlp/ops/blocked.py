"""The NumPy path of the host: the plain form over cache blocks, optimizers without temporaries.

Operations on rows run the plain form over blocks of rows that stay in the cache; optimizers and reductions run over
blocks of BLOCK elements through two kept work arrays, because temporaries of that size would be given back to the
system and faulted in again at every expression (ten times the cost of the addition that makes them).
What each operation writes is said in `plain.py`.
"""

import numpy as np

from hpcmlp.ops import counter
from hpcmlp.ops.plain import LAYER_NORM_EPS, PlainOps

ALIGNMENT = 64
ROW_BLOCK = 8192  # elements of the rows taken at once: each float32 temporary is 32 KiB
BLOCK = 32768  # elements of a vector taken at once: fewer calls; 1.5 times as fast as 8192 for Adam, 65536 no better
SUM_ROWS = 128  # rows that one matrix-vector product sums in the arrays' own dtype


class BlockedOps(PlainOps):
    """The operations on NumPy arrays, block by block."""

    def __init__(self):
        super().__init__(np)
        self._kept = {}

    def _scratch(self, name, count, dtype):
        """Return an array of `count` elements that is kept for the next call; it only ever grows."""
        kept = self._kept.get((name, dtype))
        if kept is None or kept.size < count:
            kept = self._kept[name, dtype] = self.empty(count, dtype)
        return kept[:count]

    def _blocks(self, a):
        """Yield a slice of at most BLOCK elements of the 1-D array a, and two work arrays of its length."""
        first, second = self._scratch("first", BLOCK, a.dtype), self._scratch("second", BLOCK, a.dtype)
        for start in range(0, a.size, BLOCK):
            count = min(BLOCK, a.size - start)
            yield slice(start, start + count), first[:count], second[:count]

    # Memory

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + nbytes].view(dtype).reshape(shape)

    def zeros(self, shape, dtype):
        out = self.empty(shape, dtype)
        out.fill(0)
        return out

    def gather(self, source, rows, out, shift=None, scale=None):
        if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= source.shape[0]):
            raise IndexError(f"rows reach from {rows.min()} to {rows.max()}, the source has 0..{source.shape[0] - 1}")
        for block in _row_blocks(out):
            part = out[block]
            picked = self._scratch("gather", part.size, source.dtype).reshape(part.shape)
            source.take(rows[block], axis=0, out=picked, mode="clip")  # checked above; "raise" would make a copy
            np.copyto(part, picked, casting="same_kind")
            if shift is not None:
                part -= shift
            if scale is not None:
                part *= scale

    # Layers

    def linear(self, x, w, b, pre):
        if pre.flags.c_contiguous:
            x.dot(w.T, pre)  # the method costs a third of what np.matmul costs to call, and copies columns
        else:
            np.matmul(x, w.T, out=pre)
        if b is not None:
            np.add(pre, b, out=pre)

    def linear_activation(self, x, w, b, kind, out, pre=None):
        z = out if pre is None else pre
        x.dot(w.T, z)
        if b is None:
            self.activation(kind, z, out)
        else:
            self.bias_activation(kind, z, b, out)

    def bias_activation(self, kind, pre, b, out):
        for rows in _row_blocks(pre):
            np.add(pre[rows], b, out=pre[rows])
            self._activate(kind, pre[rows], out[rows])

    def linear_backward(self, dz, x, w, dw, dx=None):
        if dw is not None and dz.flags.c_contiguous:
            dz.T.dot(x, dw)
        elif dw is not None:
            np.matmul(dz.T, x, out=dw)
        if dx is not None:
            dz.dot(w, dx)

    def activation(self, kind, pre, out):
        for rows in _row_blocks(pre):
            self._activate(kind, pre[rows], out[rows])

    def _activate(self, kind, pre, out):
        """One block of an activation; the common ones without temporaries."""
        if kind == "relu":
            np.maximum(pre, 0.0, out=out)
        elif kind == "tanh":
            np.tanh(pre, out=out)
        else:
            super().activation(kind, pre, out)

    def activation_backward(self, kind, da, out, pre, dz, db=None):
        for rows in _row_blocks(da):
            if kind == "relu":
                active = self._scratch("active", da[rows].size, np.bool_).reshape(da[rows].shape)
                np.not_equal(out[rows], 0.0, out=active)  # out >= 0, and a NaN counts as active
                np.multiply(da[rows], active, out=dz[rows])
            else:
                y = None if out is None else out[rows]
                super().activation_backward(kind, da[rows], y, None if pre is None else pre[rows], dz[rows])
        if db is not None:
            self.column_sum(dz, db)

    def column_sum(self, dz, db):
        total, part = self._scratch("total", db.size, np.float64), self._scratch("part", db.size, db.dtype)
        ones = self._scratch("ones", SUM_ROWS, db.dtype)
        ones.fill(1)
        total.fill(0)
        for start in range(0, dz.shape[0], SUM_ROWS):
            rows = dz[start : start + SUM_ROWS]
            ones[: rows.shape[0]].dot(rows, part)  # BLAS; np.add.reduce in float64 is many times slower
            np.add(total, part, out=total)
        db[...] = total

    def layer_norm(self, x, gamma, beta, out, mean, rstd, eps=LAYER_NORM_EPS):
        for rows in _row_blocks(x):
            super().layer_norm(x[rows], gamma, beta, out[rows], mean[rows], rstd[rows], eps)

    def layer_norm_backward(self, dout, x, gamma, mean, rstd, dx, dgamma, dbeta):
        part = self._scratch("gamma", dgamma.size, dgamma.dtype), self._scratch("beta", dbeta.size, dbeta.dtype)
        total = self._scratch("totals", 2 * dgamma.size, np.float64).reshape(2, -1)
        total.fill(0)
        for rows in _row_blocks(x):
            super().layer_norm_backward(dout[rows], x[rows], gamma, mean[rows], rstd[rows], dx[rows], *part)
            total[0] += part[0]
            total[1] += part[1]
        dgamma[...] = total[0]
        dbeta[...] = total[1]

    def dropout_mask(self, mask, rate, seed, step, layer, first):
        for rows in _row_blocks(mask):
            super().dropout_mask(mask[rows], rate, seed, step, layer, first + rows.start)

    def dropout(self, a, mask, rate, out):
        for rows in _row_blocks(a):
            super().dropout(a[rows], mask[rows], rate, out[rows])

    # Losses

    def loss(self, kind, logits, targets, weights, dlogits, **options):
        loss_sum = weight_sum = 0.0
        for rows in _row_blocks(logits):
            loss, weight = super().loss(
                kind, logits[rows], targets[rows], None if weights is None else weights[rows],
                None if dlogits is None else dlogits[rows], **options,
            )
            loss_sum += loss
            weight_sum += weight
        return loss_sum, weight_sum

    # Vectors

    def add_scaled(self, p, u, factor):
        for at, t, _ in self._blocks(p):
            np.multiply(u[at], factor, out=t)
            part = p[at]
            part += t

    def sum_squares(self, g):
        total = 0.0
        part = self._scratch("first", BLOCK, np.dtype(np.float64))
        for start in range(0, g.size, BLOCK):
            block = g[start : start + BLOCK]
            wide = part[: block.size]
            wide[...] = block
            total += float(wide.dot(wide))
        return total

    def finite(self, g):
        if np.isfinite(g.dot(g)):  # one pass in BLAS; a sum that overflows says nothing yet
            return True
        return all(np.isfinite(g[start : start + BLOCK]).all() for start in range(0, g.size, BLOCK))

    def checksum(self, p):
        words = p.view(np.uint32)
        odd, wide = (self._scratch(name, BLOCK, np.dtype(np.uint64)) for name in ("odd", "wide"))
        odd[...] = np.arange(1, 2 * BLOCK, 2)
        total = 0
        for start in range(0, words.size, BLOCK):
            block = words[start : start + BLOCK]
            part = wide[: block.size]
            part[...] = block
            total += int(part.dot(odd[: part.size])) + 2 * start * int(part.sum())
        return self.finish_checksum(total & counter.MASK64, words.size)

    # Optimizers: t is the scaled gradient, then the update; s a second work array

    def sgd(self, p, g, buf, lr, momentum, dampening, nesterov, weight_decay, grad_scale, first):
        for at, t, s in self._blocks(p):
            _scaled_gradient(p[at], g[at], t, s, weight_decay, grad_scale)
            if momentum:
                kept = buf[at]
                if first:
                    kept[...] = t
                else:
                    kept *= momentum
                    np.multiply(t, 1.0 - dampening, out=s)
                    kept += s
                if nesterov:
                    np.multiply(kept, momentum, out=s)
                    t += s
                else:
                    t[...] = kept
            t *= lr
            part = p[at]
            part -= t

    def adam(self, p, g, m, v, lr, beta1, beta2, eps, weight_decay, decoupled, step, grad_scale):
        for at, t, s in self._blocks(p):
            _scaled_gradient(p[at], g[at], t, s, 0.0 if decoupled else weight_decay, grad_scale)
            _adam_ratio(m[at], v[at], t, s, beta1, beta2, eps, step)
            t *= lr
            part = p[at]
            if decoupled and weight_decay:
                part *= 1.0 - lr * weight_decay
            part -= t

    def adam_direction(self, p, g, m, v, u, beta1, beta2, eps, weight_decay, step, grad_scale):
        for at, t, s in self._blocks(p):
            _scaled_gradient(p[at], g[at], t, s, 0.0, grad_scale)
            _adam_ratio(m[at], v[at], t, s, beta1, beta2, eps, step)
            np.multiply(p[at], weight_decay, out=s)
            np.add(t, s, out=u[at])

    def rmsprop(self, p, g, v, buf, lr, alpha, eps, momentum, weight_decay, grad_scale):
        for at, t, s in self._blocks(p):
            _scaled_gradient(p[at], g[at], t, s, weight_decay, grad_scale)
            second = v[at]
            second *= alpha
            np.multiply(t, t, out=s)
            s *= 1.0 - alpha
            second += s
            _over_root(t, second, s, 1.0, eps)
            if momentum:
                kept = buf[at]
                kept *= momentum
                kept += t
                t[...] = kept
            t *= lr
            part = p[at]
            part -= t

    def adagrad(self, p, g, s, lr, eps, lr_decay, weight_decay, step, grad_scale):
        for at, t, work in self._blocks(p):
            _scaled_gradient(p[at], g[at], t, work, weight_decay, grad_scale)
            np.multiply(t, t, out=work)
            second = s[at]
            second += work
            _over_root(t, second, work, 1.0, eps)
            t *= lr / (1.0 + (step - 1) * lr_decay)
            part = p[at]
            part -= t

    def ema(self, e, p, decay):
        for at, t, _ in self._blocks(e):
            np.subtract(p[at], e[at], out=t)
            t *= 1.0 - decay
            part = e[at]
            part += t


def _row_blocks(a):
    """Slices of as many rows of a matrix as make about ROW_BLOCK elements, at least one."""
    step = max(1, ROW_BLOCK // max(1, a.shape[1]))
    return [slice(start, min(start + step, a.shape[0])) for start in range(0, a.shape[0], step)]


def _scaled_gradient(p, g, t, s, weight_decay, grad_scale):
    """t = g * grad_scale + weight_decay * p."""
    np.multiply(g, grad_scale, out=t)
    if weight_decay:
        np.multiply(p, weight_decay, out=s)
        t += s


def _over_root(t, v, s, factor, eps):
    """t = t / (factor * sqrt(v) + eps)."""
    np.sqrt(v, out=s)
    s *= factor
    s += eps
    t /= s


def _adam_ratio(m, v, t, s, beta1, beta2, eps, step):
    """Update the moments from the gradient t, then t = m' / (sqrt(v') + eps), both bias-corrected."""
    np.multiply(t, t, out=s)
    s *= 1.0 - beta2
    v *= beta2
    v += s
    t -= m
    t *= 1.0 - beta1
    m += t
    np.divide(m, 1.0 - beta1**step, out=t)
    _over_root(t, v, s, (1.0 - beta2**step) ** -0.5, eps)
