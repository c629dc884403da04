"""What this process holds of the node's memory, as the kernel counts it."""


def held_bytes() -> tuple[int, int]:
    """Return the bytes that this process holds: its own, and of files that it has mapped; 0 where nobody tells.

    Local. A page of memory that k processes share counts as 1/k in each, so that the sum over a node's ranks is what
    they hold. Files are the code of programs and libraries, which a node holds once, so that over its ranks the most
    counts, not the sum. The kernel would share them out, too, but among all that run on the machine: another user's
    processes, or the ranks of what is another node to MPI only. What has been freed and the allocator has kept for
    later is given back first.
    """
    trim()
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            share = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in file if line.startswith("Pss")}
        with open("/proc/self/status", encoding="ascii") as file:
            files = next(1024 * int(line.split()[1]) for line in file if line.startswith("RssFile:"))
        return share["Pss"] - share["Pss_File"], files
    except (OSError, KeyError, StopIteration):
        return 0, 0


def trim() -> None:
    """Let the C library give freed memory back to the system, where it can. Local."""
    import ctypes  # at the end of a run, and while a machine is measured
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):   # not glibc
        pass
