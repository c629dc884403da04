"""Reduce-scatter and all-gather as the push and pull of a parameter server: whole slices sent straight to their owners.

The first `servers` ranks own parts of the array. `reduce_scatter` is a push: every worker sends each owner the owner's
part of its array, and the owner adds what comes in ascending order of the workers' ranks: the bits of a plain ordered
sum, whatever arrives first. `all_gather` is a pull: every owner sends its part to all other ranks, front segments
first, which is the order in which a forward pass needs the layers. With fewer servers than ranks the servers are
dedicated: what stands in their own array is not added. With as many servers as ranks everyone is both.

The control words come from all ranks, also from dedicated servers: each rank sends them to every server, every server
adds them in the order of the ranks, and sends a rank that is no server the sum, together with the version: how often
this pair of calls has been made. A rank that sees another version than its own has lost a message or a turn.

Cost for n bytes, W workers, K dedicated servers, P = W + K: a worker sends n and receives n; a server receives W n/K
and sends (P - 1) n/K; it is the server's link that fills first. With K = P each rank sends and receives (P - 1)/P n in
either half, as in a ring, but in one hop instead of P - 1.

No cycle of waiting: a rank starts all its sends of its own data before it waits for anything; the only messages sent
later are the servers' sums of words, which depend on messages of the first kind alone, and are waited for last.
Two-sided messages rather than MPI-3 windows: see `comm.post`. On one node `comm.served_node` needs no messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from hpcmlp.comm.messages import LIMIT_BYTES, aligned_zeros, broadcast, cut_parts
from hpcmlp.comm.prepared import Prepared
from hpcmlp.errors import RunFailed
from hpcmlp.traffic import SEGMENT_BYTES, served_segment_bytes

DEPTH = 2           # segments of one worker that may be on their way at once
MAX_PLANS = 64
DATA_TAG, WORDS_TAG, SUMS_TAG = 1, 2, 3

Bounds = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Roles:
    """Which of `size` ranks serve and which train: the first `servers` serve; when that is all of them, all do both."""

    servers: int
    size: int

    @property
    def dedicated(self) -> bool:
        """Whether the servers do nothing but serve."""
        return self.servers < self.size

    @property
    def workers(self) -> range:
        """The ranks that train, ascending."""
        return range(self.servers if self.dedicated else 0, self.size)

    def share(self, rank: int) -> tuple[int, int] | None:
        """Return (this rank's number among the workers, number of workers), None for a dedicated server. Local."""
        workers = self.workers
        return (rank - workers.start, len(workers)) if rank in workers else None


class Served:
    """`comm.Collective` between workers and the servers that own parts.

    Collective over `comm`, which is duplicated. Prepared messages and their lifetime are those of `Ring`.

    Parameters
    ----------
    servers : ranks 0 .. servers - 1 own parts; the parts of other ranks must be empty.
    segment_bytes, limit_bytes : largest message; for tests.

    Attributes `bytes_sent` and `bytes_received` count the bytes of arrays (not of words) of this rank so far.
    """

    starts = narrow = threads = False

    def __init__(self, comm: MPI.Intracomm, servers: int, segment_bytes: int = SEGMENT_BYTES,
                 limit_bytes: int = LIMIT_BYTES):
        self.comm = comm.Dup()
        self.rank = self.part = comm.rank
        self.size = comm.size
        self.roles = Roles(servers, comm.size)
        wanted = min(segment_bytes, limit_bytes, served_segment_bytes(comm.size))
        self.segment_bytes = max(8, wanted // 64 * 64)
        self.bytes_sent = self.bytes_received = 0
        self.version = 0
        self._plans = Prepared(MAX_PLANS)

    def empty(self, size: int, dtype: np.dtype | type) -> np.ndarray:
        """As `Collective.empty`. Local."""
        return aligned_zeros(size, dtype)

    def common(self, size: int, dtype: np.dtype | type) -> np.ndarray:
        """As `Collective.common`; every rank has its own. Local."""
        return aligned_zeros(size, dtype)

    def reduce_scatter(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None = None) -> None:
        """As `Collective.reduce_scatter`: each server gets the sum over the workers of its part.

        Collective over `comm`. `array` is read on the workers and written in a server's part; ranks that do not serve
        have empty parts; `words` are summed over all ranks. Raises RunFailed when a server stands at another version
        than this rank.
        """
        if self.size > 1:
            self.version += words is not None
            self._run(_Push, array, bounds, self.roles.workers, words)

    def all_gather(self, array: np.ndarray, bounds: Bounds) -> None:
        """As `Collective.all_gather`. Collective over `comm`."""
        if self.size > 1:
            self._run(_Pull, array, bounds, range(self.size), None)

    def all_reduce(self, array: np.ndarray, words: np.ndarray | None = None) -> None:
        """As `Collective.all_reduce`; dedicated servers' numbers count here. Collective over `comm`."""
        if self.size == 1:
            return
        servers = self.roles.servers
        bounds = [array.size * min(rank, servers) // servers for rank in range(self.size + 1)]
        self.version += words is not None
        self._run(_Push, array, bounds, range(self.size), words)
        self._run(_Pull, array, bounds, range(self.size), None)

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """As `Collective.broadcast`. Collective over `comm`."""
        broadcast(self.comm, array, root, self.segment_bytes)

    def forget(self) -> None:
        """Drop the prepared messages and with them the references to the caller's arrays. Local."""
        self._plans.clear()

    def free(self) -> None:
        """As `Collective.free`. Collective over `comm`."""
        self.forget()
        self.comm.Free()

    def _run(self, kind: type, array: np.ndarray, bounds: Bounds, sources: range, words: np.ndarray | None) -> None:
        key = (kind, sources.start), array, bounds, 0 if words is None else words.size
        plan = self._plans.find(*key)
        if plan is None:
            plan = self._plans.add(kind(self, array, [int(bound) for bound in bounds], sources, key[-1]), *key)
        plan.run(words, self.version)
        self.bytes_sent += plan.bytes_sent
        self.bytes_received += plan.bytes_received

    def _parts(self, array: np.ndarray, bounds: list[int]) -> list[list[np.ndarray]]:
        parts = cut_parts(array, bounds, self.size, self.segment_bytes)
        assert bounds[self.roles.servers] == bounds[-1], "only servers own parts"
        return parts


class _Push:
    """The messages of one reduce-scatter, prepared."""

    busy = False

    def __init__(self, served: Served, array: np.ndarray, bounds: list[int], sources: range, num_words: int):
        comm, rank, size = served.comm, served.rank, served.size
        parts = served._parts(array, bounds)
        owners = [(rank + k) % size for k in range(1, size)] if rank in sources else []     # not all at one first
        self._sends = [comm.Send_init(piece, owner, DATA_TAG) for owner in owners for piece in parts[owner]]
        self._receives: list[MPI.Prequest] = []
        self._segments = self._plan_sums(comm, rank, sources, parts[rank])
        self.bytes_sent = sum(piece.nbytes for owner in owners for piece in parts[owner])
        self.bytes_received = sum(p.nbytes for p in parts[rank]) * (len(sources) - (rank in sources))
        self._prepare_words(served, num_words)
        self._all_sends = [*self._sends, *self._word_sends, *self._replies]
        first = [request for receives, _, _ in self._segments[:DEPTH] for request in receives]
        self._first = [*first, *self._word_receives, *self._word_sends, *self._sends]

    def _plan_sums(self, comm: MPI.Intracomm, rank: int, sources: range, own_part: list[np.ndarray]) -> list:
        """Return per segment: its receives, the additions that follow each of them, and the receives to start then."""
        # A rank that adds nothing of its own takes the first worker's numbers in place.
        others = [source for source in sources if source != rank]
        in_place = rank not in sources
        size = max((piece.nbytes for piece in own_part), default=0)
        kept = {source: np.empty((DEPTH, size), np.uint8) for source in others[in_place:]}
        plans = []
        for k, own in enumerate(own_part):
            place = {s: kept[s][k % DEPTH, :own.nbytes].view(own.dtype) if s in kept else own for s in others}
            receives = {source: comm.Recv_init(place[source], source, DATA_TAG) for source in others}
            self._receives.extend(receives.values())
            plans.append((list(receives.values()), self._additions(rank, sources, own, place, receives)))
        return [(*plan, plans[k + DEPTH][0] if k + DEPTH < len(plans) else []) for k, plan in enumerate(plans)]

    @staticmethod
    def _additions(rank: int, sources: range, own: np.ndarray, place: dict, receives: dict) -> list:
        """Return (receive to wait for or None, a, b, out) so that the sum runs over the sources in ascending order."""
        total, steps = None, []
        for source in sources:
            value, receive = (own, None) if source == rank else (place[source], receives[source])
            if total is None:
                total = value
                steps.append((receive, None, None, None))
                continue
            # Once the own numbers are in, the sum stands in its final place.
            out = own if source == rank or total is own else total
            steps.append((receive, total, value, out))
            total = out
        return steps

    def _prepare_words(self, served: Served, num_words: int) -> None:
        comm, rank, size, servers = served.comm, served.rank, served.size, served.roles.servers
        self._word_sends, self._word_receives, self._replies = [], [], []
        # Row r holds the words of rank r; the last row the sum. The last column is the version.
        self._rows = np.zeros((size + 1, num_words + 1))
        self._own, self._sum, self._versions = self._rows[rank], self._rows[-1], self._rows[:-1, -1]
        if not num_words:
            return
        self._serves, self._rank = rank < servers, rank
        self._word_sends = [comm.Send_init(self._rows[rank], server, WORDS_TAG)
                            for server in range(servers) if server != rank]
        if self._serves:
            self._word_receives = [comm.Recv_init(self._rows[other], other, WORDS_TAG)
                                   for other in range(size) if other != rank]
            self._replies = [comm.Send_init(self._rows[-1], other, SUMS_TAG)
                             for other in range(servers, size) if other % servers == rank]
        else:
            self._word_receives = [comm.Recv_init(self._rows[-1], rank % servers, SUMS_TAG)]

    def run(self, words: np.ndarray | None, version: int) -> None:
        if words is not None:
            self._own[:-1] = words
            self._own[-1] = version
        MPI.Prequest.Startall(self._first)
        for _, additions, later in self._segments:
            for receive, a, b, out in additions:
                if receive is not None:
                    receive.Wait()
                if out is not None:
                    np.add(a, b, out)
            if later:
                MPI.Prequest.Startall(later)
        if words is not None:
            self._sum_words(words, version)
        MPI.Request.Waitall(self._all_sends)

    def _sum_words(self, words: np.ndarray, version: int) -> None:
        total = self._sum
        MPI.Request.Waitall(self._word_receives)
        if self._serves:
            agree = self._versions.tolist().count(version) == len(self._versions)
            # One row after the other: NumPy's own sum may add in another order.
            first, second, *others = self._rows[:-1]
            np.add(first, second, total)
            for row in others:
                np.add(total, row, total)
            total[-1] = version if agree else -1
            MPI.Prequest.Startall(self._replies)
        if total[-1] != version:
            raise RunFailed(f"rank {self._rank} is at version {version} of the parameters and another rank is not: a "
                            "message was lost or doubled; go on from the last checkpoint with --resume.")
        words[:] = total[:-1]

    def free(self) -> None:
        for request in [*self._all_sends, *self._receives, *self._word_receives]:
            request.Free()


class _Pull:
    """The messages of one all-gather, prepared; every segment is received in its place."""

    busy = False

    def __init__(self, served: Served, array: np.ndarray, bounds: list[int], sources: range, num_words: int):
        comm, rank = served.comm, served.rank
        parts = served._parts(array, bounds)
        others = [(rank + k) % served.size for k in range(1, served.size)]
        receives = [comm.Recv_init(piece, owner, DATA_TAG) for owner, part in enumerate(parts) if owner != rank
                    for piece in part]
        sends = [comm.Send_init(piece, other, DATA_TAG) for piece in parts[rank] for other in others]
        self._all = [*receives, *sends]
        self.bytes_sent = sum(piece.nbytes for piece in parts[rank]) * len(others)
        self.bytes_received = sum(p.nbytes for owner, part in enumerate(parts) if owner != rank for p in part)

    def run(self, words: None, version: int) -> None:
        MPI.Prequest.Startall(self._all)
        MPI.Request.Waitall(self._all)

    def free(self) -> None:
        for request in self._all:
            request.Free()
