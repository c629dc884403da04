"""The device side of the arithmetic contract: the plain form over CuPy arrays, with the copies to and from the host."""

import importlib
import os

import numpy as np

from hpcmlp.errors import Unavailable
from hpcmlp.ops.plain import PlainOps


class DeviceOps(PlainOps):
    """The operations on arrays of the module `xp`, which is CuPy except in tests.

    Operations return as soon as they are queued; those that return a number, and `to_host`, wait for the device.
    """

    fused = False

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


    def bring(self, a):
        return None if a is None else self.xp.asarray(a)

    def gather(self, source, rows, out, shift=None, scale=None):
        if isinstance(source, np.ndarray):
            # Samples are kept on the host: pick the rows there, in their own small type, and send only these.
            source = self.xp.asarray(source[rows])
            rows = self.xp.arange(source.shape[0])
        super().gather(source, rows, out, shift, scale)


def open_device(local_rank: int) -> DeviceOps:
    """Take the GPU for this local rank (ranks beyond the number of GPUs share them) and return its operations.

    Local.

    Raises Unavailable when CuPy is not installed, or finds no driver or no GPU.
    """
    if os.environ.get("HPCMLP_GPU") == "emulated":
        return DeviceOps(np)    # for tests: everything but the GPU itself
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise Unavailable(
            f"--device gpu needs CuPy, which cannot be imported ({error}); install the extra cuda12x or cuda13x, "
            "or run with --device cpu"
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise Unavailable(
            f"--device gpu finds no usable CUDA driver on this node ({error}); run on a node with a GPU, "
            "or with --device cpu"
        ) from error
    if count == 0:
        raise Unavailable("--device gpu finds no GPU that this process may use; ask for one, or run with --device cpu")
    cupy.cuda.Device(local_rank % count).use()
    return DeviceOps(cupy)
