"""Arithmetic on preallocated arrays: one contract, a NumPy side (host) and a CuPy side (device)."""

from hpcmlp.ops.host import HostOps
from hpcmlp.ops.plain import PlainOps


def open_ops(device: str, local_rank: int) -> PlainOps:
    """Return the arithmetic for `device`: "cpu", or "gpu" (the GPU for this local rank).

    Local. Raises Unavailable when there is no such device.
    """
    if device == "cpu":
        return HostOps()
    from hpcmlp.ops.device import open_device  # pulls in CuPy, which only a GPU run pays for
    return open_device(local_rank)
