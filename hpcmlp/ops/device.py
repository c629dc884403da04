"""The device side of the arithmetic contract: the plain form over CuPy arrays, with the copies to and from the host."""

import importlib
import os
from typing import Any

import numpy as np

from hpcmlp.errors import Unavailable
from hpcmlp.ops.device_sums import DeviceSums, LateSums
from hpcmlp.ops.plain import PlainOps
from hpcmlp.ops.staging import Direct, Late, Staged


class DeviceOps(PlainOps):
    """The operations on arrays of the module `xp`, which is CuPy except in tests.

    Operations return as soon as they are queued; those that return a number, and `to_host`, wait for the device.
    `identity` is that of the GPU, which no other one of any node has, `number` this process's own.
    """

    fused = False
    plans = True

    def __init__(self, xp: Any, identity: str = "", number: int = 0):
        super().__init__(xp)
        self.identity, self.number = identity, number

    def to_host(self, a, out):
        if hasattr(a, "get"):
            a.get(out=out)
        else:
            out[...] = a

    def from_host(self, a, out):
        if hasattr(out, "set"):
            out.set(a)
        else:
            out[...] = a

    def stage(self, a, host=None):
        return Staged(self.xp, a, host) if hasattr(self.xp, "cuda") else Late(a, host)

    def bring(self, a):
        return None if a is None else self.xp.asarray(a)

    def gather(self, source, rows, out, shift=None, scale=None):
        if isinstance(source, np.ndarray):
            # Samples are kept on the host: pick the rows there, in their own small type, and send only these.
            source = self.xp.asarray(source[rows])
            rows = self.xp.arange(source.shape[0])
        super().gather(source, rows, out, shift, scale)


class DirectOps(DeviceOps):
    """As `DeviceOps`, where MPI sends straight from and into the memory of the device.

    `sums` are the additions of the ring that does it (`ops.device_sums`).
    """

    def __init__(self, xp: Any, identity: str = "", number: int = 0):
        super().__init__(xp, identity, number)
        self.sums = DeviceSums(xp) if hasattr(xp, "cuda") else LateSums()

    def stage(self, a, host=None):
        return Direct(a, host)


def see_gpus() -> list[str]:
    """Return the identities of the GPUs that this process may use, in the order of its own numbers: UUID and PCI bus.

    Local; no context is made on any of them. HPCMLP_GPU=emulated gives one of its own, HPCMLP_GPU=emulated:NAME,...
    those of these names.

    Raises Unavailable when CuPy is not installed, or finds no driver or no GPU.
    """
    emulated, _, names = os.environ.get("HPCMLP_GPU", "").partition(":")
    if emulated == "emulated":
        return names.split(",") if names else [f"{os.uname().nodename} {os.getpid()}"]
    try:
        runtime = _cupy().cuda.runtime
    except ImportError as error:
        raise Unavailable(
            f"--device gpu needs CuPy, which cannot be imported ({error}); install the extra cuda12x or cuda13x, "
            "or run with --device cpu"
        ) from error
    try:
        seen = identities(runtime)
    except runtime.CUDARuntimeError as error:
        raise Unavailable(
            f"--device gpu finds no usable CUDA driver on this node ({error}); run on a node with a GPU, "
            "or with --device cpu"
        ) from error
    if not seen:
        raise Unavailable("--device gpu finds no GPU that this process may use; ask for one, or run with --device cpu")
    return seen


def _cupy() -> Any:
    return importlib.import_module("cupy")


def identities(runtime: Any) -> list[str]:
    """Return UUID and PCI bus of every GPU that `cupy.cuda.runtime` sees. Local.

    The UUID tells parts of one GPU apart, the bus GPUs whose UUIDs end early: a zero byte may end CuPy's copy.
    """
    seen = []
    for number in range(runtime.getDeviceCount()):
        uuid = runtime.getDeviceProperties(number).get("uuid", b"")
        seen.append(f"{uuid.hex() if isinstance(uuid, bytes) else uuid} {runtime.deviceGetPCIBusId(number)}")
    return seen


def open_device(number: int, identity: str) -> DeviceOps:
    """Take the GPU of this number, of this process's own ones from `see_gpus`, and return its operations. Local."""
    if os.environ.get("HPCMLP_GPU", "").startswith("emulated"):
        return DeviceOps(np, identity, number)     # for tests: everything but the GPU itself
    cupy = _cupy()
    cupy.cuda.Device(number).use()
    return DeviceOps(cupy, identity, number)
