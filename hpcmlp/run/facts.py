"""What this rank sees of its launcher, libraries, cores, memory, GPUs and file system: the facts that doctor compares.

Plain values only, so that facts travel between ranks as text. Nothing here judges; `run.checkup` does.
"""

import fcntl
import importlib.util
import json
import os
import re
import sys
import tempfile
from typing import Any

from hpcmlp import launch, node_memory
from hpcmlp.run.child import last_line, run_child
from hpcmlp.run.coordinator import versions
from hpcmlp.run.device_messages import claims, mapped_mpi, why_false

MPI_WORDS = ("mpi", "mpt", "hpcx")      # in names of modules: openmpi, mpich, cray-mpich, impi, mvapich2, intelmpi
MPI_ROOTS = ("MPI_HOME", "I_MPI_ROOT", "MPICH_DIR", "OMPI_HOME", "MPI_ROOT", "EBROOTOPENMPI", "OPENMPI_ROOT")
# Run in a child: a driver that is broken may end it.
GPU_PROBE = """
import json
import cupy
from hpcmlp.ops.device import identities
print(json.dumps(identities(cupy.cuda.runtime)))
"""


def local_facts(directory: str) -> dict[str, Any]:
    """Return what can be seen without the other ranks; `directory` is tried for file locks.

    Local, but for children of one process each where there may be GPUs.
    """
    expected, variable = launch.launcher_size(os.environ)
    gpu = gpu_facts()
    return {"host": os.uname().nodename, "expected": expected, "variable": variable, "launcher_rank":
            launch.launcher_rank(), "mpi_paths": mapped_mpi(), "prefix": sys.prefix,
            "mpi_modules": mpi_modules(dict(os.environ)), "versions": versions(),
            "cores": sorted(os.sched_getaffinity(0)), "node_cores": os.cpu_count() or 1, "quota": launch.cpu_quota(),
            "cores_granted": _number(os.environ.get("SLURM_CPUS_PER_TASK")) if "SLURM_STEP_ID" in os.environ else None,
            "threads": next((_number(os.environ[n]) for n in launch.BLAS_VARIABLES if n in os.environ), None),
            "shm_bytes": node_memory.free_bytes(), "lock_error": lock_error(directory),
            "locks_wanted": os.environ.get("HDF5_USE_FILE_LOCKING", "").upper() not in ("FALSE", "0"), "gpu": gpu,
            **device_message_facts(gpu["cupy"] and not gpu["error"])}


def _number(text: str | None) -> int | None:
    first = (text or "").split(",")[0].strip()
    return int(first) if first.isdigit() else None


def mpi_modules(environ: dict[str, str]) -> list[str]:
    """Return what says that the site's MPI is loaded: names of modules, else variables. Local."""
    words = environ.get("LOADEDMODULES", "").split(":")
    found = [word for word in words if any(part in word.lower() for part in MPI_WORDS)]
    return found or [name for name in MPI_ROOTS if environ.get(name)]


def lock_error(directory: str) -> str:
    """Return why a file in `directory` cannot be locked, an empty text where it can. Local."""
    try:
        with tempfile.TemporaryFile(dir=directory, prefix=".hpcmlp-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"{error.strerror or error}"
    return ""


def gpu_facts() -> dict[str, Any]:
    """Return the GPUs of this node that are installed, granted and visible to this rank.

    Local. `ids` are the visible ones' identities in CuPy's order, asked of CuPy in a child process.
    """
    try:
        installed = len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])
    except OSError:
        installed = 0
    granted = _number(os.environ.get("SLURM_GPUS_ON_NODE")) or 0
    facts = {"installed": installed, "granted": granted, "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
             "cupy": importlib.util.find_spec("cupy") is not None, "ids": [], "error": ""}
    if facts["cupy"] and (installed or granted or facts["visible"] is not None):
        code, said = run_child(GPU_PROBE)
        if code == 0:
            facts["ids"] = json.loads(said.splitlines()[-1])
        else:
            facts["error"] = last_line(said)
    return facts


def device_message_facts(can_probe: bool) -> dict[str, Any]:
    """Return who claims that MPI sends from GPU memory, and what a child process found when it tried. Local."""
    said = claims(mapped_mpi())
    facts: dict[str, Any] = {"device_claims": said, "device_probe": None}
    if said and can_probe:
        facts["device_probe"] = why_false()
    return facts
