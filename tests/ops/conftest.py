"""The sides of the arithmetic contract that every test of this folder runs through, and the stored PyTorch values."""

import json
from pathlib import Path

import numpy as np
import pytest

from hpcmlp.ops import host
from hpcmlp.ops.device import DeviceOps
from hpcmlp.ops.host import HostOps
from hpcmlp.ops.plain import PlainOps

SIDES = {
    "plain-float64": (PlainOps, np.float64),
    "plain-float32": (PlainOps, np.float32),
    "numpy-float64": (lambda: HostOps(fused=False), np.float64),
    "numpy-float32": (lambda: HostOps(fused=False), np.float32),
    "fused-float32": (lambda: HostOps(fused=True), np.float32),
    "fused-float64": (lambda: HostOps(fused=True), np.float64),
    "device-float32": (lambda: DeviceOps(np), np.float32),
}


class Side:
    """One implementation with one dtype, and how exact it has to be."""

    def __init__(self, name):
        make, dtype = SIDES[name]
        self.name = name
        self.ops = make()
        self.dtype = np.dtype(dtype)
        self.exact = self.dtype == np.float64
        self.rtol, self.atol = (1e-12, 1e-13) if self.exact else (1e-5, 3e-6)
        self.guarded = []

    def array(self, values):
        """A copy of `values` in this side's dtype, inside a larger buffer and off any 64-byte boundary."""
        values = np.asarray(values)
        dtype = self.dtype if values.dtype.kind == "f" else values.dtype
        buffer = np.full(values.size + 34, 77, dtype)
        inside = buffer[17 : 17 + values.size].reshape(values.shape)
        inside[...] = values
        self.guarded.append(buffer)
        return inside

    def out(self, *shape):
        """An output array of garbage."""
        return self.array(np.full(shape, -55.5))

    def check(self, found, wanted, scale=1.0):
        """The dtype is this side's and the values agree."""
        assert found.dtype == self.dtype
        np.testing.assert_allclose(found, wanted, rtol=self.rtol * scale, atol=self.atol * scale)

    def check_guards(self):
        """Nothing was written beside any array of the test."""
        for buffer in self.guarded:
            assert (buffer[:17] == 77).all() and (buffer[-17:] == 77).all(), "written outside of the array"


def sides(names):
    """Parameters for a fixture; what needs the C extension is skipped without it."""
    built = pytest.mark.skipif(host._fused is None, reason="the C extension hpcmlp.ops._fused is not built")
    return [pytest.param(name, marks=built if name.startswith("fused") else ()) for name in names]


@pytest.fixture(params=sides(SIDES))
def side(request):
    made = Side(request.param)
    yield made
    made.check_guards()


@pytest.fixture(params=sides(name for name in SIDES if name.endswith("64")))
def exact_side(request):
    made = Side(request.param)
    yield made
    made.check_guards()


@pytest.fixture(params=sides(["numpy", "fused"]))
def host_ops(request):
    return HostOps(fused=request.param == "fused")


@pytest.fixture
def rng():
    return np.random.default_rng(20261123)


@pytest.fixture(scope="session")
def oracle():
    with np.load(Path(__file__).parent.parent / "oracle" / "ops.npz") as stored:
        values = dict(stored)
    values["cases"] = json.loads(str(values["cases"]))
    return values
