"""Arithmetic on preallocated arrays: one contract, a NumPy side (host) and a CuPy side (device)."""

from typing import Any

from hpcmlp.errors import Unavailable
from hpcmlp.ops.host import HostOps
from hpcmlp.ops.plain import PlainOps


def open_ops(device: str) -> PlainOps:
    """Return the arithmetic for `device`: "cpu", or "gpu" (the first one that this process sees).

    Local: several ranks choose their GPUs together, see `run.gpus`. Raises Unavailable when there is no such device.
    """
    if device == "cpu":
        return HostOps()
    from hpcmlp.ops.device import open_device, see_gpus  # pulls in CuPy, which only a GPU run pays for
    return open_device(0, see_gpus()[0])


def open_planned(ops: PlainOps) -> Any:
    """Return the device that runs planned launches, for operations from `open_ops` with "gpu".

    Local. Raises Unavailable where cuBLASLt is not there.
    """
    if ops.xp.__name__ == "numpy":
        from hpcmlp.ops.emulated import EmulatedDevice
        return EmulatedDevice()
    from hpcmlp.ops.gpu_device import GpuDevice
    try:
        return GpuDevice(ops.xp)
    except OSError as error:
        raise Unavailable(f"--device gpu needs cuBLASLt, which cannot be loaded ({error}); install the CUDA libraries "
                          "that CuPy's [ctk] extra names, or run with --device cpu.") from error
