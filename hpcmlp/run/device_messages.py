"""Whether MPI sends straight from GPU memory: who claims it, and what a child process finds when it tries.

A claim that is false ends in a crash, and one that is true inside a process may be false between nodes, where nothing
can be tried whose crash would do no harm under every launcher. So `doctor` tries what one process can, and training
goes through the memory of the host.
"""

import ctypes
import os
import re

from hpcmlp.run.child import PATIENCE_S, last_line, run_child

MPI_LIBRARY = re.compile(r"/libmpi(?:_abi|ch)?\.so[.\d]*$")
# Settings that ask an MPI library for messages straight from GPU memory.
SETTINGS = {"MPICH_GPU_SUPPORT_ENABLED": "1", "MV2_USE_CUDA": "1", "I_MPI_OFFLOAD": "1", "MPIR_CVAR_ENABLE_GPU": "1",
            "OMPI_MCA_opal_cuda_support": "1"}
PROVEN = "what was sent from GPU memory has arrived"
# Of sizes below and above those where libraries change their way; by requests that are kept, as the ring's.
PROBE = f"""
import cupy
from mpi4py import MPI
comm = MPI.COMM_SELF
for size in (1, 1024, 1 << 16, 1 << 21):
    a, b = cupy.arange(size, dtype="f4"), cupy.zeros(size, dtype="f4")
    cupy.cuda.runtime.deviceSynchronize()
    receive, send = comm.Recv_init(b, 0, 7), comm.Send_init(a, 0, 7)
    MPI.Prequest.Startall([receive, send])
    MPI.Request.Waitall([receive, send])
    receive.Free(), send.Free()
    cupy.cuda.runtime.deviceSynchronize()
    assert a.get().tobytes() == b.get().tobytes(), f"other numbers arrive in a message of {{4 * size}} bytes"
print({PROVEN!r})
"""


def mapped_mpi() -> list[str]:
    """Return the files of the MPI libraries that this process has loaded. Local."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            paths = {line.split(maxsplit=5)[5].strip() for line in file if ".so" in line and line.count(" ") > 5}
    except OSError:
        return []
    return sorted({os.path.realpath(path) for path in paths if MPI_LIBRARY.search(path)})


def claims(mpi_paths: list[str]) -> list[str]:
    """Return who says that the loaded MPI libraries, of these files, send from GPU memory. Local."""
    said = [f"{name}={value}" for name, value in SETTINGS.items() if os.environ.get(name) == value]
    for path in mpi_paths:
        query = getattr(ctypes.CDLL(path), "MPIX_Query_cuda_support", None)
        if query is not None and query() == 1:
            said.append("MPIX_Query_cuda_support")
    return said


def why_false(code: str = PROBE, patience_s: float = PATIENCE_S) -> str:
    """Try messages from GPU memory to itself in a child process; return what is wrong with them, "" when nothing is.

    Local. A crash, a hang, other numbers, and a child that ends well without having come to its end are wrong.
    """
    status, said = run_child(code, patience_s)
    if status == 0 and PROVEN in said.splitlines():
        return ""
    return f"it ends with {status}: {last_line(said)}"
