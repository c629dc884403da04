"""What this process holds of the node's memory, as the kernel counts it."""


def pss_bytes() -> int:
    """Return this process's proportional share of memory, bytes; 0 where the kernel does not tell.

    Local. A page that k processes share counts as 1/k in each, so the sum over a node's ranks is what they hold. What
    has been freed and the allocator has kept for later is given back first.
    """
    trim()
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def private_bytes() -> int:
    """Return this process's memory that no other process shares, bytes; 0 where the kernel does not tell. Local."""
    trim()
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            return sum(1024 * int(line.split()[1]) for line in file if line.startswith("Private_"))
    except OSError:
        return 0


def resident_bytes() -> int:
    """Return this process's resident memory, shared pages in full, bytes; 0 where the kernel does not tell. Local."""
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("Rss:"))
    except (OSError, StopIteration):
        return 0


def trim() -> None:
    """Let the C library give freed memory back to the system, where it can. Local."""
    import ctypes  # at the end of a run, and while a machine is measured
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):   # not glibc
        pass
