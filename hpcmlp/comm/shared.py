"""Collectives through the node's shared memory, and the ring among ranks with one local rank between nodes.

Arrays made by `empty` lie in MPI-3 shared windows: every rank of a node works on its neighbours' arrays in place. In a
reduce-scatter each rank sums its share from all neighbours' memory, cache block by cache block; then the ranks with
the same local rank reduce that share over the nodes by `Ring`, so that all network links work at once. In an all-reduce
it also writes the sum into all neighbours' memory. An array made by `common` exists once per node: its all-gather is a
meeting of the node's ranks and the ring between nodes. Small arrays go through a stage that everybody adds up itself.

Part p of the bounds belongs to the rank with local_rank * num_nodes + cross_rank = p, so that the share of a local
rank is one contiguous run of parts. A sum begins with its owner's own numbers and goes on in the order of the local
ranks (through the stage: in the order of the local ranks alone), then around the ring: the same bits in every run, and
on all ranks.

Cost on a node, n bytes, P ranks: each rank reads n and writes n/P in a reduce-scatter, reads n and writes n in an
all-reduce; nothing is sent. Between N nodes of L ranks each rank sends (N-1)/N n/L in each half. The ranks meet once in
a reduce-scatter, once in an all-gather of a common array, twice in an all-gather of an ordinary one and in an
all-reduce, once in an all-reduce through the stage.

A meeting orders memory: what a rank wrote before it is seen by all after it. With the C kernels it is a few loads and
stores of counters in shared memory (`meet` in ops/_fused_node.h), else Win.Sync and MPI's barrier (MPI-4.1 section
12.5.4, separate accesses by load and store). After T. Hoefler et al., "MPI + MPI: a new hybrid approach to parallel
programming", Computing 95 (2013).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcmlp import node_memory
from hpcmlp.comm.messages import broadcast_bytes
from hpcmlp.comm.prepared import Prepared
from hpcmlp.comm.ring import Bounds, Ring
from hpcmlp.comm.topology import Topology, usable_cores
from hpcmlp.errors import Unavailable
from hpcmlp.ops.host import kernels
from hpcmlp.traffic import small_limit

BLOCK_BYTES = 1 << 17   # of one source while NumPy sums: the sources of a block stay in the cache
STAGE_BYTES = 1 << 14   # arrays up to here take the stage
ALIGN_BYTES = 64
WORDS = 64              # control words that fit beside an array
MARKS = 16              # uint32 of one rank in the table of a meeting
ALONE, CROWDED, LATE = range(3)     # how a rank waits, as in ops/_fused_node.h
PATIENCE = 25           # calls of `meet`, 0.2 ms each, after which a rank naps while it waits
MAX_VIEWS = 64          # views of the stage, and of arrays, that are kept
SPARE_BYTES = 1 << 20   # of /dev/shm, for what the MPI library adds to a window
# MPICH maps memory for a communicator's small collectives at the sixth of a kind, and dies of a bus error when there is
# none left: let it do so before we take any.
SETTLING_CALLS = 8


class SharedUnavailable(Exception):
    """Why node memory cannot be used here; all ranks raise it alike."""


class Shared:
    """`comm.Collective` through memory inside a node.

    Collective over `topology.comm`. Raises SharedUnavailable, on all ranks, when nodes hold different numbers of ranks
    or the shared-memory file system is too small for a first window; nothing stays allocated then. `make_cross` makes
    the ring between nodes from the communicator of the ranks with one local rank; a `ring_wire.WireRing` makes only
    what crosses the network narrow.
    The C kernels are taken where all ranks of the node have them, unless `fused` is False.
    """

    WAITS = ("_meet",)  # methods that only wait for other ranks, for whoever measures them

    starts = True

    def __init__(self, topology: Topology, make_cross: Callable[[MPI.Intracomm], Ring] = Ring, fused: bool = True):
        self.topology = topology
        self.comm, self.node = topology.comm, topology.node.Dup()
        self.rank, self.size = topology.rank, topology.size
        self.local_rank, self.local_size = topology.local_rank, topology.local_size
        self.part = topology.local_rank * topology.num_nodes + topology.cross_rank
        self._cross = make_cross(topology.cross)
        self.narrow = self._cross.narrow
        self.threads = self._cross.threads and self._cross.size > 1     # else nothing is ever under way
        self._ring: Ring | None = None
        self._windows: list[_Window] = []
        self._plans = Prepared(MAX_VIEWS)
        self._views: dict[tuple, tuple] = {}
        self._turn = self._half = 0
        self._stage: list[np.ndarray] = []
        self._marks: np.ndarray | None = None
        try:
            self._check_even()
            for _ in range(SETTLING_CALLS):
                self._agree("")
                self.node.Barrier()
            self._kernels = self._common_kernels() if fused else None
            self._crowded = usable_cores(self.node) < self.local_size
            self._open_stage()
        except SharedUnavailable:
            self.free()
            raise

    def _open_stage(self) -> None:
        table_bytes = 4 * MARKS * self.local_size
        self._table = self._window(table_bytes, common=True)
        self._marks = self._table.memories[0][:table_bytes].view(np.uint32).reshape(-1, MARKS)
        # Two halves in turn: a rank that fills one again has met all that read it.
        stage = self._window(2 * (8 * WORDS + STAGE_BYTES), common=False)
        self._stage = [memory.reshape(2, -1) for memory in stage.memories]

    def _check_even(self) -> None:
        sizes = np.array([self.local_size, -self.local_size], np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, sizes, MPI.MAX)
        if sizes[0] != -sizes[1]:
            raise SharedUnavailable(f"nodes hold different numbers of ranks ({-sizes[1]} to {sizes[0]})")

    def _common_kernels(self) -> Any:
        """Return the C kernels when all ranks of the node have them: they must meet in one way."""
        own = kernels()
        every = np.array([hasattr(own, "meet")], np.int64)
        self.node.Allreduce(MPI.IN_PLACE, every, MPI.MIN)
        return own if every[0] else None

    def empty(self, size: int, dtype: Any) -> np.ndarray:
        """Return a zeroed (size,) array that the ranks of this node reach in place.

        Collective over the ranks. Raises SharedUnavailable on all ranks when the memory is not to be had.
        """
        return self._array(size, dtype, common=False)

    def common(self, size: int, dtype: Any) -> np.ndarray:
        """Return a zeroed (size,) array that exists once per node.

        Collective over the ranks. Between an `all_gather` of it and the next collective all ranks may read it, and each
        may write its own part.
        """
        return self._array(size, dtype, common=True)

    def _array(self, size: int, dtype: Any, common: bool) -> np.ndarray:
        dtype = np.dtype(dtype)
        window = self._window(size * dtype.itemsize, common)
        return window.memories[0 if common else self.local_rank][:size * dtype.itemsize].view(dtype)

    def _window(self, num_bytes: int, common: bool) -> "_Window":
        needed = num_bytes * (1 if common else self.local_size)
        self._agree(_too_small(needed + SPARE_BYTES) if self.local_rank == 0 else "")
        window = _Window(self.node, num_bytes, common)
        missing = window.fill()
        try:
            self._agree(f"another program took {missing / 2**20:.1f} of {needed / 2**20:.1f} MiB in /dev/shm while "
                        f"they were allocated; {node_memory.advice()}" if missing else "")
        except SharedUnavailable:
            window.free()
            raise
        self._windows.append(window)
        return window

    def _agree(self, reason: str) -> None:
        """Raise SharedUnavailable with the reason of the lowest rank that has one, on all ranks. Collective."""
        first = np.array([self.rank if reason else self.size], np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, first, MPI.MIN)
        if first[0] < self.size:
            text = reason.encode() if self.rank == first[0] else None
            raise SharedUnavailable(broadcast_bytes(self.comm, text, int(first[0])).decode())

    def reduce_scatter(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None = None) -> None:
        """As `Collective.reduce_scatter`, but neighbours may still be reading an array made by `empty` afterwards.

        Collective over the ranks. Until the next `all_gather` or `all_reduce` a rank writes its own part of it only (or
        what can only reach sums that nobody uses).
        """
        plan = self._plan(array, bounds)
        if plan is None:
            self._on_ring().reduce_scatter(array, self._in_rank_order(bounds), words)
            return
        self._reduce_on_node(plan, words)
        if self._cross.size > 1:
            self._cross.reduce_scatter(plan.share, plan.inner, words)

    def start_reduce_scatter(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None = None) -> Any:
        """Sum over the ranks of the node, start to sum over the nodes, and return that, to `wait()` for.

        Collective over the ranks: waits for the ranks of the node, not for other nodes. Waits come in the order of the
        starts. What is said of `array` at `reduce_scatter` holds here.
        """
        plan = self._plan(array, bounds)
        if plan is None:
            return self._on_ring().start_reduce_scatter(array, self._in_rank_order(bounds), words)
        self._reduce_on_node(plan, words)
        return self._cross.start_reduce_scatter(plan.share, plan.inner, words)

    def _reduce_on_node(self, plan: "_Plan", words: np.ndarray | None, everywhere: bool = False) -> None:
        """Sum this local rank's share of an array, and `words`, over the node.

        `everywhere`: into the memory of all ranks of the node, else into this one's.
        """
        _, word_slots = self._fill(None, words)
        self._meet()
        if everywhere:
            self._sum(plan.shares, plan.shares)
        else:
            self._sum(plan.shares[:1], plan.sources)
        if words is not None:
            self._sum((words,), word_slots)

    def all_gather(self, array: np.ndarray, bounds: Bounds) -> None:
        """As `Collective.all_gather`. Collective over the ranks."""
        plan = self._plan(array, bounds)
        if plan is None:
            self._on_ring().all_gather(array, self._in_rank_order(bounds))
            return
        if self._cross.size > 1:
            self._cross.all_gather(plan.share, plan.inner)
        self._spread(plan)

    def start_all_gather(self, array: np.ndarray, bounds: Bounds) -> Any:
        """Start an `all_gather` over the nodes and return it, to `wait()` for: then the node's ranks have it too.

        Collective over the ranks; nothing here waits. Waits come in the order of the starts.
        """
        plan = self._plan(array, bounds)
        if plan is None:
            return self._on_ring().start_all_gather(array, self._in_rank_order(bounds))
        return _Later(self._cross.start_all_gather(plan.share, plan.inner), lambda: self._spread(plan))

    def start_gather_towards(self, array: np.ndarray, bounds: Bounds, kept: np.ndarray) -> Any:
        """Start a `gather_towards` and return it, as `start_all_gather`. Collective over the ranks."""
        plan = self._plan_in_node(array, bounds)
        across = self._cross.start_gather_towards(plan.share, plan.inner, kept)
        return _Later(across, lambda: self._spread(plan))

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent so far, words included: between nodes, or where the ring stood in. Local."""
        return self._cross.bytes_sent + (0 if self._ring is None else self._ring.bytes_sent)

    def advance(self) -> bool:
        """Take what was started as far as it goes without waiting; return whether nothing is under way. Local."""
        on_ring = self._ring is None or self._ring.advance()
        return self._cross.advance() and on_ring

    def gather_towards(self, array: np.ndarray, bounds: Bounds, kept: np.ndarray) -> None:
        """Move every part towards what its owner has in its place, as `WireRing.gather_towards` between the nodes.

        Collective over the ranks. Only with a narrow ring between nodes, and for arrays made here.
        """
        plan = self._plan_in_node(array, bounds)
        self._cross.gather_towards(plan.share, plan.inner, kept)
        self._spread(plan)

    def settle(self, array: np.ndarray, bounds: Bounds, out: np.ndarray) -> None:
        """Write into `out` what the reductions of `array` still owe it, as `WireRing.settle` does between the nodes.

        Collective over the ranks. `array` and `out` are arrays made here.
        """
        plan = self._plan_in_node(array, bounds)
        self._cross.settle(plan.share, plan.inner, self._plan_in_node(out, bounds).share)
        self.all_gather(out, bounds)

    def put_residual(self, array: np.ndarray, bounds: Bounds, owed: np.ndarray) -> None:
        """Keep of `owed` what `WireRing.put_residual` keeps of this rank's share. Local."""
        plan = self._plan_in_node(array, bounds)
        start = int(bounds[self.local_rank * self._cross.size])
        self._cross.put_residual(plan.share, plan.inner, owed[start:start + plan.share.size])

    def _spread(self, plan: "_Plan") -> None:
        """Let the ranks of the node have each other's finished shares."""
        self._meet()
        if plan.common:
            return
        for mine, theirs in plan.others:
            np.copyto(mine, theirs)
        self._meet()

    def all_reduce(self, array: np.ndarray, words: np.ndarray | None = None) -> None:
        """As `Collective.all_reduce`. Collective over the ranks."""
        if array.nbytes <= STAGE_BYTES:
            self._all_reduce_staged(array, words)
            return
        plan = self._plan(array, None)
        if plan is None:
            self._on_ring().all_reduce(array, words)
            return
        one_node = self._cross.size == 1
        self._reduce_on_node(plan, words, everywhere=one_node)
        if not one_node:
            self._cross.all_reduce(plan.share, words)
            for share in plan.shares[1:]:
                np.copyto(share, plan.share)
        self._meet()

    def _all_reduce_staged(self, array: np.ndarray, words: np.ndarray | None) -> None:
        slots, word_slots = self._fill(array, words)
        self._meet()
        self._sum((array,), slots)
        if words is not None:
            self._sum((words,), word_slots)
        if self._cross.size > 1:
            self._cross.all_reduce(array, words)

    def meet(self) -> None:
        """Wait for all ranks of the node: what one did to common memory before, the others see after it.

        Collective over the ranks of the node.
        """
        self._meet()

    def least_bytes(self, delay_s: float, loss: float) -> int:
        """Return what `Ring.least_bytes` says of the ring between nodes, for arrays of which each rank carries a share.

        Collective over the ranks. On one node nothing is sent, so no array is large enough.
        """
        if self._cross.size == 1:
            return 2**62
        most = np.array([self._cross.least_bytes(delay_s, loss) * self.local_size], np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, most, MPI.MAX)
        return int(most[0])

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """As `Collective.broadcast`. Collective over the ranks."""
        self._on_ring().broadcast(array, root)

    def free(self) -> None:
        """Give everything back; arrays made here must not be used any more. Collective over the ranks."""
        self._plans.clear()
        self._views.clear()
        self._stage, self._marks = [], None
        for window in self._windows:
            window.free()
        self._cross.free()
        if self._ring is not None:
            self._ring.free()
        self.node.Free()

    # ---- inside

    def _meet(self) -> None:
        """Wait for all ranks of the node, and see what they wrote before they came."""
        if self.local_size == 1:
            return
        if self._kernels is None:
            self._table.win.Sync()
            self.node.Barrier()
            self._table.win.Sync()
            return
        self._turn = (self._turn + 1) % 2**32
        how, tries = CROWDED if self._crowded else ALONE, 0
        while not self._kernels.meet(self._marks, self.local_rank, self._turn, how if tries < PATIENCE else LATE):
            self.node.Iprobe()  # messages of earlier calls may need it to move on; and Python handles signals here
            tries += 1

    def _sum(self, targets: tuple, sources: tuple) -> None:
        """Make every target the sum of the sources in their order; targets may be sources."""
        if self._kernels is not None:
            self._kernels.sum_arrays(targets, sources)
            return
        block = BLOCK_BYTES // targets[0].itemsize
        late = any(targets[0] is source for source in sources[1:])
        if late:    # its own numbers are wanted after others have been added
            targets = (np.empty_like(targets[0][:block]), *targets)
        for start in range(0, targets[-1].size, block):
            piece = slice(start, start + block)
            total = targets[0][:targets[-1][piece].size] if late else targets[0][piece]
            if targets[0] is not sources[0]:
                np.copyto(total, sources[0][piece])
            for source in sources[1:]:
                np.add(total, source[piece], total)
            for target in targets[1:]:
                np.copyto(target[piece], total)

    def _order(self) -> list[int]:
        """The local ranks whose numbers a reduce-scatter adds, in their order."""
        return [self.local_rank, *(rank for rank in range(self.local_size) if rank != self.local_rank)]

    def _fill(self, array: np.ndarray | None, words: np.ndarray | None) -> tuple[tuple | None, tuple | None]:
        """Put this rank's numbers on the stage; return those of all local ranks, to be read after the next meeting."""
        self._half = 1 - self._half
        parts = []
        for values, start in ((array, 8 * WORDS), (words, 0)):
            slots = None
            if values is not None:
                slots = self._slots(values, start)
                np.copyto(slots[self.local_rank], values)
            parts.append(slots)
        return parts[0], parts[1]

    def _slots(self, values: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
        """Return for every local rank a view like `values` of the present half of its stage, from byte `start` on."""
        key = (self._half, start, values.dtype.char, values.size)
        slots = self._views.get(key)
        if slots is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            where = slice(start, start + values.nbytes)
            slots = tuple(memory[self._half, where].view(values.dtype) for memory in self._stage)
            self._views[key] = slots
        return slots

    def _on_ring(self) -> Ring:
        if self._ring is None:
            self._ring = Ring(self.comm, small_bytes=small_limit(self.size, self._cross.size == 1))
        return self._ring

    def _in_rank_order(self, bounds: Bounds) -> Bounds:
        """Bounds are by part; the ring over all ranks needs them by rank, which is the same on one node."""
        if self._cross.size > 1:
            raise SharedUnavailable("ordinary arrays in parts between several nodes: make them with `empty`")
        return bounds

    def _plan(self, array: np.ndarray, bounds: Bounds | None) -> "_Plan | None":
        """The views that a phase works on; None for an array outside node memory. `bounds` None: equal shares."""
        plan = self._plans.find(_Plan, array, bounds)
        if plan is None:
            address = MPI.Get_address(array)
            window = next((w for w in self._windows if w.start <= address < w.stop), None)
            if window is not None:
                starts = [array.size * part // self.size for part in range(self.size + 1)] if bounds is None else bounds
                plan = _Plan(self, window, array, [int(start) for start in starts], address)
                self._plans.add(plan, _Plan, array, bounds)
        return plan

    def _plan_in_node(self, array: np.ndarray, bounds: Bounds) -> "_Plan":
        plan = self._plan(array, bounds)
        if plan is None:
            raise SharedUnavailable("only arrays in node memory will do here: make them with `empty` or `common`")
        return plan


class _Plan:
    """The views of one array that this rank works on.

    share : the run of parts of this local rank in its own memory; shares : in the memory of all local ranks, this one
        first; sources : in the memory of those that a reduce-scatter adds, in their order.
    others : pairs of the other local ranks' runs, in this rank's memory and in theirs.
    inner : bounds of the parts within the share. common : there is one array for all ranks of the node.
    """

    busy = False

    def __init__(self, shared: Shared, window: "_Window", array: np.ndarray, bounds: list[int], address: int):
        nodes, me, offset = shared._cross.size, shared.local_rank, address - window.start
        cuts = bounds[::nodes]
        run = slice(cuts[me], cuts[me + 1])
        self.share = array[run]
        self.inner = np.array(bounds[me * nodes:(me + 1) * nodes + 1], np.int64) - cuts[me]
        self.shares, self.others, self.common = (self.share,), [], window.common
        self.sources = self.shares
        if window.common:
            return
        neighbours = [memory[offset:offset + array.nbytes].view(array.dtype) for memory in window.memories]
        for rank in range(shared.local_size):
            if rank != me:
                self.shares += (neighbours[rank][run],)
                theirs = slice(cuts[rank], cuts[rank + 1])
                self.others.append((array[theirs], neighbours[rank][theirs]))
        self.sources = tuple(self.share if rank == me else neighbours[rank][run] for rank in shared._order())

    def free(self) -> None:
        """Do nothing: the window gives the memory back."""


class _Later:
    """A collective between the nodes that is under way, and what its ranks do on the node when it has ended."""

    def __init__(self, across: Any, then: Callable[[], None]):
        self._across, self._then = across, then

    @property
    def began(self) -> int:
        return self._across.began

    @property
    def ended(self) -> int:
        return self._across.ended

    def wait(self) -> None:
        """Return when the result stands for all ranks of the node. Collective, in the order of the starts."""
        self._across.wait()
        self._then()


class _Window:
    """Shared memory of the ranks of one node; `fill` before the first use.

    Collective over `node`. MPI libraries take the file's name away at once, so that a killed job leaves none.
    """

    def __init__(self, node: MPI.Intracomm, num_bytes: int, common: bool):
        self.common, self._node = common, node
        room = -(-max(num_bytes, 1) // ALIGN_BYTES) * ALIGN_BYTES + ALIGN_BYTES
        try:
            self.win = MPI.Win.Allocate_shared(room if not common or node.rank == 0 else 0, 1, MPI.INFO_NULL, node)
        except MPI.Exception as error:
            # Other ranks may be inside the call for ever: the job ends by this one's word.
            raise Unavailable(f"{node.size} x {room / 2**20:.1f} MiB of shared memory cannot be allocated "
                              f"({error.Get_error_string()}); give --sync ring, or {node_memory.advice()}.") from None
        self.win.Lock_all(MPI.MODE_NOCHECK)
        self.memories = []
        for rank in range(1 if common else node.size):
            memory, _ = self.win.Shared_query(rank)
            raw = np.frombuffer(memory, np.uint8, room)
            shift = -raw.ctypes.data % ALIGN_BYTES
            self.memories.append(raw[shift:shift + room - ALIGN_BYTES])
        own = self.memories[0 if common else node.rank]
        self.start = own.ctypes.data
        self.stop = self.start + own.nbytes

    def fill(self) -> int:
        """Write zeros into what this rank owns of it and return how many bytes there is no memory for.

        Collective over the node. First touch by the owner: its own memory on a machine with several. MPI libraries
        promise a file's length but reserve no memory for it. So the kernel does the writing, by a read from
        /dev/zero: it ends early where the file system is full, and a store of our own would be a bus error.
        What has been touched stays.
        """
        missing = 0
        if not self.common or self._node.rank == 0:
            own = memoryview(self.memories[0 if self.common else self._node.rank])
            with open("/dev/zero", "rb", buffering=0) as zeros:
                at = 0
                while at < len(own):
                    try:
                        at += zeros.readinto(own[at:])
                    except OSError:
                        missing = len(own) - at
                        break
        self.win.Sync()
        self._node.Barrier()
        self.win.Sync()
        return missing

    def free(self) -> None:
        self.memories = []
        self.win.Unlock_all()
        self.win.Free()


def _too_small(needed: int) -> str:
    """Return the sentence for a shared-memory file system with less than `needed` bytes; "" when there are enough."""
    free = node_memory.free_bytes()
    if free >= needed:
        return ""
    return (f"/dev/shm on {MPI.Get_processor_name()} has {free / 2**20:.1f} MiB free of the {needed / 2**20:.1f} MiB "
            f"needed; {node_memory.advice()}")
