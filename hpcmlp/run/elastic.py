"""A run that goes on when ranks die: the survivors shrink, agree on the last step that any of them has done, and go on.

Every rank holds the whole state (`--full-update`), so nothing dies with a rank. A step counts when one survivor has its
sums: no death can undo that, and whoever has not, by one step at most, gets the state from it. No step is lost or done
twice. What was due after the step (validation, log, save) is done again unless some survivor has done all of it.
The cost: every rank keeps all moments and updates all parameters, and an all-reduce of the library replaces the
halves of the ring.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, NoReturn

from hpcmlp.comm import messages, survive
from hpcmlp.comm.topology import Topology
from hpcmlp.errors import ConfigError, HpcmlpError
from hpcmlp.run.session import Progress, Session


def require() -> None:
    """Raise ConfigError unless the MPI library survives deaths. Local, the same on all ranks."""
    if not survive.can_shrink():
        raise ConfigError("--elastic needs an MPI library that survives the death of ranks: Open MPI 5, started with "
                          "'mpirun --with-ft ulfm'; with others 'hpcmlp launch' starts the run again on the ranks that "
                          "remain.")


RECOVERY_S = 60.0   # a recovery takes tens of milliseconds


class Elastic:
    """Runs something on the ranks that live, until it has ended on all that are left.

    Parameters
    ----------
    world : communicator of all ranks.
    begin : `begin(topology, previous)` makes a run, a fresh one when `previous` is None, else one that takes over;
        what it returns has `run()`, `comms()`, `abandon()`, `end()` and `lost(ranks, seconds)`.
    """

    def __init__(self, world: Any, begin: Callable[[Topology, Any], Any]):
        self._begin = begin
        self.comm = survive.open_comm(world)
        self._others: tuple[Any, ...] = ()

    def run(self) -> NoReturn:
        """Run to the end. Collective over the survivors; the process ends here, but for a fault of ours."""
        running, lost, since = None, [], 0.0
        one_node = False    # where it is known, survivors make no communicator but the smaller world: see `survive`
        while True:
            try:
                topology = self._on_all(Topology, self.comm, one_node)
                self._others, one_node = topology.made, topology.num_nodes == 1
                running = self._on_all(self._begin, topology, running)
                self._others = running.comms()
                faulthandler.cancel_dump_traceback_later()
                if lost:
                    running.lost(lost, time.monotonic() - since)
                    lost = []
                running.run()
                running.end()
                survive.leave(self.comm, 0)
            except HpcmlpError as error:
                if not error.agreed and self.comm.size > 1:
                    raise
                if self.comm.rank == 0:
                    print(f"hpcmlp: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
                if running is not None:
                    running.end()
                survive.leave(self.comm, error.code)
            except Exception as error:
                if not survive.is_loss(error, self.comm):
                    raise
                # A recovery that hangs ends this process with its stacks on standard error; the others meet its death.
                faulthandler.dump_traceback_later(RECOVERY_S, exit=True)
                since = since if lost else time.monotonic()
                if running is not None:
                    running.abandon()
                os.environ.pop("HPCMLP_FAULT", None)    # it was for a rank of the former numbering
                self.comm, dead = survive.shrink(self.comm, self._others)
                lost += dead

    def _on_all(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `make` makes once it stands on all ranks: only then may they wait for each other in it.

        Where one of them has met a death all raise, and what was made in vain is abandoned.
        """
        error = made = None
        try:
            made = make(*arguments)
        except Exception as caught:
            if not survive.is_loss(caught, self.comm):
                raise
            error = caught
            survive.revoke(self.comm, *self._others)
        if survive.all_have(self.comm, error is None):
            return made
        if error is None:
            if hasattr(made, "abandon"):
                made.abandon()
            survive.revoke(self.comm, *self._others)
            messages.barrier(self.comm)     # raises
        raise error


def hand_over(comm: Any, old: Session, new: Session, settled: bool, before: tuple[Progress, Any]) -> bool:
    """Bring `new` to the state of whichever survivor is farthest; return whether what was due after it has been done.

    Collective over `comm`, the survivors'.

    Parameters
    ----------
    old : this rank's state up to now.
    settled : whether this rank has done all that was due after its last step.
    before : progress and best state as they were between that step and what was due after it.
    """
    progress, best = (old.progress, old.best) if settled else before
    places = survive.all_places(comm, progress.step << 1 | settled)
    source = places.index(max(places))
    new.progress, new.best = replace(progress), best
    for mine, theirs in zip(new.vectors(), old.vectors(), strict=True):
        mine[...] = theirs
    if len(set(places)) > 1:
        facts = json.dumps([asdict(progress), best is not None]).encode() if comm.rank == source else None
        values, has_best = json.loads(messages.broadcast_bytes(comm, facts, source))
        new.progress = Progress(**values)
        if not has_best:
            new.best = None
        elif new.best is None:
            new.best = new.vectors()[0].copy()
        elif comm.rank != source:
            new.best = new.best.copy()
        for vector in (*new.vectors(), *([new.best] if has_best else ())):
            messages.broadcast(comm, vector, source)
    return bool(places[source] & 1)


def known_to_any(comm: Any, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return on rank 0 the records of all survivors, none elsewhere. Collective over `comm`.

    The rank that wrote the log may have died before it wrote what the others have seen happen.
    """
    told = messages.gather_bytes(comm, json.dumps(list(records)).encode())
    return [record for one in told or () for record in json.loads(one)]
