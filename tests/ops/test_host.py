"""The host side: which path is taken, steady calls that allocate nothing, and C kernels that refuse wrong arrays."""

import gc
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hpcmlp.ops import blocked, host
from hpcmlp.ops.host import HostOps

F = np.float32
needs_fused = pytest.mark.skipif(host._fused is None, reason="the C extension hpcmlp.ops._fused is not built")


def test_the_environment_and_the_argument_choose_the_path(monkeypatch):
    monkeypatch.setenv("HPCMLP_FUSED", "0")
    assert HostOps().fused is False
    monkeypatch.delenv("HPCMLP_FUSED")
    assert HostOps().fused is (host._fused is not None)
    assert HostOps(fused=False).fused is False
    monkeypatch.setattr(host, "_fused", None)
    assert HostOps().fused is False
    with pytest.raises(ImportError, match="not built"):
        HostOps(fused=True)


IN_PLACE = (
    "linear", "linear_backward", "relu forward", "relu backward", "tanh forward", "gather", "sgd", "adam",
    "adam_direction", "rmsprop", "adagrad", "ema", "add", "add_scaled", "scale", "sum_squares", "column_sum",
)


def steady_calls(ops, dtype):
    """Every operation of a training step on arrays of several blocks, as functions without arguments."""
    rng = np.random.default_rng(1)
    n, d, k = 300, 400, 300

    def array(*shape):
        a = ops.empty(shape, dtype)
        a[...] = rng.random(shape)
        return a

    x, w, b, z, out, da = array(n, d), array(k, d), array(k), array(n, k), array(n, k), array(n, k)
    dw, db, mean, rstd, gamma = array(k, d), array(k), array(n), array(n), array(k)
    mask, labels, rows = np.empty((n, k), np.bool_), np.zeros(n, np.int32), np.arange(n)
    source = np.ones((n, d), np.uint8)
    p, g, m, v, u = (array(100_000) for _ in range(5))
    calls = {
        "gather": lambda: ops.gather(source, rows, x, w[0], w[1]),
        "column_sum": lambda: ops.column_sum(da, db),
        "linear": lambda: ops.linear(x, w, b, z),
        "linear_backward": lambda: ops.linear_backward(da, x, w, dw, x),
        "layer_norm": lambda: ops.layer_norm(z, gamma, b, out, mean, rstd),
        "layer_norm_backward": lambda: ops.layer_norm_backward(da, z, gamma, mean, rstd, out, db, gamma),
        "dropout_mask": lambda: ops.dropout_mask(mask, 0.5, 1, 2, 3, 4),
        "dropout": lambda: ops.dropout(z, mask, 0.5, out),
        "cross_entropy": lambda: ops.loss("softmax_cross_entropy", z, labels, None, out, label_smoothing=0.1),
        "mean_squared": lambda: ops.loss("mean_squared", z, da, rstd, out),
        "loss_only": lambda: ops.loss("huber", z, da, None, None),
        "add": lambda: ops.add(p, g, u),
        "add_scaled": lambda: ops.add_scaled(p, g, 1e-3),
        "scale": lambda: ops.scale(u, 0.5),
        "sum_squares": lambda: ops.sum_squares(p),
        "finite": lambda: ops.finite(p),
        "checksum": lambda: ops.checksum(p),
        "sgd": lambda: ops.sgd(p, g, m, 0.1, 0.9, 0.0, True, 0.1, 1.0, False),
        "adam": lambda: ops.adam(p, g, m, v, 0.1, 0.9, 0.999, 1e-8, 0.1, True, 3, 1.0),
        "adam_direction": lambda: ops.adam_direction(p, g, m, v, u, 0.9, 0.999, 1e-8, 0.1, 3, 1.0),
        "rmsprop": lambda: ops.rmsprop(p, g, v, m, 0.1, 0.9, 1e-8, 0.9, 0.1, 1.0),
        "adagrad": lambda: ops.adagrad(p, g, v, 0.1, 1e-8, 0.0, 0.1, 3, 1.0),
        "ema": lambda: ops.ema(u, p, 0.99),
    }
    for kind in ops.ACTIVATIONS:
        pre = z if kind in ops.NEEDS_PRE else None
        calls[f"{kind} forward"] = lambda kind=kind, pre=pre: ops.linear_activation(x, w, b, kind, out, pre)
        calls[f"{kind} backward"] = lambda kind=kind: ops.activation_backward(kind, da, out, z, da, db)
    return calls


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steady_calls_allocate_nothing_that_grows(host_ops, dtype):
    calls = steady_calls(host_ops, dtype)
    for call in calls.values():
        call()
    # NumPy: the temporaries of the plain form on one block of rows, or the cast buffer (8192 elements) of one ufunc
    fused, row_blocks, in_place = 4096, 16 * blocked.ROW_BLOCK * np.dtype(dtype).itemsize, 80_000
    tracemalloc.start()
    try:
        for name, call in calls.items():
            call()      # NumPy keeps small blocks for later arrays: those it takes now are not growth
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            call()
            after, peak = tracemalloc.get_traced_memory()
            limit = in_place if name in IN_PLACE else row_blocks
            limit = fused if host_ops.fused and dtype is np.float32 else limit
            assert peak - before < limit, name
            assert after - before < 1024, name
    finally:
        tracemalloc.stop()


def test_nothing_of_a_call_is_kept_alive(host_ops):
    calls = steady_calls(host_ops, np.float32)
    for call in calls.values():
        call()
    watched = [weakref.ref(cell.cell_contents) for call in calls.values() for cell in call.__closure__
               if isinstance(cell.cell_contents, np.ndarray)]
    del calls, call
    gc.collect()
    assert watched and not any(ref() is not None for ref in watched)


@needs_fused
def test_strided_rows_are_accepted_where_they_are_meant(rng):
    wide = [rng.normal(size=(9, 48)).astype(F) for _ in range(3)]
    z, da, labels = wide[0][:, :33], wide[1][:, :33], rng.integers(0, 33, 9).astype(np.int32)
    fused, plain = HostOps(fused=True), HostOps(fused=False)
    results = []
    for ops in (fused, plain):
        out, dz, db = np.zeros((9, 48), F)[:, :33], np.zeros((9, 40), F)[:, :33], np.zeros(33, F)
        dlogits, norm = np.zeros((9, 40), F)[:, :33], np.zeros((9, 40), F)[:, :33]
        ops.activation("tanh", z, out)
        ops.activation_backward("tanh", da, out, None, dz, db)
        sums = ops.loss("softmax_cross_entropy", z, labels, None, dlogits, label_smoothing=0.1)
        ops.layer_norm(z, db, db, norm, np.zeros(9, F), np.zeros(9, F))
        results.append((out, dz, db, dlogits, norm, np.array(sums)))
        for view in (out, dz, dlogits, norm):
            assert (view.base[:, 33:] == 0).all()
    for found, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def wrong_calls():
    """Calls of the C kernels that must raise: wrong type, shape, order, mutability, kind or count."""
    m, v = np.zeros((4, 6), F), np.zeros(6, F)
    frozen = np.zeros((4, 6), F)
    frozen.flags.writeable = False
    swapped = np.zeros((4, 6), ">f4")
    unaligned = np.zeros(25 * 4, np.uint8)[1:97].view(F).reshape(4, 6)
    labels = np.zeros(4, np.int32)
    return {
        "float64": lambda c: c.bias_activation(1, m.astype(np.float64), v, m),
        "big-endian": lambda c: c.bias_activation(1, swapped, v, m),
        "integers": lambda c: c.bias_activation(1, m.astype(np.int32), v, m),
        "list": lambda c: c.bias_activation(1, [[1.0]], v, m),
        "shape": lambda c: c.bias_activation(1, m, v, np.zeros((4, 5), F)),
        "bias length": lambda c: c.bias_activation(1, m, v[:5], m),
        "dimensions": lambda c: c.bias_activation(1, v, v, v),
        "columns apart": lambda c: c.bias_activation(1, np.zeros((6, 4), F).T, v, m),
        "rows backwards": lambda c: c.bias_activation(1, m[::-1], v, m),
        "rows repeated": lambda c: c.column_sum(np.broadcast_to(v, (4, 6)), v),
        "read-only": lambda c: c.bias_activation(1, m, v, frozen),
        "unaligned": lambda c: c.bias_activation(1, unaligned, v, m),
        "kind": lambda c: c.bias_activation(10, m, v, m),
        "negative kind": lambda c: c.bias_activation(-1, m, v, m),
        "kind type": lambda c: c.bias_activation("relu", m, v, m),
        "none": lambda c: c.bias_activation(1, m, v, None),
        "count": lambda c: c.bias_activation(1, m, v),
        "number": lambda c: c.ema(v, v, "x"),
        "backward shape": lambda c: c.activation_backward(1, m, m[:3], m, None),
        "sum length": lambda c: c.column_sum(m, v[:5]),
        "labels type": lambda c: c.cross_entropy(m, labels.astype(np.int64), None, m, 0.0, None),
        "labels length": lambda c: c.cross_entropy(m, labels[:3], None, m, 0.0, None),
        "label": lambda c: c.cross_entropy(m, labels - 1, None, m, 0.0, None),
        "class weights": lambda c: c.cross_entropy(m, labels, None, m, 0.0, v[:5]),
        "weights": lambda c: c.mean_loss(1, m, m, v, m, 1.0),
        "loss rows apart": lambda c: c.mean_loss(1, np.zeros((4, 7), F)[:, :6], m, None, m, 1.0),
        "norm": lambda c: c.layer_norm(m, v, v, m, v, v, 1e-5),
        "norm backward": lambda c: c.layer_norm_backward(m, m, v, v[:4], v[:4], m, v, v[:4]),
        "mask type": lambda c: c.dropout_mask(m, 1, 1, 1),
        "mask shape": lambda c: c.dropout(m, np.zeros((4, 5), bool), 2.0, m),
        "mask key": lambda c: c.dropout_mask(np.zeros((4, 6), bool), 1, -1, 1),
        "rows type": lambda c: c.gather(m, labels, m, None, None),
        "rows length": lambda c: c.gather(m, np.zeros(3, np.int64), m, None, None),
        "source width": lambda c: c.gather(m[:, :5], np.zeros(4, np.int64), m, None, None),
        "shift": lambda c: c.gather(m, np.zeros(4, np.int64), m, v[:5], None),
        "vector length": lambda c: c.adam(v, v[:5], v, v, *[0.0] * 9),
        "vector stride": lambda c: c.ema(v[::2], v[:3], 0.5),
        "state": lambda c: c.sgd(v, v, v[:5], *[0.1] * 3, 0, 0.0, 1.0),
        "sum of nothing": lambda c: c.sum_arrays((v,), ()),
        "sum of a list": lambda c: c.sum_arrays([v], (v,)),
        "sum lengths": lambda c: c.sum_arrays((v,), (v, v[:5])),
        "sum types": lambda c: c.sum_arrays((v,), (v, np.zeros(6))),
        "sum stride": lambda c: c.sum_arrays((v,), (np.zeros(12, F)[::2],)),
        "sum of rows": lambda c: c.sum_arrays((m,), (m,)),
        "sum into read-only": lambda c: c.sum_arrays((np.frombuffer(bytes(24), F),), (v,)),
        "meeting of another width": lambda c: c.meet(np.zeros((1, 8), np.uint32), 0, 1, 0),
        "meeting rank": lambda c: c.meet(np.zeros((2, 16), np.uint32), 2, 1, 0),
        "meeting type": lambda c: c.meet(np.zeros((1, 16), np.int32), 0, 1, 0),
    }


@needs_fused
@pytest.mark.parametrize("name", wrong_calls())
def test_kernels_refuse_what_does_not_fit(name):
    with pytest.raises((ValueError, TypeError, IndexError, BufferError, OverflowError)):
        wrong_calls()[name](host._fused)


@needs_fused
@pytest.mark.parametrize("dtype", [F, np.float64])
@pytest.mark.parametrize("sources", [1, 2, 3, 5])
def test_sums_of_arrays_reach_every_target_in_the_order_of_the_sources(dtype, sources):
    random = np.random.default_rng(sources)
    for size in (0, 1, 2047, 2048, 2049, 40_000):
        arrays = tuple((random.standard_normal(size) * 10.0 ** random.integers(-6, 7, size)).astype(dtype)
                       for _ in range(sources))
        expected = np.zeros(size, dtype)
        for array in arrays:
            expected = expected + array     # 0 + x is x: the order is that of the sources
        apart = np.full(size, 7, dtype)
        host._fused.sum_arrays((apart,), arrays)
        np.testing.assert_array_equal(apart, expected)
        host._fused.sum_arrays(arrays, arrays)      # in place, into all of them
        for array in arrays:
            np.testing.assert_array_equal(array, expected)


@needs_fused
def test_a_refused_call_releases_its_buffers():
    a = np.zeros(8, F)
    for _ in range(3):
        with pytest.raises(ValueError):
            host._fused.adam(a, a, a, a[:3], *[0.0] * 9)
    a.resize(16, refcheck=True)  # raises while a buffer is held


@needs_fused
def test_denormals_are_flushed_inside_the_kernels_alone():
    small = np.full(4, 1e-40, F)
    HostOps(fused=True).ema(small, np.zeros(4, F), 0.5)
    assert (small == 0).all()
    assert (np.full(4, 1e-40, F) * F(0.5) > 0).all()


@needs_fused
def test_many_threads_may_call_at_once():
    ops = HostOps(fused=True)
    arrays = [np.full(300_000, i, F) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ops.sum_squares, arrays)) == [300_000.0 * i * i for i in range(4)]
