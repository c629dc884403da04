"""Opening a GPU: the sentence for each way in which it can be missing, and which GPU a rank takes."""

import types

import numpy as np
import pytest

from hpcmlp.errors import Unavailable
from hpcmlp.ops import device, open_ops
from hpcmlp.ops.device import DeviceOps


class DriverError(RuntimeError):
    """Stands in for cupy.cuda.runtime.CUDARuntimeError."""


def fake_cupy(monkeypatch, count):
    """Put a CuPy with `count` devices (an exception is raised) in place; returns the list of devices used."""
    used = []

    def get_device_count():
        if isinstance(count, Exception):
            raise count
        return count

    runtime = types.SimpleNamespace(getDeviceCount=get_device_count, CUDARuntimeError=DriverError,
                                    getDeviceProperties=lambda number: {"uuid": b"\x0a\x0b"},
                                    deviceGetPCIBusId=lambda number: f"bus {number}")
    made = types.SimpleNamespace(use=None)

    def make_device(index):
        made.use = lambda: used.append(index)
        return made

    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime, Device=make_device))
    monkeypatch.setattr(device.importlib, "import_module", lambda name: cupy)
    return used


def refuse(name):
    """An import that fails as it does without CuPy."""
    raise ImportError("No module named 'cupy'")


def test_without_cupy_the_sentence_names_the_extra(monkeypatch):
    monkeypatch.setattr(device.importlib, "import_module", refuse)
    with pytest.raises(Unavailable, match="needs CuPy.*cuda12x.*--device cpu") as caught:
        open_ops("gpu")
    assert caught.value.code == 69


@pytest.mark.parametrize("count, text", [(DriverError("insufficient driver"), "insufficient driver"), (0, "no GPU")])
def test_without_a_driver_or_a_gpu_the_sentence_says_so(monkeypatch, count, text):
    fake_cupy(monkeypatch, count)
    with pytest.raises(Unavailable, match=text):
        device.see_gpus()


def test_the_gpu_of_a_number_is_used_and_known_by_its_uuid_and_bus(monkeypatch):
    used = fake_cupy(monkeypatch, 3)
    seen = device.see_gpus()
    assert seen == ["0a0b bus 0", "0a0b bus 1", "0a0b bus 2"]   # UUIDs that a zero byte has cut
    ops = device.open_device(2, seen[2])
    assert isinstance(ops, DeviceOps) and ops.identity == seen[2] and used == [2]


def test_emulated_gpus_are_of_ones_own_or_of_the_names_given(monkeypatch):
    monkeypatch.setenv("HPCMLP_GPU", "emulated:a,b")
    assert device.see_gpus() == ["a", "b"] and device.open_device(1, "b").identity == "b"
    monkeypatch.setenv("HPCMLP_GPU", "emulated")
    assert len(device.see_gpus()) == 1


def test_copies_use_the_arrays_own_transfers():
    class Device:
        """An array that records its transfers."""

        def get(self, out):
            out[...] = 5

        def set(self, a):
            self.value = a.copy()

    ops, there, here = DeviceOps(np), Device(), np.zeros(3, np.float32)
    ops.to_host(there, here)
    assert (here == 5).all()
    ops.from_host(here, there)
    assert (there.value == 5).all()
