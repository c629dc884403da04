"""Products of our own beside float64 on the emulated device: epilogues, odd sizes, two in a launch, refusals."""

from dataclasses import replace

import numpy as np
import pytest

from hpcmlp.ops.cublaslt import Product
from hpcmlp.ops.emulated import EmulatedDevice
from hpcmlp.ops.launches import Fork, Join, Kernel, Multiply
from hpcmlp.ops.small_products import TILES, launch_of, together, ways_to_cut

ROWS = (1, 10, 255, 257)
# n, m, k of each form, by rows and two widths, and the epilogues it is used with
FORMS = {
    "forward": (lambda rows, u, v: (rows, v, u), dict(trans_a=True), ("none", "bias", "relu_bias", "relu_aux_bias")),
    "input": (lambda rows, u, v: (rows, u, v), {}, ("none", "drelu")),
    "weight": (lambda rows, u, v: (v, u, rows), dict(trans_b=True), ("none", "bgradb")),
}


def make(form, n, m, k, epilogue, random):
    """A product with random operands whose rows have NaN behind them, and what it has to give in float64."""
    _, transposed, _ = FORMS[form]
    ld = dict(lda=k if "trans_a" in transposed else m, ldb=n if "trans_b" in transposed else k, ldd=m)
    ld = {name: value + 16 for name, value in ld.items()}
    a, b = random.standard_normal((m, k)), random.standard_normal((n, k))
    a, b = a.astype(np.float32), b.astype(np.float32)

    def lay(values, stride):
        out = np.full((len(values), stride), np.nan, np.float32)
        out[:, :values.shape[1]] = values
        return out.ravel()

    p = Product(m, n, k, lay(a if "trans_a" in transposed else a.T, ld["lda"]),
                lay(b.T if "trans_b" in transposed else b, ld["ldb"]), np.full(n * ld["ldd"], 7, np.float32),
                **ld, **transposed, epilogue=epilogue)
    wanted, bias = b.astype(np.float64) @ a.astype(np.float64).T, None
    if "bias" in epilogue:
        bias = random.standard_normal(m).astype(np.float32)
        wanted = wanted + bias
    if "relu_" in epilogue:
        wanted = np.maximum(wanted, 0)
    if epilogue == "drelu":
        gate = random.standard_normal((n, m)).astype(np.float32)
        p, wanted = replace(p, gate=lay(gate, ld["ldd"])), wanted * (gate > 0)
    if epilogue == "bgradb":
        bias = np.full(n, np.nan, np.float32)
    return replace(p, bias=bias), wanted, b.astype(np.float64).sum(1)


def check(p, wanted, sums):
    scale = max(1.0, np.abs(wanted).max())
    d = p.d.reshape(p.n, p.ldd)
    assert np.abs(d[:, :p.m] - wanted).max() < 2e-6 * scale
    assert (d[:, p.m:] == 7).all(), "written behind the end of a row"
    if p.epilogue == "bgradb":
        assert np.abs(p.bias - sums).max() < 1e-5 * max(1.0, np.abs(sums).max())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form, epilogue", [(form, e) for form, (_, _, all_) in FORMS.items() for e in all_])
def test_products_are_those_of_float64(device, form, epilogue, rows):
    random, tiles = np.random.default_rng(rows), set()
    for u, v in ((16, 48), (272, 32)):      # as layers of 10, 33, 257 and 32 are padded
        p, wanted, sums = make(form, *FORMS[form][0](rows, u, v), epilogue, random)
        for way in ways_to_cut(p, device.address):
            p.d[:] = 7
            device.run([launch_of(way)])
            check(p, wanted, sums)
            tiles.add(way.name.split()[2])
            once = p.d.copy()
            device.run([launch_of(way)])
            assert np.array_equal(once, p.d), "bits repeat"
    assert rows <= 16 or len(tiles) == len(TILES)


def test_zero_stays_zero_and_what_is_not_finite_is_seen(device):
    random = np.random.default_rng(0)
    p, _, _ = make("forward", 20, 48, 32, "relu_bias", random)
    p.b[:32 + 16] = np.nan                                          # a row of the batch
    p.a[40 * p.lda:], p.bias[40:] = 0, 0                            # columns 40 .. 47 are padding
    p.a[:] = np.nan_to_num(p.a)
    for way in ways_to_cut(p, device.address):
        device.run([launch_of(way)])
        d = p.d.reshape(p.n, p.ldd)[:, :p.m]
        assert np.isnan(d[0]).all() and not np.isnan(d[1:]).any()
        assert not d[1:, 40:].any()


def test_two_products_share_a_launch_only_where_they_do_not_meet():
    device = EmulatedDevice(makers=("own",))
    random = np.random.default_rng(1)
    weight, wanted_weight, sums = make("weight", 48, 64, 33, "bgradb", random)
    inner, wanted_inner, _ = make("input", 33, 64, 48, "drelu", random)
    first, second = device.multiply(weight, side=True), device.multiply(inner)
    merged = together([Fork(), first, second, Join()], device.address)
    assert len(merged) == 1 and isinstance(merged[0], Kernel)
    device.run(merged)
    check(weight, wanted_weight, sums)
    check(inner, wanted_inner, None)
    once = weight.d.copy(), inner.d.copy()
    device.run([first, second])
    assert np.array_equal(once[0], weight.d) and np.array_equal(once[1], inner.d)
    for chained in (replace(inner, b=weight.d, ldb=weight.ldd), replace(inner, gate=weight.d),
                    replace(inner, d=weight.d), replace(inner, d=weight.b)):
        kept = together([first, device.multiply(chained)], device.address)
        assert len(kept) == 2 and all(isinstance(one, Multiply) for one in kept)


@pytest.mark.parametrize("change", (
    dict(compute="tf32"), dict(m=1 << 12, n=1 << 12, k=1 << 12), dict(k=30), dict(lda=34), dict(trans_b=True),
    dict(a=np.zeros(4096, np.uint16)), dict(a=np.zeros(4097, np.float32)[1:])), ids=lambda change: "-".join(change))
def test_what_the_kernel_cannot_do_or_is_slow_at_is_left_to_the_library(device, change):
    p, _, _ = make("forward", 20, 48, 32, "bias", np.random.default_rng(0))
    assert ways_to_cut(p, device.address)
    p = replace(p, **change)
    assert not ways_to_cut(p, device.address)
    assert device.multiply(p).ways.names == ["library"]


def test_relu_without_the_output_of_its_layer_is_left_to_the_library(device):
    p, _, _ = make("input", 20, 48, 32, "drelu", np.random.default_rng(0))
    assert ways_to_cut(p, device.address) and not ways_to_cut(replace(p, gate=None), device.address)
