"""One rank's user error, raised on all ranks alike."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from mpi4py import MPI

from hpcmlp.comm.messages import broadcast_bytes
from hpcmlp.errors import EXIT_CODES, HpcmlpError, RunFailed, of_system


@contextmanager
def agreed(comm: MPI.Intracomm) -> Iterator[None]:
    """Run a body that may fail on some ranks only; a HpcmlpError of any rank is raised on all of them.

    Collective over `comm`, at the end of the body, which must contain no collective call itself. What the file system
    refuses (`errors.of_system`) counts as one. Any other exception passes through: it is our own fault, and the abort
    hook ends the job.
    """
    error = None
    try:
        yield
    except HpcmlpError as caught:
        error = caught
    except OSError as caught:
        error = of_system(caught)
        if error is None:
            raise
    agree(comm, error)


def agree(comm: MPI.Intracomm, error: HpcmlpError | None) -> None:
    """Raise the error of the lowest rank that has one, on every rank, or return on every rank.

    Collective over `comm`: one 8-byte minimum when all is well.
    """
    if error is not None and error.agreed:
        raise error
    first = np.array([comm.rank if error is not None else comm.size], dtype=np.int64)
    comm.Allreduce(MPI.IN_PLACE, first, MPI.MIN)
    if first[0] == comm.size:
        return
    root = int(first[0])
    message = None
    if comm.rank == root:
        where = f"rank {comm.rank} ({MPI.Get_processor_name()}): " if comm.size > 1 else ""
        message = f"{error.code} {where}{error}".encode("utf-8", "backslashreplace")
    code, _, text = broadcast_bytes(comm, message, root).decode().partition(" ")
    raised = EXIT_CODES.get(int(code), RunFailed)(text)
    raised.agreed = True
    raise raised from error


def alike(error: HpcmlpError) -> HpcmlpError:
    """Mark an error that all ranks raise from the same facts, and return it. Local."""
    error.agreed = True
    return error
