"""Going on without ranks that have died, where the MPI library can shrink a communicator (ULFM).

A call that meets a dead rank raises on some survivors only. The first to see it revokes every communicator, so that no
other waits for ever; all survivors then shrink, which all of them leave with the same, smaller communicator. Further
deaths are met by doing it again. No request may be left behind, so the collectives used meanwhile are the library's own
blocking ones. And as few communicators as can be are made: Open MPI 5.0 dereferences a null pointer where it learns of
a death while a communicator that holds the dead rank is being made (`ompi_comm_activate`). (Bland et al. 2013,
"Post-failure recovery of MPI communication capability".)
"""

import os
import sys
from typing import NoReturn

import numpy as np
from mpi4py import MPI

FLAG = "OMPI_MCA_mpi_ft_enable"     # set by mpirun --with-ft ulfm; without it the calls answer, and do nothing
LOST = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)


def can_shrink() -> bool:
    """Return whether this MPI library, as it was started, survives the death of ranks. Local."""
    return MPI.ERR_PROC_FAILED != MPI.ERR_UNKNOWN and os.environ.get(FLAG, "").lower() in ("1", "true", "yes")


def is_loss(error: BaseException, comm: MPI.Intracomm) -> bool:
    """Return whether an exception comes of a rank's death, or of another rank having seen one. Local."""
    if not isinstance(error, MPI.Exception):
        return False
    return error.Get_error_class() in LOST or comm.Is_revoked() or comm.Get_failed().size > 0


def open_comm(world: MPI.Intracomm) -> MPI.Intracomm:
    """Return a communicator of the world's living ranks whose errors are exceptions. Collective over the living."""
    world.Set_errhandler(MPI.ERRORS_RETURN)
    return _shrink(world)


def shrink(comm: MPI.Intracomm, others: tuple[MPI.Intracomm, ...]) -> tuple[MPI.Intracomm, list[int]]:
    """Return a communicator of the survivors, in their order, and the ranks in `comm` that are not among them.

    Collective over the survivors of `comm`. `others` are communicators that survivors may still wait in.
    """
    revoke(*others, comm)
    smaller = _shrink(comm)
    lost = MPI.Group.Difference(comm.group, smaller.group)
    return smaller, MPI.Group.Translate_ranks(lost, list(range(lost.size)), comm.group) if lost.size else []


def revoke(*comms: MPI.Intracomm) -> None:
    """End every wait in these communicators, on all ranks, with an exception. Local."""
    for comm in comms:
        if comm != MPI.COMM_NULL and not comm.Is_revoked():
            comm.Revoke()


def _shrink(comm: MPI.Intracomm) -> MPI.Intracomm:
    while True:
        try:
            smaller = comm.Shrink()
            smaller.Set_errhandler(MPI.ERRORS_RETURN)
            return smaller
        except MPI.Exception:
            continue        # another death: the next try meets it as well


def all_have(comm: MPI.Intracomm, mine: bool) -> bool:
    """Return whether `mine` holds on all ranks, the same on all of them whoever dies; False after a death.

    Collective over the survivors of `comm`, also when it has been revoked.
    """
    try:
        return bool(comm.Agree(int(mine)))
    except MPI.Exception:
        return False


def all_places(comm: MPI.Intracomm, place: int) -> list[int]:
    """Return one integer of every rank. Collective over `comm`."""
    out = np.zeros(comm.size, np.int64)
    comm.Allgather(np.array([place], np.int64), out)
    return out.tolist()


def leave(comm: MPI.Intracomm, code: int) -> NoReturn:
    """End this process with `code` once all survivors have come here. Collective; never returns.

    MPI_Finalize may wait for a dead rank for ever (open-mpi/ompi#11404), so it is not called.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    try:
        comm.Barrier()
    except MPI.Exception:
        pass        # a neighbour has left already, or has died with nothing left to do
    os._exit(code)
