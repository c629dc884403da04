"""Whether MPI sends straight from GPU memory: who claims it, and what a child process finds when it tries.

A claim that is false ends in a crash, so a child process tries first what one process can. What is true inside a
process may be false between nodes, where nothing can be tried whose crash would do no harm under every launcher: there
training sends straight from GPU memory only where that is asked for. What the ranks then receive is looked at once more
before the first step.
"""

import ctypes
import os
import re
from typing import Any

import numpy as np

from hpcmlp.comm.messages import all_gather_bytes, min_in_place
from hpcmlp.run.child import PATIENCE_S, last_line, run_child

MPI_LIBRARY = re.compile(r"/libmpi(?:_abi|ch)?\.so[.\d]*$")
# Settings that ask an MPI library for messages straight from GPU memory.
SETTINGS = {"MPICH_GPU_SUPPORT_ENABLED": "1", "MV2_USE_CUDA": "1", "I_MPI_OFFLOAD": "1", "MPIR_CVAR_ENABLE_GPU": "1",
            "OMPI_MCA_opal_cuda_support": "1"}
PROVEN = "what was sent from GPU memory has arrived"
SIZES = 1, 1024, 1 << 16, 1 << 21      # float32: below and above where libraries change their way
# By requests that are kept, as the ring's.
PROBE = f"""
import cupy
from mpi4py import MPI
comm = MPI.COMM_SELF
for size in {SIZES}:
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


def may_send(comm: Any, num_nodes: int, number: int, asked: bool) -> tuple[bool, str]:
    """Return whether messages may go straight from GPU memory, and a few words on why, or why not.

    Collective over `comm`; the same on all ranks. They may where some rank's MPI claims it, or the user asks for it,
    and a child process of every rank, on its own GPU, has proven it; between nodes only where the user asks. Where
    nobody claims or asks there are no words.

    number : of this rank's GPU, among those that it sees.
    """
    told = all_gather_bytes(comm, ", ".join(claims(mapped_mpi())).encode())
    claimed = next((f"{text.decode()} claims that MPI can" for text in told if text), "")
    if not (claimed or asked):
        return False, ""
    refused = "not straight from GPU memory" + (f", though {claimed}" if claimed else "")
    if num_nodes > 1 and not asked:
        return False, f"{refused}: between nodes only --sync direct tries"
    tried = why_false(f"import cupy\ncupy.cuda.Device({number}).use()\n{PROBE}")
    found = [text.decode() for text in all_gather_bytes(comm, tried.encode())]
    false = [rank for rank, text in enumerate(found) if text]
    if false:
        return False, f"{refused}: tried in a child process of rank {false[0]}, {found[false[0]]}"
    return True, f"{claimed}{', ' if claimed else ''}proven in a child process of every rank"


def why_wrong(ring: Any, device: Any) -> str:
    """Sum numbers in the ranks' GPU memory whose sums are known; return what is wrong with them, "" when nothing is.

    Collective over the ranks of `ring`, which forgets what it has prepared; the same on all ranks.
    """
    size, wrong = ring.size, ""
    for count in SIZES:
        values = np.arange(count, dtype=np.float32) % 1000
        array, found = device.zeros(count, np.float32), np.empty(count, np.float32)
        device.upload(values + np.float32(ring.rank), array)
        ring.all_reduce(array)
        device.download(array, found)
        right = np.array([float(np.array_equal(found, size * values + size * (size - 1) // 2))])
        min_in_place(ring.comm, right)
        if not right[0]:
            wrong = wrong or f"other numbers arrive in a sum of {array.nbytes} bytes"
    ring.forget()
    return wrong
