"""What the node's shared memory, /dev/shm, has left, and what ended jobs have left in it.

Standard library only: `launch` asks before MPI starts, because MPICH dies of a bus error inside MPI_Init where
/dev/shm is too small for it.
"""

import os
import time

FOLDER = "/dev/shm"
MPI_FILES = ("mpich_shm_", "mpich_shar_tmp", "ucx_shm_posix_", "sm_segment.", "osc_sm.", "vader_segment.",
             "open_mpi.", "Intel_MPI_", "impi_shm_")


def free_bytes(folder: str = FOLDER) -> int:
    """Return how many bytes can still be written to the shared-memory file system; 0 where none can. Local."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize if writable(folder) else 0


def writable(folder: str = FOLDER) -> bool:
    """Return whether files can be made there at all. Local."""
    return os.access(folder, os.W_OK | os.X_OK)


def advice(folder: str = FOLDER) -> str:
    """Return what to do about too little of it: the end of a sentence, naming what ended jobs left there. Local."""
    if not os.path.isdir(folder):
        return f"there is no {folder}: mount a tmpfs there"
    if not writable(folder):
        return f"{folder} cannot be written: mount it so that it can"
    own, others = leftovers(folder)
    cure = f"make it larger (of a container: --shm-size; else: mount -o remount,size=... {folder})"
    if own:
        cure += (f", or remove your {len(own)} file{'s' * (len(own) > 1)} that no process uses any more "
                 f"({sum(own.values()) / 2**20:.1f} MiB, such as {folder}/{max(own, key=own.get)})")
    if others:
        cure += (f"; other users' MPI files hold {sum(others.values()) / 2**20:.1f} MiB "
                 f"({', '.join(f'uid {uid}' for uid in sorted(others))})")
    return cure


def leftovers(folder: str = FOLDER) -> tuple[dict[str, int], dict[int, int]]:
    """Return the bytes of this user's MPI files that no process maps, by name, and of other users' MPI files, by uid.

    Local. Only processes of this process's pid namespace are seen: report such a file, do not remove it.
    """
    mapped, own, others = _mapped(folder), {}, {}
    for entry in os.scandir(folder):
        if not entry.name.startswith(MPI_FILES) or entry.path in mapped:
            continue
        try:
            stat = entry.stat(follow_symlinks=False)
        except OSError:     # its job has just ended
            continue
        if stat.st_uid == os.getuid():
            own[entry.name] = 512 * stat.st_blocks
        else:
            others[stat.st_uid] = others.get(stat.st_uid, 0) + 512 * stat.st_blocks
    return own, others


def fresh_bytes(prefix: str, seconds: float = 2.0, folder: str = FOLDER) -> int:
    """Return the bytes of the files `prefix`* there that are younger than `seconds`. Local."""
    total = 0
    try:
        for entry in os.scandir(folder):
            if entry.name.startswith(prefix) and time.time() - entry.stat().st_mtime < seconds:
                total += 512 * entry.stat().st_blocks
    except OSError:     # no folder, or a file that has just gone
        pass
    return total


def drop_names(prefix: str, folder: str = FOLDER) -> None:
    """Remove the names of the files `prefix`* that this process maps; their memory lives until it is unmapped.

    Local. For when every process that needs a file has mapped it: a job that is killed then leaves nothing.
    """
    for path in _mapped(folder, ("self",)):
        if os.path.basename(path).startswith(prefix):
            try:
                os.unlink(path)
            except OSError:     # another rank of the node was first
                pass


def _mapped(folder: str, pids: tuple[str, ...] | None = None) -> set[str]:
    """Return the files of `folder` that the processes (all that may be looked at) have mapped."""
    found = set()
    for pid in pids or filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
                lines = [line for line in file if f" {folder}/" in line]
        except OSError:
            continue
        found.update(line[line.index(f"{folder}/"):].rstrip("\n") for line in lines)
    return found
