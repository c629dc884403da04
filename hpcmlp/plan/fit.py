"""Will it fit: what is missing where, and which option makes it fit."""

from collections.abc import Iterator
from dataclasses import replace

from hpcmlp.plan.demand import Memory, memory
from hpcmlp.plan.record import record
from hpcmlp.plan.workload import Workload

MARGIN = 0.05       # of the memory, left for what is not counted: page tables, buffers of files


def needed_bytes(found: Memory, already: tuple[str, ...] = (), ranks: int = 1) -> int:
    """Return the bytes that a node needs at the worst moment, less the parts that its ranks hold already. Local."""
    held = sum(found.rank.get(name, 0) for name in already) * ranks
    return max(0, found.node - held) + found.moment


def shortage(w: Workload, available: int, where: str, process: tuple[float, float, float] | None = None,
             already: tuple[str, ...] = ()) -> str:
    """Return the sentence that says what is missing of the `available` bytes on a node, and a cure; "" when it fits.

    Local. where : names the node in the sentence. already : parts that `available` no longer holds.
    """
    def need(workload: Workload) -> tuple[int, Memory]:
        # Whole layers: the thousands of pieces of a network that will not fit matter little, and take long to record.
        whole = replace(workload, overlap=False)
        found = memory(whole, record(whole), process)
        return needed_bytes(found, already, min(workload.ranks, workload.ranks_per_node)), found

    usable = int(available * (1 - MARGIN))
    needed, found = need(w)
    if needed <= usable:
        return ""
    fitting = []
    for option, changed in _cures(w):
        then, _ = need(changed)
        if then <= usable:
            fitting.append((option, then))
    cure = f"{fitting[0][0]} makes it fit with {_gib(fitting[0][1])}" if fitting else \
        "no single option makes it fit: use smaller --hidden, or several of --accumulate, --memory-limit, more nodes"
    parts = sorted(((size, name) for name, size in found.rank.items() if name not in already), reverse=True)[:2]
    largest = " and ".join(f"{name} {_gib(size)} a rank" for size, name in parts)
    ranks = min(w.ranks, w.ranks_per_node)
    return (f"the network {'-'.join(map(str, w.spec.sizes))} needs {_gib(needed)} on a node with {ranks} "
            f"rank{'s' * (ranks > 1)} ({largest}), and {where} has {_gib(usable)}: {_gib(needed - usable)} are "
            f"missing; {cure}.")


def _cures(w: Workload) -> Iterator[tuple[str, Workload]]:
    """What may make it fit, the cheapest first."""
    if w.full_update and w.ranks > 1:
        yield "leaving out --full-update", replace(w, full_update=False)
    if w.ranks_per_node > 1 and w.sync in ("ring", "native"):
        yield "--sync shared", replace(w, sync="shared")
    for pieces in (2, 4, 8, 16, 64):
        if pieces <= w.local_rows:
            yield f"--accumulate {w.accumulate * pieces}", replace(w, accumulate=w.accumulate * pieces)
    if w.memory_limit is None and w.row_bytes:
        share = w.rows[0] * w.row_bytes // w.workers
        for divisor in (4, 16):
            mib = max(1, share // divisor >> 20)
            yield f"--memory-limit {mib}", replace(w, memory_limit=mib << 20)
    for ranks in (w.ranks_per_node // 2, w.ranks_per_node // 4, 1):
        if 1 <= ranks < min(w.ranks, w.ranks_per_node):
            yield f"{ranks} rank{'s' * (ranks > 1)} on a node", replace(w, ranks_per_node=ranks)
    for more in (2, 4, 8, 16):
        yield f"{more * w.ranks} ranks on as many more nodes", replace(w, ranks=more * w.ranks)
    for divisor in (2, 4, 8, 16, 64):
        if w.global_batch_size // divisor >= w.ranks:
            yield f"--global-batch-size {w.global_batch_size // divisor}", \
                replace(w, global_batch_size=w.global_batch_size // divisor)


def _gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
