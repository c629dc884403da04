"""Activations and their derivatives against PyTorch, finite differences and the C library's erf."""

import math

import numpy as np
import pytest

from hpcmlp.ops import activations
from hpcmlp.ops.plain import PlainOps

KINDS = activations.KINDS
SHAPES = [(0, 3), (1, 1), (5, 7), (64, 300), (131, 10), (33, 1100), (2, 9001)]


def outputs(side, kind, z, da, b=None):
    """out, pre and the gradients of one layer's activation on one side, in place where the network does so."""
    pre, out = side.array(z), side.out(*z.shape)
    side.ops.activation(kind, pre, out)
    dz, db = side.array(da), side.out(z.shape[1])
    needs_pre = kind in side.ops.NEEDS_PRE
    side.ops.activation_backward(kind, dz, None if needs_pre else out, pre if needs_pre else None, dz, db)
    return out, dz, db


def test_erf_is_exact_to_rounding():
    x = np.concatenate([np.linspace(-7, 7, 4001), [0.0, 0.46875, 4.0, 1e300, -1e300, np.inf, -np.inf]])
    wanted = np.array([math.erf(value) for value in x])
    assert np.abs(activations.erf(np, x) - wanted).max() < 4e-16
    tiny = np.geomspace(1e-300, 1e-3, 50)
    np.testing.assert_allclose(activations.erf(np, tiny), [math.erf(value) for value in tiny], rtol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_derivatives_are_those_of_pytorch(side, kind, oracle):
    z, da = oracle["activation/pre"][None, :], oracle["activation/da"][None, :]
    out, dz, _ = outputs(side, kind, z, da)
    side.check(out, oracle[f"activation/{kind}/out"][None, :])
    side.check(dz, oracle[f"activation/{kind}/dz"][None, :], 10 if kind == "softplus" else 1)  # it is linear above 20


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_agree_with_finite_differences(exact_side, kind, rng):
    z, da, h = rng.normal(size=(9, 11)) * 2, rng.normal(size=(9, 11)), 1e-6
    _, dz, db = outputs(exact_side, kind, z, da)
    above, below = outputs(exact_side, kind, z + h, da)[0], outputs(exact_side, kind, z - h, da)[0]
    slope = da * (above - below) / (2 * h)
    np.testing.assert_allclose(dz, slope, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(db, slope.sum(axis=0), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_side_agrees_with_plain_float64(side, kind, rng):
    for shape in SHAPES:
        z = side.array(rng.normal(size=shape) * 3).astype(np.float64)
        da = side.array(rng.normal(size=shape)).astype(np.float64)
        plain, wanted, wanted_dz, wanted_db = PlainOps(), *np.empty((2, *shape)), np.empty(shape[1])
        plain.activation(kind, z, wanted)
        plain.activation_backward(kind, da, wanted, z, wanted_dz, wanted_db)
        out, dz, db = outputs(side, kind, z, da)
        side.check(out, wanted)
        side.check(dz, wanted_dz)
        side.check(db, wanted_db, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_may_be_the_input(side, kind, rng):
    z = rng.normal(size=(6, 33)) * 2
    apart = outputs(side, kind, z, z)[0]
    same = side.array(z)
    side.ops.activation(kind, same, same)
    assert (same == apart).all()


@pytest.mark.parametrize("kind", KINDS)
def test_large_arguments_give_no_nan_and_no_warning(side, kind):
    z = np.array([[-1e30, -1e4, -104.0, -88.8, 88.8, 104.0, 1e4, 1e30]])
    out, dz, _ = outputs(side, kind, z, np.ones_like(z))
    assert np.isfinite(out).all() and np.isfinite(dz).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_goes_through(side, kind):
    with np.errstate(invalid="ignore"):
        for width, at in ((1, 0), (5, 2), (40, 0), (40, 39), (600, 555)):
            z = np.ones((3, width))
            z[1, at] = np.nan
            out, dz, db = outputs(side, kind, z, np.ones_like(z))
            assert (np.isnan(out) == np.isnan(z)).all()
            # the slope of these kinds is a choice between constants: a NaN takes 1, as in PyTorch
            assert np.isnan(dz[1, at]) or kind in ("identity", "relu", "leaky_relu")
            _, dz, db = outputs(side, kind, np.ones_like(z), z)
            assert (np.isnan(dz) == np.isnan(z)).all() and np.isnan(db[at])
