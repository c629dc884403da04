"""Vector reductions, checksums and the optimizer kernels on every side."""

import math

import numpy as np
import pytest

from hpcmlp.ops.blocked import BLOCK
from hpcmlp.ops.plain import PlainOps

LENGTHS = [0, 1, 7, 31, 1009, BLOCK + 3]
STATE = {"sgd": 1, "adam": 2, "rmsprop": 2, "adagrad": 1}


def take_step(ops, kernel, p, g, state, o, step, grad_scale=1.0):
    """One step of a kernel with PyTorch's names and defaults of the options."""
    decay = o.get("weight_decay", 0.01 if o.get("decoupled") else 0.0)
    if kernel == "sgd":
        momentum = o.get("momentum", 0.0)
        buf = state[0] if momentum else None
        rest = o.get("dampening", 0.0), o.get("nesterov", False), decay, grad_scale, step == 1
        ops.sgd(p, g, buf, o["lr"], momentum, *rest)
    elif kernel == "adam":
        betas = o.get("betas", (0.9, 0.999))
        ops.adam(
            p, g, *state, o["lr"], *betas, o.get("eps", 1e-8), decay, o.get("decoupled", False), step, grad_scale
        )
    elif kernel == "rmsprop":
        momentum = o.get("momentum", 0.0)
        buf = state[1] if momentum else None
        ops.rmsprop(p, g, state[0], buf, o["lr"], o.get("alpha", 0.99), o.get("eps", 1e-8), momentum, decay, grad_scale)
    else:
        ops.adagrad(p, g, *state, o["lr"], o.get("eps", 1e-10), o.get("lr_decay", 0.0), decay, step, grad_scale)


def options_of(case):
    """Kernel and options of a stored case."""
    kernel, kind, options = case
    return kernel, {**options, "decoupled": kind == "AdamW"}


@pytest.mark.parametrize("copies, grad_scale", [(1, 1.0), (1 + BLOCK // 31, 1.0), (1, 0.25)])
def test_trajectories_are_those_of_pytorch(side, oracle, copies, grad_scale):
    precision = side.dtype.name
    for name, case in oracle["cases"]["optimizers"].items():
        kernel, options = options_of(case)
        p = side.array(np.tile(oracle["optimizer/p"], copies))
        state = [side.array(np.zeros(p.size)) for _ in range(STATE[kernel])]
        for step, gradient in enumerate(oracle["optimizer/g"], 1):
            g = side.array(np.tile(gradient / grad_scale, copies))
            before = g.copy()
            take_step(side.ops, kernel, p, g, state, options, step, grad_scale)
            assert (g == before).all(), name
            wanted = np.tile(oracle[f"optimizer/{name}/{precision}"][step - 1], copies)
            np.testing.assert_allclose(p, wanted, rtol=0, atol=1e-13 if side.exact else 3e-7, err_msg=name)
            side.check(p, wanted)


def test_kernels_agree_with_plain_float64(side, oracle, rng):
    for length in LENGTHS:
        for name, case in oracle["cases"]["optimizers"].items():
            kernel, options = options_of(case)
            ours = [side.array(array) for array in (rng.normal(size=length), *np.zeros((STATE[kernel], length)))]
            plain = [array.astype(np.float64) for array in ours]
            for step in range(1, 4):
                g = side.array(rng.normal(size=length))
                take_step(side.ops, kernel, ours[0], g, ours[1:], options, step, 0.5)
                take_step(PlainOps(), kernel, plain[0], g.astype(np.float64), plain[1:], options, step, 0.5)
            for found, wanted in zip(ours, plain, strict=True):
                side.check(found, wanted, 2)
                assert np.isfinite(found).all(), name


def test_adam_direction_is_the_step_of_adam_plus_decay(side, rng):
    for length in LENGTHS:
        p, m, v, u = (side.array(array) for array in (rng.normal(size=length), *np.zeros((3, length))))
        q, m2, v2 = p.astype(np.float64), np.zeros(length), np.zeros(length)
        for step in (1, 2, 3):
            g = side.array(rng.normal(size=length))
            before = q.copy()
            side.ops.adam_direction(p, g, m, v, u, 0.9, 0.99, 1e-6, 0.0, step, 0.5)
            PlainOps().adam(q, g.astype(np.float64), m2, v2, 1.0, 0.9, 0.99, 1e-6, 0.0, False, step, 0.5)
            side.check(u, before - q, 10)
            side.ops.adam_direction(p, g, m.copy(), v.copy(), u, 0.9, 0.99, 1e-6, 0.0, step, 0.5)
            without = u.copy()
            side.ops.adam_direction(p, g, m.copy(), v.copy(), u, 0.9, 0.99, 1e-6, 0.5, step, 0.5)
            side.check(u - without, 0.5 * p)


def test_simple_vector_operations(side, rng):
    for length in LENGTHS:
        a, b, out = (side.array(rng.normal(size=length)) for _ in range(3))
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        side.ops.add(a, b, out)
        side.check(out, a64 + b64)
        side.ops.add(out, b, out)
        side.check(out, a64 + 2 * b64)
        e = side.array(a)
        side.ops.ema(e, b, 0.75)
        side.check(e, 0.75 * a64 + 0.25 * b64)
        side.ops.add_scaled(a, b, -0.5)
        side.check(a, a64 - 0.5 * b64)
        side.ops.scale(b, 0.3)
        side.check(b, 0.3 * b64)


def test_sum_of_squares_is_accumulated_in_float64(side, rng):
    for length in LENGTHS:
        g = side.array(rng.normal(size=length) * 1e-3 + 1.0)
        wanted = math.fsum(float(value) ** 2 for value in g)
        found = side.ops.sum_squares(g)
        assert type(found) is float and found == pytest.approx(wanted, rel=1e-12)


def test_sum_of_squares_does_not_overflow(side):
    g = side.array(np.full(100, 1e30))
    assert side.ops.sum_squares(g) == pytest.approx(1e62, rel=1e-6)


def test_finite_finds_every_inf_and_nan(side):
    for length in LENGTHS:
        g = side.array(np.full(length, 1e30))  # the squares overflow in float32
        with np.errstate(over="ignore"):
            assert side.ops.finite(g) is True
            for at in {0, length // 2, length - 1} if length else ():
                for bad in (np.inf, -np.inf, np.nan):
                    g[at] = bad
                    assert side.ops.finite(g) is False
                    g[at] = 1e30


def test_checksum_is_one_number_on_every_side(side, rng):
    for length in LENGTHS:
        p = side.array(rng.normal(size=length))
        wanted = PlainOps().checksum(p)
        found = side.ops.checksum(p)
        assert type(found) is int and 0 <= found < 2**53 and found == wanted


def test_checksum_sees_every_bit_and_every_place(side, rng):
    p = side.array(rng.normal(size=5000))
    seen = {side.ops.checksum(p)}
    for at in (0, 1, 2500, 4999):
        for bit in range(32):
            p.view(np.uint32)[at] ^= np.uint32(1 << bit)
            seen.add(side.ops.checksum(p))
            p.view(np.uint32)[at] ^= np.uint32(1 << bit)
    seen.add(side.ops.checksum(p[::-1].copy()))
    seen.add(side.ops.checksum(np.roll(p, 1)))
    seen.add(side.ops.checksum(np.append(p, p.dtype.type(0))))
    assert len(seen) == 1 + 4 * 32 + 3


def test_nan_goes_through_every_kernel(side, oracle):
    for name, case in oracle["cases"]["optimizers"].items():
        kernel, options = options_of(case)
        for length, at in ((1, 0), (37, 36), (37, 4)):
            p = side.array(np.ones(length))
            g = side.array(np.ones(length))
            g[at] = np.nan
            state = [side.array(np.zeros(length)) for _ in range(STATE[kernel])]
            take_step(side.ops, kernel, p, g, state, options, 1)
            assert (np.isnan(p) == np.isnan(g)).all(), name
