"""Decide BLAS threads, MPI yielding, thread level and launcher size before NumPy and MPI load."""

import os
import platform
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from hpcmlp import node_memory
from hpcmlp.errors import ConfigError, Unavailable

BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
# MPICH, Open MPI, Intel MPI: give the core away while waiting. Right only when ranks outnumber cores: MPICH's costs
# a tenfold latency otherwise.
YIELD_VARIABLES = {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
                   "I_MPI_THREAD_YIELD": "2"}
# PMI_SIZE stands before SLURM: under mpiexec inside an allocation the step variables count the launcher's daemons.
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
# What a launcher tells a rank of its world. Settings of the library stay: of Open MPI's OMPI_MCA_ only those that
# mpirun of Open MPI 4 sets, with which no process of its own can open MPI.
LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_COMM", "OMPI_MCA_ess", "OMPI_MCA_orte", "OMPI_MCA_pmix", "PRTE_", "HYDRA_",
                     "HYDI_", "MPI_LOCAL", "SLURM_")
LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
# What MPI_Init takes of /dev/shm for each rank of a node: 1.05 MB for MPICH's queues, 0.04 for UCX's. With less it
# ends in a bus error (MPICH 5.0.2).
MPICH_BYTES_PER_RANK = 1_100_000
# UCX, under MPICH, takes 4.2 MB more for each rank where they are to be had and crashes where they are so for some
# ranks only (17 to 24 MB free for 3 ranks). MPICH has shared memory of its own, so UCX does without where it is scarce.
UCX_BYTES_PER_RANK, UCX_BYTES = 10_000_000, 30_000_000
M_PERTURB = -6      # of glibc's mallopt
LAUNCHER_PROCESSES = ("hydra_pmi_proxy", "hydra_bstrap_pr", "mpiexec", "mpirun", "orted", "prted", "prterun",
                      "slurmstepd", "palsd", "pmi_proxy")
SLURM_INTERACTIVE_STEPS = ("4294967290", "4294967291")   # the shell of an allocation, the batch script: no ranks


@dataclass(frozen=True)
class World:
    """What `open_world` found and chose; the header of a run prints it."""

    comm: Any               # MPI.COMM_WORLD
    rank: int
    size: int
    cores: frozenset[int]   # cores that this rank may use
    blas_threads: int
    threads_source: str     # why it is this number
    oversubscribed: bool    # more ranks than cores on this node
    library: str            # "MPICH 5.0.2"
    launcher: str           # "mpiexec, 2 ranks (PMI_SIZE)" or "none"
    thread_level: str       # "serialized" or "multiple"


def open_world() -> World:
    """Initialise MPI with the settings that fit this node, and BLAS threads to match the cores.

    Collective over all ranks. Call it once, before anything imports NumPy: the pip wheel's OpenBLAS reads its
    variables at that moment. Variables that the user has set are left alone. `import hpcmlp.launch` and argument
    errors start no MPI; this does.

    Raises ConfigError (78) when the launcher started another number of ranks than MPI sees, or no MPI can be opened;
    Unavailable (69), on the ranks of that node alone and before MPI has started, where /dev/shm is too small for it.
    """
    # Network file systems often have no locks, and shards are written once and then only read.
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
    # h5py asks for this when it is imported, and the standard library would start `uname -p` to answer: on every
    # rank, and after MPI, where a fork is not safe.
    platform.uname().__dict__.setdefault("processor", platform.machine())
    expected, variable = launcher_size(os.environ)
    crowded = _expect_oversubscription(os.environ)
    if crowded:
        for name, value in YIELD_VARIABLES.items():
            os.environ.setdefault(name, value)
    # Our only windows are of node memory; Open MPI's one-sided transport over UCX would only print its failures.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    MPI = _load_mpi()
    if variable.startswith("OMPI") and not _library(MPI).startswith("Open MPI"):
        # MPICH would abort inside MPI_Init with a dozen lines about PMI.
        raise ConfigError(size_mismatch(expected, variable, 1, _library(MPI)))
    if not MPI.Is_initialized():
        if _library(MPI).startswith("MPICH"):
            _fit_node_memory(_local_size(os.environ) or 1)
        _initialise(MPI, MPI.THREAD_MULTIPLE if crowded else MPI.THREAD_SERIALIZED)
    comm = MPI.COMM_WORLD
    if expected is not None and expected != comm.size:
        raise ConfigError(size_mismatch(expected, variable, comm.size, _library(MPI)))
    cores = frozenset(os.sched_getaffinity(0))
    spare, share = _share_of_cores(MPI, comm, cores)
    threads, source = choose_threads(os.environ, share, numpy_loaded="numpy" in sys.modules)
    if "numpy" not in sys.modules:
        for name in BLAS_VARIABLES:
            os.environ.setdefault(name, str(threads))
    levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized",
              MPI.THREAD_MULTIPLE: "multiple"}
    launcher = "none" if expected is None else f"{'srun' if 'SLURM' in variable else 'mpiexec'} ({variable}={expected})"
    return World(comm, comm.rank, comm.size, cores, threads, source, spare < 0, _library(MPI), launcher,
                 levels[MPI.Query_thread()])


def end_unstarted(code: int, say: Any, error: Exception) -> NoReturn:
    """End every rank of the job with `code` before MPI has started on this one; `say(error)` tells why.

    Local: for what only some ranks find. The others wait inside MPI_Init, and MPICH's launcher would let them wait
    although ranks have left, so it is told as MPI_Abort tells it (PMI-1's abort).
    """
    say(error)
    if os.environ.get("PMI_FD", "").isdigit():
        _wait_until_read()
        os.write(int(os.environ["PMI_FD"]), f"cmd=abort exitcode={code}\n".encode())
    os._exit(code)


def end_all(comm: Any, code: int) -> NoReturn:
    """End every rank of the job at once with `code`, after writing out what this rank has printed.

    Local: for the moment when the other ranks cannot be asked any more. Never returns; exit handlers do not run.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):   # a closed pipe must not keep the other ranks waiting
            pass
    if comm is not None and comm.size > 1:
        _wait_until_read()
        comm.Abort(code)
    os._exit(code)


def _wait_until_read(limit_s: float = 1.0) -> None:
    """Wait until the launcher has read what this rank wrote: it may drop the rest of an aborted job's output."""
    import fcntl
    import termios
    import time
    end = time.monotonic() + limit_s
    for descriptor in (1, 2):
        try:
            while time.monotonic() < end and any(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))):
                time.sleep(0.002)
        except OSError:     # a file or a terminal: nothing can be lost
            continue
    time.sleep(0.05)        # read by the node's proxy is not yet passed on


def launcher_size(environ: dict[str, str]) -> tuple[int | None, str]:
    """Return how many ranks the launcher started and the variable that says so, or (None, "").

    Local. SLURM's step counts only inside a step that srun started: a plain `python` in a batch script or in an
    interactive allocation is a serial run there.
    """
    for name in SIZE_VARIABLES:
        value = environ.get(name, "")
        if not value.isdigit():
            continue
        if name.startswith("SLURM"):
            if "SLURM_STEP_ID" not in environ or environ["SLURM_STEP_ID"] in SLURM_INTERACTIVE_STEPS:
                continue
            if "OMPI_COMM_WORLD_RANK" in environ or "PMI_RANK" in environ:
                continue
        return int(value), name
    return None, ""


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a child process that is no rank of this one's world. Local."""
    return {name: value for name, value in environ.items() if not name.startswith(LAUNCHER_PREFIXES)}


def launcher_rank() -> int:
    """Return this process's rank as its launcher has numbered it, 0 without a launcher; starts no MPI.

    Local: for the one who speaks while MPI cannot be asked.
    """
    for name in RANK_VARIABLES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    if launcher_size(os.environ)[1].startswith("SLURM") and os.environ.get("SLURM_PROCID", "").isdigit():
        return int(os.environ["SLURM_PROCID"])
    return 0


def size_mismatch(expected: int, variable: str, size: int, library: str) -> str:
    """Return the sentence for a launcher that does not belong to the MPI library. Local."""
    if "SLURM" in variable:
        cure = "start it with another `srun --mpi=` type (`srun --mpi=list` shows them)"
    else:
        cure = ("start it with the launcher of that library (of an MPI installed by pip: the `mpiexec` beside this "
                f"Python, {os.path.join(os.path.dirname(sys.executable), 'mpiexec')})")
    return (f"The launcher started {expected} ranks ({variable}={expected}) but {library} sees a world of {size}, so "
            f"each rank would run alone: {cure}.")


def choose_threads(environ: dict[str, str], share: float, numpy_loaded: bool = False) -> tuple[int, str]:
    """Return the number of BLAS threads of this rank and the reason.

    Local. `share` is the number of cores that fall to this rank (`_share_of_cores`); a variable that is already set
    wins, in the order in which OpenBLAS looks.
    """
    for name in BLAS_VARIABLES:
        value = environ.get(name, "").split(",")[0].strip()   # OMP_NUM_THREADS may be a list, one per nesting level
        if value.isdigit() and int(value) > 0:
            return int(value), f"{name} is set"
    threads = max(1, int(share + 1e-6))
    if numpy_loaded:
        return threads, "not set: NumPy was loaded before launch.open_world"
    return threads, f"{share:.3g} cores per rank"


def share_of_cores(cores: frozenset[int], holders: list[int]) -> float:
    """Return how many cores fall to a rank that may use `cores`, when `holders[c]` ranks of the node may use core c.

    Local. Right for masks that are disjoint (a launcher that binds), equal (one that does not) and anything between.
    """
    return sum(1.0 / holders[core] for core in cores)


def cpu_quota(root: str = "/sys/fs/cgroup") -> float | None:
    """Return the cores' worth of CPU time that a container may use (cgroup v2, then v1), None when unlimited. Local."""
    try:
        with open(os.path.join(root, "cpu.max"), encoding="utf-8") as file:
            quota, period = file.read().split()[:2]
    except (OSError, ValueError):
        try:
            with open(os.path.join(root, "cpu/cpu.cfs_quota_us"), encoding="utf-8") as file:
                quota = file.read().strip()
            with open(os.path.join(root, "cpu/cpu.cfs_period_us"), encoding="utf-8") as file:
                period = file.read().strip()
        except OSError:
            return None
    if not (quota.isdigit() and period.isdigit()) or int(quota) == 0 or int(period) == 0:
        return None
    return int(quota) / int(period)


def _load_mpi() -> Any:
    """Open the MPI library without initialising it: what it is decides whether it can start at all."""
    import mpi4py
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True
    try:
        with warnings.catch_warnings():
            # mpi4py warns of a suspicious environment; `size_mismatch` says it in one clear sentence.
            warnings.simplefilter("ignore", RuntimeWarning)
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"No MPI library can be opened ({' '.join(str(error).split())}); load the site's MPI module, "
                          "or on a machine without one: pip install 'hpcmlp[mpich]'.") from None
    return MPI


def _initialise(MPI: Any, level: int) -> None:
    """Initialise MPI; under srun's PMI with as little as possible left in freed memory.

    MPICH (5.0.2) hands SLURM a buffer and what lies behind it in memory, run-length coded. Zeros travel as a few
    letters; what freed memory held makes lines long, and once one was too long for SLURM (22.05): "mpi/pmi2: invalid
    client request" in its log, and all ranks wait for ever. So this makes it rarer, no more.
    """
    mallopt = None
    if "PMI_FD" in os.environ and "SLURM_STEP_ID" in os.environ and "MPI_LOCALNRANKS" not in os.environ:
        import ctypes
        libc = ctypes.CDLL(None)
        mallopt = getattr(libc, "mallopt", None) if hasattr(libc, "malloc_trim") else None     # glibc has both
    if mallopt is not None:
        libc.malloc_trim(0)             # free pages go back and come anew as zeros
        mallopt(M_PERTURB, 255)         # and every new piece is filled with the complement of this byte
    MPI.Init_thread(level)
    if mallopt is not None:
        mallopt(M_PERTURB, 0)


def _share_of_cores(MPI: Any, comm: Any, cores: frozenset[int]) -> tuple[float, float]:
    """Return (cores of the node minus ranks of the node, cores that fall to this rank)."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    length = memoryview(bytearray(4)).cast("i")
    length[0] = max(cores) + 1
    node.Allreduce(MPI.IN_PLACE, length, MPI.MAX)
    holders = memoryview(bytearray(4 * length[0])).cast("i")
    for core in cores:
        holders[core] = 1
    node.Allreduce(MPI.IN_PLACE, holders, MPI.SUM)
    available = float(sum(1 for count in holders if count))
    share = share_of_cores(cores, list(holders))
    quota = cpu_quota()
    if quota is not None:
        available = min(available, quota)
        share = min(share, quota / node.size)
    spare = available - node.size
    if node.rank == 0:      # all ranks of the node have mapped it, or they could not have come here
        node_memory.drop_names("mpich_shm_")
    node.Free()
    return spare, share


def _expect_oversubscription(environ: dict[str, str]) -> bool:
    """Guess, before MPI can be asked, whether the ranks of this node outnumber its cores."""
    size = _local_size(environ)
    if size is None:
        return False
    cores = float(len(_launcher_cores()))
    quota = cpu_quota()
    return size > (cores if quota is None else min(cores, quota))


def _local_size(environ: dict[str, str]) -> int | None:
    """Return how many ranks the launcher started on this node, None where it does not say."""
    for name in LOCAL_SIZE_VARIABLES:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    # srun, unless the step holds another launcher's daemons and not the ranks
    if "SLURM_STEP_ID" in environ and environ.get("PMI_SIZE") in (None, environ.get("SLURM_STEP_NUM_TASKS")):
        counts = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        node = int(environ["SLURM_NODEID"]) if environ.get("SLURM_NODEID", "").isdigit() else 0
        return counts[node] if node < len(counts) else None
    return None


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node from SLURM's short form: "3(x2),1" is 3, 3 and 1; nothing for any other. Local."""
    counts = []
    for word in text.split(","):
        count, _, times = word.partition("(x")
        times = times.removesuffix(")") or "1"
        if not (count.isdigit() and times.isdigit()):
            return []
        counts += int(times) * [int(count)]
    return counts


def _fit_node_memory(ranks: int) -> None:
    """Let MPICH do with what shared memory this node has; raise Unavailable when `ranks` ranks could not start.

    Local: the first rank of a node speaks for it.
    """
    free, needed = node_memory.free_bytes(), ranks * MPICH_BYTES_PER_RANK
    if free < UCX_BYTES + ranks * UCX_BYTES_PER_RANK:
        os.environ.setdefault("UCX_TLS", "^sm")
    if free >= needed or any(name.startswith("MPIR_CVAR_CH4_SHM_POSIX_IQUEUE") for name in os.environ):
        return
    free += node_memory.fresh_bytes("mpich_shm_")   # the other ranks of this job may have been quicker
    if free >= needed:
        return
    if next((os.environ[name] for name in LOCAL_RANK_VARIABLES if name in os.environ), "0") != "0":
        import time
        time.sleep(2.0)     # the first ends the job in the meantime
        return
    raise Unavailable(f"{os.uname().nodename}: MPICH needs {needed / 1e6:.1f} MB of shared memory for {ranks} "
                      f"rank{'s' * (ranks > 1)}, and /dev/shm has {free / 1e6:.1f} MB free; {node_memory.advice()}.")


def _launcher_cores() -> set[int]:
    """Return the cores of this process and of its ancestors up to the launcher.

    A launcher that binds leaves each rank a part of its own cores, so our mask alone would look crowded.
    """
    cores = set(os.sched_getaffinity(0))
    pid = os.getppid()
    first = None
    for _ in range(8):
        try:
            above = cores | os.sched_getaffinity(pid)
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:
            break
        first = first or above
        if name in LAUNCHER_PROCESSES:
            return above
        pid = int(rest.split()[1])
        if pid <= 1:
            break
        cores = above
    return first or cores


def _library(MPI: Any) -> str:
    text = MPI.Get_library_version().split("\n")[0].strip("\0 ")
    words = text.replace(",", " ").split()
    if text.startswith("MPICH Version"):
        return f"MPICH {words[-1]}"
    if text.startswith("Open MPI"):
        return f"Open MPI {words[2].lstrip('v')}"
    if text.startswith("Intel(R) MPI Library"):
        return f"Intel MPI {words[3]}"
    return text[:60]
