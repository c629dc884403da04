"""The emulated GPU keeps cuBLASLt's conventions; the kernels compile for real GPUs where a compiler is there."""

import shutil
import subprocess

import numpy as np
import pytest

from hpcmlp.ops.cublaslt import Product
from hpcmlp.ops.emulated import SOURCES, multiply
from hpcmlp.ops.launches import from_bf16, to_bf16

M, N, K, LD = 24, 5, 16, 32


def operands(transposed_a, transposed_b, dtype):
    """Random column-major operands with a leading dimension of LD, and what they hold as (M, K) and (K, N) float64."""
    random = np.random.default_rng(1)

    def matrix(rows, columns):
        values = random.standard_normal((rows, columns)).astype(np.float32)
        buffer = np.full((columns, LD), np.nan, np.float32)     # between columns lies nothing that may be read
        buffer[:, :rows] = values.T
        if dtype == np.uint16:
            return to_bf16(buffer.ravel()), from_bf16(to_bf16(values.ravel())).reshape(values.shape)
        return buffer.ravel(), values

    a, x = matrix(*((K, M) if transposed_a else (M, K)))
    b, y = matrix(*((N, K) if transposed_b else (K, N)))
    return a, b, (x.T if transposed_a else x).astype(np.float64), (y.T if transposed_b else y).astype(np.float64)


@pytest.mark.parametrize("dtype", (np.float32, np.uint16))
@pytest.mark.parametrize("trans_a", (False, True))
@pytest.mark.parametrize("trans_b", (False, True))
def test_products_read_column_major_operands(trans_a, trans_b, dtype):
    a, b, x, y = operands(trans_a, trans_b, dtype)
    d = np.zeros(N * LD, np.float32)
    multiply(Product(M, N, K, a, b, d, LD, LD, LD, trans_a, trans_b))
    assert np.allclose(d.reshape(N, LD)[:, :M].T, x @ y, atol=1e-5)
    assert not d.reshape(N, LD)[:, M:].any()


def test_epilogues_do_what_their_names_say():
    a, b, x, y = operands(False, False, np.float32)
    bias = np.linspace(-1, 1, M).astype(np.float32)
    d, mask = np.zeros(N * LD, np.float32), np.zeros(N * 128 // 8, np.uint8)
    multiply(Product(M, N, K, a, b, d, LD, LD, LD, epilogue="relu_aux_bias", bias=bias, aux=mask, aux_ld=128))
    pre = x @ y + bias[:, None]
    assert np.allclose(d.reshape(N, LD)[:, :M].T, np.maximum(pre, 0), atol=1e-5)
    multiply(Product(M, N, K, a, b, d, LD, LD, LD, epilogue="drelu", aux=mask, aux_ld=128))
    assert np.allclose(d.reshape(N, LD)[:, :M].T, (x @ y) * (pre > 0), atol=1e-5)
    sums = np.zeros(N, np.float32)
    multiply(Product(M, N, K, a, b, d, LD, LD, LD, epilogue="bgradb", bias=sums))
    assert np.allclose(sums, y.sum(axis=0), atol=1e-5)


def test_tf32_keeps_ten_bits_of_the_mantissa():
    a, b, x, y = operands(False, False, np.float32)
    d = np.zeros(N * LD, np.float32)
    multiply(Product(M, N, K, a, b, d, LD, LD, LD, compute="tf32"))
    off = np.abs(d.reshape(N, LD)[:, :M].T - x @ y).max() / np.abs(x @ y).max()
    assert 1e-6 < off < 2.0**-9


def test_bf16_rounds_to_nearest_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -1.00390625, np.inf, np.nan, 3e38], np.float32)
    back = from_bf16(to_bf16(values))
    assert back[:4].tolist() == [1.0, 1.0, 1.015625, -1.0]
    assert np.isposinf(back[4]) and np.isnan(back[5]) and np.isclose(back[6], 3e38, rtol=4e-3)


@pytest.mark.parametrize("target", ("sm_80", "sm_90"))
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile_for_gpus_without_spilling(source, target, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not there: the kernels are compiled for the host only")
    done = subprocess.run(["nvcc", f"-arch={target}", "-cubin", "-Xptxas", "-v", str(SOURCES[source]), "-o",
                           str(tmp_path / "kernels.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line and " 0 bytes spill stores" not in line]
    assert not spills and "warning" not in done.stderr, done.stderr
