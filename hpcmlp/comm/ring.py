"""Ring reduce-scatter, all-gather and all-reduce over point-to-point messages.

The array is cut into one part per rank. In hop k of the reduce-scatter rank r sends its partial sum of part
(r - 1 - k) to rank r + 1, receives part (r - 2 - k) from rank r - 1 and adds its own numbers; after size - 1 hops rank
r holds the whole sum of part r. The all-gather passes the finished parts on the same way. Parts are cut into segments:
a segment is added while the next one is under way, and goes on to the next rank at once. One rank adds a part up and
the others copy it, and the order of the ranks in the sum is fixed, so all ranks hold the same bits in every run.

A collective that was started (`start_reduce_scatter`, `start_all_gather`) goes on whenever `advance` is called, and its
result stands after the `wait` of what the start returned. Several may be under way: each has tags and work buffers of
its own and receives from the first moment, but they send in the order in which they were started, as one alone would.
So the first to start is the first to end, and none shares the wire with a later one.

Small arrays, whose cost is the number of hops, do not take the ring: see `_Together`.

Where MPI sends from the memory of devices the same ring takes their arrays: then a device adds, and before anything is
sent or received it is waited for.

Cost, for n bytes on P ranks: each rank sends (P-1)/P n in each half, 2 (P-1)/P n in an all-reduce, which is the least
possible, in 2 (P-1) hops. P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", J. Parallel Distrib. Comput. 69 (2009).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcmlp.comm.exact_sum import join, num_bins, split
from hpcmlp.comm.messages import LIMIT_BYTES, aligned_zeros, cut_parts, pieces
from hpcmlp.comm.prepared import Prepared
from hpcmlp.traffic import REDUCE_SHARE, SEGMENT_BYTES, least_bytes, small_limit, together_sends

DEPTH = 2           # segments that may be on their way to this rank at once
MAX_PLANS = 64      # prepared (array, bounds) pairs that are kept
MAX_TOGETHER = 16   # buffers for small arrays that are kept
BROADCAST_TAG = 1
FIRST_TAG = 16      # each plan has two tags from here on, data and words
TAG_PAIRS = 2**13   # then they begin anew; MPI promises tags up to 2**15 - 1
PROBE_BYTES = 2**20

Bounds = Sequence[int] | np.ndarray


class HostSums:
    """Sums of NumPy arrays, which are made at once; for those of a device see `ops.device_sums`."""

    add = np.add

    def empty(self, num_bytes: int) -> np.ndarray:
        """Return (num_bytes,) uint8. Local."""
        return np.empty(num_bytes, np.uint8)

    def wait(self) -> None:
        """Do nothing. Local."""


class Ring:
    """`comm.Collective` by messages between neighbours in the ring.

    Collective over `comm`, which is duplicated. Messages for an array and its bounds are prepared at the first call
    and kept (persistent requests, work buffers), so a steady step allocates nothing; the ring therefore holds a
    reference to the arrays it was last used with, until `forget` or `free`.

    Parameters
    ----------
    segment_bytes : size of one message.
    limit_bytes : no message is larger; for tests.
    small_bytes : up to here an all-reduce is one call of MPI, a reduce-scatter up to a quarter of it; None:
        `small_limit` between nodes.
    device : `ops.device_sums.DeviceSums`, whose arrays are then taken beside the host's by all but `broadcast`; their
        sums have the bits that the host's have.
    """

    starts = True
    narrow = False

    def __init__(self, comm: MPI.Intracomm, segment_bytes: int = SEGMENT_BYTES, limit_bytes: int = LIMIT_BYTES,
                 small_bytes: int | None = None, device: Any = None):
        self.comm = comm.Dup()
        self.rank = self.part = comm.rank
        self.size = comm.size
        self.segment_bytes = min(segment_bytes, limit_bytes)
        self.threads = MPI.Query_thread() >= MPI.THREAD_SERIALIZED    # another thread may call `advance`, in turn
        self._left = (self.rank - 1) % self.size
        self._right = (self.rank + 1) % self.size
        self._plans = Prepared(MAX_PLANS)
        self._made = 0
        self._host, self._device = HostSums(), device
        self._flight: deque[_Operation] = deque()
        self._together = _Together(self.comm)
        self.bytes_sent = 0     # by reductions and gatherings so far, words included
        self._small_bytes = min(small_limit(self.size) if small_bytes is None else small_bytes, limit_bytes)

    def empty(self, size: int, dtype: np.dtype | type) -> np.ndarray:
        """As `Collective.empty`. Local."""
        return aligned_zeros(size, dtype)

    def common(self, size: int, dtype: np.dtype | type) -> np.ndarray:
        """As `Collective.common`; every rank has its own. Local."""
        return aligned_zeros(size, dtype)

    def reduce_scatter(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None = None) -> None:
        """As `Collective.reduce_scatter`; a copy of the words travels with every part. Collective over `comm`."""
        if self._is_small(array, REDUCE_SHARE):
            self._count_together(array, words)
            # In the order of the ring: the bits are those of a reduction that is started.
            start, part = bounds[0], slice(bounds[self.rank] - bounds[0], bounds[self.rank + 1] - bounds[0])
            self._together.sum(array[start:bounds[-1]], words, part, first=(self.rank + 1) % self.size)
        elif self.size > 1:
            self._run(self._reduce_plan(array, bounds, words), words)

    def all_gather(self, array: np.ndarray, bounds: Bounds) -> None:
        """As `Collective.all_gather`. Collective over `comm`."""
        if self.size > 1:
            self._run(self._plan(_AllGather, array, bounds, 0), None)

    def start_reduce_scatter(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None = None) -> Any:
        """Start a `reduce_scatter` and return it at once: `wait()` it, and leave `array` and `words` alone until then.

        Collective over `comm`, in the order of the starts on all ranks; nothing here waits for another rank.
        """
        return self._start(self._reduce_plan(array, bounds, words) if self.size > 1 else None, words)

    def start_all_gather(self, array: np.ndarray, bounds: Bounds) -> Any:
        """Start an `all_gather` and return it at once: `wait()` it; until then read `array` only outside the bounds.

        Collective over `comm`, as `start_reduce_scatter`.
        """
        return self._start(self._plan(_AllGather, array, bounds, 0) if self.size > 1 else None, None)

    def advance(self) -> bool:
        """Take what was started as far as it goes without waiting; return whether nothing is under way. Local."""
        for operation in self._flight:
            if not (operation.advance() or operation.sent()):
                break   # the turn of the next one to send has not come
        while self._flight and self._flight[0].done:
            self._flight.popleft()
        return not self._flight

    def all_reduce(self, array: np.ndarray, words: np.ndarray | None = None) -> None:
        """As `Collective.all_reduce`. Collective over `comm`."""
        if self._is_small(array):
            self._count_together(array, words)
            self._together.sum(array, words)
            return
        bounds = [array.size * rank // self.size for rank in range(self.size + 1)]
        self.reduce_scatter(array, bounds, words)
        self.all_gather(array, bounds)

    def meet(self) -> None:
        """Return: ranks have no common memory here. Local."""

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """Copy `array` (contiguous, any dtype) of rank `root` to all ranks, in place, as a chain of segments.

        Collective over `comm`.
        """
        sends = []
        for piece in pieces(array.reshape(-1).view(np.uint8), self.segment_bytes):
            if self.rank != root:
                self.comm.Recv(piece, self._left, BROADCAST_TAG)
            if self._right != root:
                sends.append(self.comm.Isend(piece, self._right, BROADCAST_TAG))
        MPI.Request.Waitall(sends)

    def least_bytes(self, delay_s: float, loss: float) -> int:
        """Return the size from which on an array's collectives spend at most the share `loss` of their time on latency.

        Collective over `comm`: from a short measurement between neighbours, the same on all ranks. A hop of n bytes in
        all takes delay_s + latency + n / size / bandwidth; `delay_s` is what the caller adds to the latency, seconds.
        """
        def exchange(num_bytes: int, times: int) -> float:
            out, into = np.zeros(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
            taken = []
            for _ in range(times):
                begin = perf_counter_ns()
                self.comm.Sendrecv(out, self._right, BROADCAST_TAG, into, self._left, BROADCAST_TAG)
                taken.append(1e-9 * (perf_counter_ns() - begin))
            return sorted(taken)[times // 2]

        exchange(8, 3)      # the first messages make connections
        latency = exchange(8, 11)
        slowest = np.array([latency, exchange(PROBE_BYTES, 5) / PROBE_BYTES])
        self.comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
        return least_bytes(self.size, slowest[0], slowest[1], delay_s, loss)

    def forget(self) -> None:
        """Drop the prepared messages and with them the references to the caller's arrays. Local.

        Nothing may be under way: a message would still arrive in memory that is somebody else's by then.
        """
        assert not self._flight, "what was started has not been waited for"
        self._plans.clear()

    def free(self) -> None:
        """As `Collective.free`. Collective over `comm`."""
        self.forget()
        self.comm.Free()

    def _count_together(self, array: np.ndarray, words: np.ndarray | None) -> None:
        self.bytes_sent += together_sends(array.nbytes, self.size, 0 if words is None else words.size)

    def _is_small(self, array: np.ndarray, share: int = 1) -> bool:
        return array.nbytes * share <= self._small_bytes and self.size > 1 and self._sums(array) is self._host

    def _sums(self, array: Any) -> Any:
        return self._host if self._device is None or not self._device.holds(array) else self._device

    def _reduce_plan(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None) -> "_Plan":
        return self._plan(_ReduceScatter, array, bounds, 0 if words is None else words.size)

    def _plan(self, kind: type, array: np.ndarray, bounds: Bounds, num_words: int) -> "_Plan":
        plan = self._plans.find(kind, array, bounds, num_words)
        if plan is None:
            tag = FIRST_TAG + 2 * (self._made % TAG_PAIRS)
            self._made += 1
            plan = kind(self, array, [int(bound) for bound in bounds], num_words, tag)
            self._plans.add(plan, kind, array, bounds, num_words)
        return plan

    def _run(self, plan: "_Plan", words: np.ndarray | None) -> None:
        if self._flight:
            self._start(plan, words).wait()
            return
        self.bytes_sent += plan.bytes_sent
        plan.post()
        for request in plan.steps(words):
            request.Wait()

    def _start(self, plan: "_Plan | None", words: np.ndarray | None) -> "_Operation":
        operation = _Operation(self, plan, words)
        if plan is not None:
            self.bytes_sent += plan.bytes_sent
            self._flight.append(operation)
            self.advance()
        return operation

    def _wait(self, operation: "_Operation") -> None:
        while not operation.done:
            self._flight[0].block()
            self.advance()

    def _parts(self, array: np.ndarray, bounds: list[int]) -> list[list[np.ndarray]]:
        return cut_parts(array, bounds, self.size, self.segment_bytes)


class _Together:
    """Sums of small arrays by one call of MPI: few messages one after the other, where the ring takes 2 (P-1) hops.

    Every rank gets all ranks' numbers (MPI_Allgather) and adds up what it needs itself, so all hold the same bits
    whatever the library does. Between two ranks MPI adds (MPI_Allreduce): two numbers have one sum in either order.
    Bytes sent per rank: those of the array and words, times P-1 at most.
    """

    def __init__(self, comm: MPI.Intracomm):
        self._comm = comm
        self._buffers: dict[tuple, tuple] = {}

    def sum(self, array: np.ndarray, words: np.ndarray | None, part: slice = slice(None), first: int = 0) -> None:
        """Replace `part` of `array`, and `words`, by the sum over the ranks, in their order from rank `first` on.

        Collective. What `array` holds outside the part afterwards nobody should use.
        """
        if self._comm.size == 2:
            self._comm.Allreduce(MPI.IN_PLACE, array, MPI.SUM)
            if words is not None:
                self._comm.Allreduce(MPI.IN_PLACE, words, MPI.SUM)
            return
        key = array.dtype.char, array.size, 0 if words is None else words.size
        every, numbers, bins = self._buffers.get(key) or self._prepare(key, array)
        np.copyto(numbers[self._comm.rank], array)
        if words is not None:
            split(words, bins[self._comm.rank])
        self._comm.Allgather(MPI.IN_PLACE, every)
        _add_up([row[part] for row in (*numbers[first:], *numbers[:first])], array[part])
        if words is not None:
            _add_up(bins, bins[0])
            join(bins[0], words)

    def _prepare(self, key: tuple, array: np.ndarray) -> tuple:
        if len(self._buffers) >= MAX_TOGETHER:
            self._buffers.clear()
        size, num_words = self._comm.size, key[2]
        start = 8 * num_bins(size) * num_words      # after the bins of the words
        every = np.zeros((size, start + -(-array.nbytes // 8) * 8), np.uint8)
        numbers = [row[start:start + array.nbytes].view(array.dtype) for row in every]
        bins = [row[:start].view(np.float64).reshape(num_bins(size), num_words) for row in every]
        self._buffers[key] = every, numbers, bins
        return self._buffers[key]


def _add_up(terms: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Write the sum of `terms`, in their order, into `out`, which may be the first of them. Local."""
    if out is not terms[0]:
        np.copyto(out, terms[0])
    for term in terms[1:]:
        np.add(out, term, out)


class _Operation:
    """A collective under way: its plan, and how far it is.

    began, ended : when it was started and when its end was seen, `time.perf_counter_ns`; `ended` is 0 before that.
    """

    def __init__(self, ring: Ring, plan: "_Plan | None", words: np.ndarray | None):
        self._ring, self._plan = ring, plan
        self.done = plan is None
        self.began = perf_counter_ns()
        self.ended = self.began if self.done else 0
        if plan is not None:
            assert not plan.busy, "an array is started again before it has been waited for"
            plan.busy = True
            plan.post()
            self._steps = plan.steps(words)
            self._request: Any = None   # what the next step waits for; None before the first

    def advance(self) -> bool:
        """Go on without waiting; return whether all is done. Local."""
        while not self.done and (self._request is None or self._request.Test()):
            self._next()
        return self.done

    def block(self) -> None:
        """Wait for what the next step needs, and take it. Local."""
        if self._request is not None:
            self._request.Wait()
        self._next()

    def sent(self) -> bool:
        """Return whether all of this rank's messages are on their way, so that others may follow. Local."""
        return self._plan.all_started and MPI.Request.Testall(self._plan.sends)

    def wait(self) -> None:
        """Return when the result stands. Collective, in the order of the starts."""
        self._ring._wait(self)
        if self._plan is not None:
            self._plan.busy = False

    def _next(self) -> None:
        self._request = next(self._steps, None)
        if self._request is None:
            self.done, self.ended = True, perf_counter_ns()


class _All:
    """Several requests as one."""

    def __init__(self, requests: list[MPI.Prequest]):
        self.requests = requests

    def Wait(self) -> None:
        MPI.Request.Waitall(self.requests)

    def Test(self) -> bool:
        return MPI.Request.Testall(self.requests)


class _Plan:
    """The messages of one collective on one array, prepared.

    `post` starts to receive; `steps` sends and does the rest, and yields each request that must have ended before it
    can go on: a caller that waits for them and one that asks now and then run the same code.

    sums : how what comes in is added. busy : started and not yet waited for. all_started : nothing more will be sent
    than what `sends` are busy with.
    """

    def __init__(self, array: np.ndarray, sums: Any):
        self.sums = sums
        self.array = array  # kept, so that its address cannot come to mean another one
        self.busy = self.all_started = False
        self.sends: list[MPI.Prequest] = []
        self.bytes_sent = 0     # in one go, words included
        self._receives: list[MPI.Prequest] = []
        self._posted: list[MPI.Prequest] = []   # what is received from the first moment

    def _prepare_send(self, ring: Ring, data: np.ndarray, tag: int) -> MPI.Prequest:
        self.sends.append(ring.comm.Send_init(data, ring._right, tag))
        self.bytes_sent += data.nbytes
        return self.sends[-1]

    def post(self) -> None:
        self.sums.wait()    # for what the array is made by, and for who still reads where something comes in
        self.all_started = False
        MPI.Prequest.Startall(self._posted)

    def steps(self, words: np.ndarray | None) -> Iterator[Any]:
        raise NotImplementedError

    def free(self) -> None:
        for request in [*self.sends, *self._receives]:
            request.Free()


class _ReduceScatter(_Plan):
    """The messages of one reduce-scatter."""

    def __init__(self, ring: Ring, array: np.ndarray, bounds: list[int], num_words: int, tag: int):
        super().__init__(array, ring._sums(array))
        comm, rank, size = ring.comm, ring.rank, ring.size
        parts = ring._parts(array, bounds)
        first_sends = [self._prepare_send(ring, piece, tag) for piece in parts[rank - 1]]
        buffers = work_buffers(parts, self.sums)
        hops = []
        for hop in range(size - 1):
            steps = []
            for own in parts[(rank - 2 - hop) % size]:
                work = buffers[len(self._receives) % DEPTH][:own.nbytes].view(array.dtype)
                self._receives.append(comm.Recv_init(work, ring._left, tag))
                steps.append((own, work, self._prepare_send(ring, own, tag) if hop < size - 2 else None))
            hops.append(steps)
        # A work buffer takes segment i + DEPTH as soon as segment i has been added.
        later = iter([*self._receives[DEPTH:], *[None] * DEPTH])
        receives = iter(self._receives)
        self._hops = [[(next(receives), own, work, next(later), send) for own, work, send in steps] for steps in hops]
        self._posted = self._receives[:DEPTH]
        self._prepare_words(ring, num_words, tag + 1)
        self._first = [*self._word_sends[:1], *first_sends]
        self._sent = _All(self.sends)

    def _prepare_words(self, ring: Ring, num_words: int, tag: int) -> None:
        # Row 0 holds this rank's words; row k + 1 what hop k brings, then plus row 0, which hop k + 1 sends on.
        self._rows = list(np.empty((ring.size, num_bins(ring.size), num_words)))
        self._word_sends: list[MPI.Prequest] = []
        self._word_receives: list[MPI.Prequest] = []
        if num_words:
            self._word_sends = [self._prepare_send(ring, row, tag) for row in self._rows[:-1]]
            self._word_receives = [ring.comm.Recv_init(row, ring._left, tag) for row in self._rows[1:]]
            self._posted = [*self._posted, *self._word_receives]
            self._receives.extend(self._word_receives)

    def steps(self, words: np.ndarray | None) -> Iterator[Any]:
        add, wait, rows = self.sums.add, self.sums.wait, self._rows
        if words is not None:
            split(words, rows[0])
        MPI.Prequest.Startall(self._first)
        for hop, steps in enumerate(self._hops):
            if self._word_sends:
                yield self._word_receives[hop]
                np.add(rows[hop + 1], rows[0], rows[hop + 1])
                if hop + 1 < len(self._hops):
                    self._word_sends[hop + 1].Start()
            if hop + 1 == len(self._hops):
                self.all_started = True
            for receive, own, work, later, send in steps:
                yield receive
                add(own, work, own)
                wait()
                if later is not None:
                    later.Start()
                if send is not None:
                    send.Start()
        yield self._sent
        if words is not None:
            join(rows[-1], words)


class _AllGather(_Plan):
    """The messages of one all-gather; every segment is received in its place."""

    def __init__(self, ring: Ring, array: np.ndarray, bounds: list[int], num_words: int, tag: int):
        super().__init__(array, ring._sums(array))
        comm, rank, size = ring.comm, ring.rank, ring.size
        parts = ring._parts(array, bounds)
        self._first = [self._prepare_send(ring, piece, tag) for piece in parts[rank]]
        self._forward = []
        for hop in range(size - 1):
            for piece in parts[(rank - 1 - hop) % size]:
                receive = comm.Recv_init(piece, ring._left, tag)
                self._receives.append(receive)
                if hop < size - 2:
                    self._forward.append((receive, self._prepare_send(ring, piece, tag)))
        self._posted = self._receives
        self._all = _All([*self._receives, *self.sends])

    def steps(self, words: np.ndarray | None) -> Iterator[Any]:
        MPI.Prequest.Startall(self._first)
        for receive, send in self._forward:
            yield receive
            send.Start()
        self.all_started = True
        yield self._all


def work_buffers(parts: list[list[np.ndarray]], sums: Any) -> list[np.ndarray]:
    """Return the buffers that take what comes in before `sums` add it, bytes of the largest segment. Local."""
    largest = max((piece.nbytes for part in parts for piece in part), default=0)
    return [sums.empty(max(8, largest)) for _ in range(DEPTH)]
