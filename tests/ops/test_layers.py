"""Linear layers, layer norm, dropout, gather and memory on every side."""

import numpy as np
import pytest

from hpcmlp.ops.plain import PlainOps

SHAPES = [(0, 3, 4), (1, 1, 1), (5, 7, 3), (64, 300, 10), (33, 17, 513)]
NORM_SHAPES = [(0, 3), (1, 1), (5, 7), (64, 300), (131, 10), (70, 1100), (2, 9001)]


@pytest.mark.parametrize("n, d, k", SHAPES)
def test_linear_forward_and_backward(side, n, d, k, rng):
    x, w, b, dz = (side.array(rng.normal(size=size)) for size in ((n, d), (k, d), k, (n, k)))
    x64, w64, b64, dz64 = (array.astype(np.float64) for array in (x, w, b, dz))
    pre, dw, dx, db = side.out(n, k), side.out(k, d), side.out(n, d), side.out(k)
    side.ops.linear(x, w, b, pre)
    side.check(pre, np.einsum("ni,ki->nk", x64, w64) + b64, 10)
    side.ops.linear(x, w, None, pre)
    side.check(pre, np.einsum("ni,ki->nk", x64, w64), 10)
    side.ops.linear_backward(dz, x, w, dw, dx)
    side.check(dw, np.einsum("nk,ni->ki", dz64, x64), 10)
    side.check(dx, np.einsum("nk,ki->ni", dz64, w64), 10)
    dw[...] = 0
    side.ops.linear_backward(dz, x, w, dw)
    side.check(dw, np.einsum("nk,ni->ki", dz64, x64), 10)
    side.ops.column_sum(dz, db)
    side.check(db, [sum(column) for column in dz64.T.tolist()], 4)


@pytest.mark.parametrize("kind", PlainOps.ACTIVATIONS)
def test_linear_activation_is_linear_then_activation(side, kind, rng):
    x, w, b = (side.array(rng.normal(size=size)) for size in ((65, 7), (130, 7), 130))
    for bias in (b, None):
        z, wanted, out = side.out(65, 130), side.out(65, 130), side.out(65, 130)
        side.ops.linear(x, w, bias, z)
        side.ops.activation(kind, z, wanted)
        pre = side.out(65, 130) if kind in side.ops.NEEDS_PRE else None
        side.ops.linear_activation(x, w, bias, kind, out, pre)
        side.check(out, wanted)
        if pre is not None:
            side.check(pre, z)


@pytest.mark.parametrize("kind", PlainOps.ACTIVATIONS)
def test_bias_activation_is_the_sum_then_the_activation(side, kind, rng):
    product, b = side.array(rng.normal(size=(65, 130))), side.array(rng.normal(size=130))
    z, wanted = side.array(product.astype(np.float64) + b), side.out(65, 130)
    side.ops.activation(kind, z, wanted)
    out = side.out(65, 130) if kind in side.ops.NEEDS_PRE else product
    side.ops.bias_activation(kind, product, b, out)
    side.check(out, wanted, 4)
    if kind in side.ops.NEEDS_PRE:
        side.check(product, z)


def test_products_of_some_columns_leave_the_others_alone(side, rng):
    x, w, dz = (side.array(rng.normal(size=size)) for size in ((33, 17), (70, 17), (33, 100)))
    wide, dw = side.out(33, 100), side.out(70, 17)
    wide[...] = 5.0
    side.ops.linear(x, w, None, wide[:, 20:90])
    side.check(wide[:, 20:90], np.einsum("ni,ki->nk", x.astype(np.float64), w), 10)
    assert (wide[:, :20] == 5.0).all() and (wide[:, 90:] == 5.0).all()
    side.ops.linear_backward(dz[:, 20:90], x, None, dw)
    side.check(dw, np.einsum("nk,ni->ki", dz[:, 20:90].astype(np.float64), x), 10)
    dx = side.out(33, 17)
    side.ops.linear_backward(side.array(dz[:, 20:90]), None, w, None, dx)
    side.check(dx, np.einsum("nk,ki->ni", dz[:, 20:90].astype(np.float64), w), 10)


def test_column_sums_of_many_rows_are_exact_to_rounding(side, rng):
    dz = side.array(rng.normal(size=(20011, 3)) + 100.0)
    db = side.out(3)
    side.ops.column_sum(dz, db)
    np.testing.assert_allclose(db, dz.astype(np.float64).sum(axis=0), rtol=1e-14 if side.exact else 1e-6)


def norm(side, x, gamma, beta, dout):
    """Layer norm forward and backward, dx over dout as the network does it."""
    n, d = x.shape
    out, mean, rstd, dx = side.out(n, d), side.out(n), side.out(n), side.array(dout)
    dgamma, dbeta = side.out(d), side.out(d)
    x, gamma, beta = side.array(x), side.array(gamma), side.array(beta)
    side.ops.layer_norm(x, gamma, beta, out, mean, rstd)
    side.ops.layer_norm_backward(dx, x, gamma, mean, rstd, dx, dgamma, dbeta)
    return out, dx, dgamma, dbeta


def test_layer_norm_is_that_of_pytorch(side, oracle):
    given = [oracle[f"layer_norm/{name}"] for name in ("x", "gamma", "beta", "dout")]
    for found, name in zip(norm(side, *given), ("out", "dx", "dgamma", "dbeta"), strict=True):
        side.check(found, oracle[f"layer_norm/{name}"])


@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_layer_norm_agrees_with_plain_float64(side, shape, rng):
    given = [rng.normal(size=shape) + 3, rng.normal(size=shape[1]), rng.normal(size=shape[1]), rng.normal(size=shape)]
    given = [side.array(array).astype(np.float64) for array in given]
    given[0] *= 1.0 + (shape[1] == 1)
    n, d = shape
    plain, wanted, mean, rstd = PlainOps(), np.empty((2, n, d)), np.empty(n), np.empty(n)
    sums = np.empty((2, d))
    plain.layer_norm(*given[:3], wanted[0], mean, rstd)
    plain.layer_norm_backward(given[3], given[0], given[1], mean, rstd, wanted[1], *sums)
    for found, expected in zip(norm(side, *given), (*wanted, *sums), strict=True):
        # one column: the variance is 0 and rstd is 1 / sqrt(eps), which magnifies every rounding
        side.check(found, expected, 1000 if d == 1 else 5)


def test_layer_norm_gradient_agrees_with_finite_differences(exact_side, rng):
    given = [rng.normal(size=(3, 5)), rng.normal(size=5), rng.normal(size=5)]
    dout = rng.normal(size=(3, 5))
    gradients = norm(exact_side, *given, dout)[1:]
    for which, gradient in enumerate(gradients):
        for at in np.ndindex(gradient.shape):
            sums = []
            for h in (1e-6, -1e-6):
                moved = [array.copy() for array in given]
                moved[which][at] += h
                sums.append(float((norm(exact_side, *moved, dout)[0] * dout).sum()))
            assert gradient[at] == pytest.approx((sums[0] - sums[1]) / 2e-6, rel=1e-6, abs=1e-7)


def test_nan_goes_through_layer_norm_and_linear(side):
    x = np.arange(40.0).reshape(2, 20)
    x[1, 7] = np.nan
    with np.errstate(invalid="ignore"):
        out, dx, dgamma, _ = norm(side, x, np.ones(20), np.zeros(20), np.ones((2, 20)))
        pre = side.out(2, 3)
        side.ops.linear(side.array(x), side.array(np.ones((3, 20))), side.array(np.zeros(3)), pre)
    for found in (out, dx, pre):
        assert np.isnan(found[1]).all() and np.isfinite(found[0]).all()
    assert np.isnan(dgamma).all()


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 300), (3, 9001)])
def test_dropout_scales_what_it_keeps(side, shape, dtype, rng):
    a, mask, out = side.array(rng.normal(size=shape)), (rng.random(shape) < 0.7).astype(dtype), side.out(*shape)
    wanted = np.where(mask, a.astype(np.float64) / 0.7, 0.0)
    side.ops.dropout(a, mask, 0.3, out)
    side.check(out, wanted)
    side.ops.dropout(a, mask, 0.3, a)
    side.check(a, wanted)


@pytest.mark.parametrize("source_dtype", ["u1", "i1", "u2", "i2", "i4", "f2", "f4", "f8"])
def test_gather_converts_shifts_and_scales(side, source_dtype, rng):
    n, d = 70, 130
    source = (rng.normal(size=(41, d)) * 50).clip(0, 100).astype(source_dtype)
    rows = rng.integers(0, 41, n)
    shift, scale = side.array(rng.normal(size=d)), side.array(rng.normal(size=d))
    for used_shift, used_scale in ((None, None), (shift, None), (None, scale), (shift, scale)):
        out = side.out(n, d)
        side.ops.gather(source, rows, out, used_shift, used_scale)
        wanted = source[rows].astype(side.dtype).astype(np.float64)
        wanted = wanted - (0.0 if used_shift is None else used_shift.astype(np.float64))
        side.check(out, wanted * (1.0 if used_scale is None else used_scale.astype(np.float64)), 10)
    out = side.out(0, d)
    side.ops.gather(source, rows[:0], out, shift, scale)


@pytest.mark.parametrize("row", [-1, 5, 2**40])
def test_gather_refuses_rows_outside_the_source(host_ops, row):
    for dtype in (np.uint8, np.float32, np.int16):
        with pytest.raises(IndexError, match="5|row"):
            host_ops.gather(np.zeros((5, 3), dtype), np.array([0, row]), np.zeros((2, 3), np.float32))


def test_memory_is_aligned_and_has_the_wanted_form(host_ops):
    for shape in ((), 0, 5, (3, 7), (0, 4)):
        for dtype in (np.float32, np.float64, np.int32, np.bool_):
            for make in (host_ops.empty, host_ops.zeros):
                a = make(shape, dtype)
                assert a.shape == np.empty(shape).shape and a.dtype == dtype and a.flags.c_contiguous
                assert (a.ctypes.data % 64 == 0 or a.size == 0) and a.flags.writeable
            assert not a.any()


def test_copies_between_the_sides(side):
    a = side.array(np.arange(7.0))
    host = np.zeros(7, side.dtype)
    side.ops.to_host(a, host)
    assert (host == np.arange(7.0)).all()
    side.ops.from_host(host[::-1].copy(), a)
    assert (a == np.arange(7.0)[::-1]).all()
