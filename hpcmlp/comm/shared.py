"""Collectives through the node's shared memory, and the ring among ranks with one local rank between nodes.

Arrays made by `empty` lie in MPI-3 shared windows: every rank of a node reads its neighbours' arrays in place. In a
reduce-scatter each rank sums its share from all neighbours' memory, cache block by cache block; then the ranks with
the same local rank reduce that share over the nodes by `Ring`, so that all network links work at once. An array made
by `common` exists once per node: its all-gather is a barrier on the node and the ring between nodes.

Part p of the bounds belongs to the rank with local_rank * num_nodes + cross_rank = p, so that the share of a local
rank is one contiguous run of parts. A sum begins with its owner's own numbers and goes on in the
order of the local ranks, then around the ring: the same bits in every run, and on all ranks.

Cost on a node, n bytes, P ranks: each rank reads n and writes n/P in a reduce-scatter; nothing is sent. Between N nodes
of L ranks each rank sends (N-1)/N n/L in each half. Memory order: each phase ends with Win.Sync and a barrier (MPI-4.1
section 12.5.4, separate accesses by load and store).
After T. Hoefler et al., "MPI + MPI: a new hybrid approach to parallel programming", Computing 95 (2013).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcmlp import node_memory
from hpcmlp.comm.messages import broadcast_bytes
from hpcmlp.comm.ring import Bounds, Ring
from hpcmlp.comm.topology import Topology
from hpcmlp.errors import Unavailable

BLOCK_BYTES = 1 << 17  # of one source while summing: the sources of a block stay in the cache
STAGE_BYTES = 1 << 16  # larger ordinary arrays go round the ring
WORDS = 64
ALIGN_BYTES = 64
SPARE_BYTES = 1 << 20  # of /dev/shm, for what the MPI library adds to a window
# MPICH maps memory for a communicator's small collectives at the sixth of a kind, and dies of a bus error when there is
# none left: let it do so before we take any.
SETTLING_CALLS = 8


class SharedUnavailable(Exception):
    """Why node memory cannot be used here; all ranks raise it alike."""


class Shared:
    """Collectives of all ranks, through memory inside a node.

    Collective over `topology.comm`. Raises SharedUnavailable, on all ranks, when nodes hold different numbers of ranks
    or the shared-memory file system is too small for a first window; nothing stays allocated then. `make_cross` makes
    the ring between nodes from the communicator of the ranks with one local rank; a `ring_wire.WireRing` makes only
    what crosses the network narrow.
    """

    WAITS = ("_meet",)  # methods that only wait for other ranks, for whoever measures them

    starts = True

    def __init__(self, topology: Topology, make_cross: Callable[[MPI.Intracomm], Ring] = Ring):
        self.topology = topology
        self.comm, self.node = topology.comm, topology.node.Dup()
        self.rank, self.size = topology.rank, topology.size
        self.local_rank, self.local_size = topology.local_rank, topology.local_size
        self.part = topology.local_rank * topology.num_nodes + topology.cross_rank
        self._cross = make_cross(topology.cross)
        self.narrow, self.threads = self._cross.narrow, self._cross.threads
        self._ring: Ring | None = None
        self._windows: list[_Window] = []
        self._plans: dict[tuple, Any] = {}
        self._stage = self._words = []
        try:
            self._check_even()
            for _ in range(SETTLING_CALLS):
                self._agree("")
                self.node.Barrier()
            stage = self._window(STAGE_BYTES, common=False)
            words = self._window(8 * WORDS, common=False)
        except SharedUnavailable:
            self.free()
            raise
        self._stage = [memory.view(np.uint8) for memory in stage.memories]
        self._words = [memory.view(np.float64) for memory in words.memories]
        self._word_table = words

    def _check_even(self) -> None:
        sizes = np.array([self.local_size, -self.local_size], np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, sizes, MPI.MAX)
        if sizes[0] != -sizes[1]:
            raise SharedUnavailable(f"nodes hold different numbers of ranks ({-sizes[1]} to {sizes[0]})")

    def empty(self, size: int, dtype: Any) -> np.ndarray:
        """Return a zeroed (size,) array that the ranks of this node read in place.

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
        """Sum over the ranks; this rank gets the sum of part `self.part`, in place.

        Collective over the ranks. As `Ring.reduce_scatter`, but for the order of the parts.
        """
        window = self._find(array)
        if window is None:
            self._on_ring().reduce_scatter(array, self._in_rank_order(bounds), words)
            return
        share, inner = self._reduce_on_node(window, array, bounds, words)
        if self._cross.size > 1:
            self._cross.reduce_scatter(share, inner, words)
        self._meet(window)

    def start_reduce_scatter(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None = None) -> Any:
        """Sum over the ranks of the node, start to sum over the nodes, and return that, to `wait()` for.

        Collective over the ranks: waits for the ranks of the node, not for other nodes. Until the wait has returned
        the ranks of the node read `array`. Waits come in the order of the starts, with no start between them.
        """
        window = self._find(array)
        if window is None:
            return self._on_ring().start_reduce_scatter(array, self._in_rank_order(bounds), words)
        share, inner = self._reduce_on_node(window, array, bounds, words)
        return _Later(self._cross.start_reduce_scatter(share, inner, words), lambda: self._meet(window))

    def _reduce_on_node(self, window: "_Window", array: np.ndarray, bounds: Bounds,
                        words: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Sum this local rank's share of `array`, and `words`, over the node; return the share and its bounds."""
        sources, _, share, inner = self._plan(window, array, bounds)
        if words is not None:
            self._words[self.local_rank][:words.size] = words
        self._meet(window)
        for piece, others in sources:
            for other in others:
                np.add(piece, other, piece)
        if words is not None:
            words[:] = self._words[0][:words.size]
            for slot in self._words[1:]:
                words += slot[:words.size]
        return share, inner

    def all_gather(self, array: np.ndarray, bounds: Bounds) -> None:
        """Copy every rank's part to all ranks, in place. Collective over the ranks."""
        window = self._find(array)
        if window is None:
            self._on_ring().all_gather(array, self._in_rank_order(bounds))
            return
        plan = self._plan(window, array, bounds)
        _, _, share, inner = plan
        if self._cross.size > 1:
            self._cross.all_gather(share, inner)
        self._spread(window, plan)

    def start_all_gather(self, array: np.ndarray, bounds: Bounds) -> Any:
        """Start an `all_gather` over the nodes and return it, to `wait()` for: then the node's ranks have it too.

        Collective over the ranks; nothing here waits. Waits come in the order of the starts.
        """
        window = self._find(array)
        if window is None:
            return self._on_ring().start_all_gather(array, self._in_rank_order(bounds))
        plan = self._plan(window, array, bounds)
        return _Later(self._cross.start_all_gather(plan[2], plan[3]), lambda: self._spread(window, plan))

    def start_gather_towards(self, array: np.ndarray, bounds: Bounds, kept: np.ndarray) -> Any:
        """Start a `gather_towards` and return it, as `start_all_gather`. Collective over the ranks."""
        window = self._window_of(array)
        plan = self._plan(window, array, bounds)
        return _Later(self._cross.start_gather_towards(plan[2], plan[3], kept), lambda: self._spread(window, plan))

    def advance(self) -> bool:
        """Take what was started as far as it goes without waiting; return whether nothing is under way. Local."""
        on_ring = self._ring is None or self._ring.advance()
        return self._cross.advance() and on_ring

    def gather_towards(self, array: np.ndarray, bounds: Bounds, kept: np.ndarray) -> None:
        """Move every part towards what its owner has in its place, as `WireRing.gather_towards` between the nodes.

        Collective over the ranks. Only with a narrow ring between nodes, and for arrays made here.
        """
        window = self._window_of(array)
        plan = self._plan(window, array, bounds)
        _, _, share, inner = plan
        self._cross.gather_towards(share, inner, kept)
        self._spread(window, plan)

    def settle(self, array: np.ndarray, bounds: Bounds, out: np.ndarray) -> None:
        """Write into `out` what the reductions of `array` still owe it, as `WireRing.settle` does between the nodes.

        Collective over the ranks. `array` and `out` are arrays made here.
        """
        _, _, share, inner = self._plan(self._window_of(array), array, bounds)
        _, _, share_out, _ = self._plan(self._window_of(out), out, bounds)
        self._cross.settle(share, inner, share_out)
        self.all_gather(out, bounds)

    def put_residual(self, array: np.ndarray, bounds: Bounds, owed: np.ndarray) -> None:
        """Keep of `owed` what `WireRing.put_residual` keeps of this rank's share. Local."""
        _, _, share, inner = self._plan(self._window_of(array), array, bounds)
        start = int(bounds[self.local_rank * self._cross.size])
        self._cross.put_residual(share, inner, owed[start:start + share.size])

    def _spread(self, window: "_Window", plan: tuple) -> None:
        """Let the ranks of the node have each other's finished shares."""
        _, own, _, _ = plan
        self._meet(window)
        if window.common:
            return
        for mine, theirs in own:
            np.copyto(mine, theirs)
        self._meet(window)

    def all_reduce(self, array: np.ndarray, words: np.ndarray | None = None) -> None:
        """Replace `array` by its sum over the ranks, with the same bits on all of them. Collective over the ranks."""
        if self._find(array) is None:
            if array.nbytes <= STAGE_BYTES and words is None:
                self._all_reduce_small(array)
            else:
                self._on_ring().all_reduce(array, words)
            return
        bounds = [array.size * part // self.size for part in range(self.size + 1)]
        self.reduce_scatter(array, bounds, words)
        self.all_gather(array, bounds)

    def _all_reduce_small(self, array: np.ndarray) -> None:
        slots = [memory[:array.nbytes].view(array.dtype) for memory in self._stage]
        np.copyto(slots[self.local_rank], array)
        self._meet(self._word_table)
        np.copyto(array, slots[0])
        for slot in slots[1:]:
            array += slot
        if self._cross.size > 1:
            self._cross.all_reduce(array)
        self._meet(self._word_table)

    def least_bytes(self, delay_s: float, loss: float = 0.05) -> int:
        """Return what `Ring.least_bytes` says of the ring between nodes, for arrays of which each rank carries a share.

        Collective over the ranks. On one node nothing is sent, so no array is large enough.
        """
        if self._cross.size == 1:
            return 2**62
        most = np.array([self._cross.least_bytes(delay_s, loss) * self.local_size], np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, most, MPI.MAX)
        return int(most[0])

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """Copy `array` of rank `root` to all ranks, in place. Collective over the ranks."""
        self._on_ring().broadcast(array, root)

    def free(self) -> None:
        """Give everything back; arrays made here must not be used any more. Collective over the ranks."""
        self._plans.clear()
        self._stage = self._words = []
        for window in self._windows:
            window.free()
        self._cross.free()
        if self._ring is not None:
            self._ring.free()
        self.node.Free()

    # ---- inside

    def _meet(self, window: "_Window") -> None:
        """Make this rank's writes visible, wait for all ranks of the node, and see theirs."""
        window.win.Sync()
        self.node.Barrier()
        window.win.Sync()

    def _find(self, array: np.ndarray) -> "_Window | None":
        address = array.__array_interface__["data"][0]
        for window in self._windows:
            if window.start <= address < window.stop:
                return window
        return None

    def _window_of(self, array: np.ndarray) -> "_Window":
        window = self._find(array)
        if window is None:
            raise SharedUnavailable("a narrow wire needs arrays in node memory: make them with `empty` or `common`")
        return window

    def _on_ring(self) -> Ring:
        if self._ring is None:
            self._ring = Ring(self.comm)
        return self._ring

    def _in_rank_order(self, bounds: Bounds) -> Bounds:
        """Bounds are by part; the ring over all ranks needs them by rank, which is the same on one node."""
        if self._cross.size > 1:
            raise SharedUnavailable("ordinary arrays in parts between several nodes: make them with `empty`")
        return bounds

    def _plan(self, window: "_Window", array: np.ndarray, bounds: Bounds) -> tuple:
        """Views that a phase works on, prepared once per (array, bounds)."""
        address = array.__array_interface__["data"][0]
        where = bounds.tobytes() if isinstance(bounds, np.ndarray) else tuple(bounds)
        key = (address, array.dtype.char, where)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make_plan(window, array, [int(b) for b in bounds], address)
        return plan

    def _make_plan(self, window: "_Window", array: np.ndarray, bounds: list[int], address: int) -> tuple:
        nodes, offset = self._cross.size, address - window.start
        neighbours = [memory[offset:offset + array.nbytes].view(array.dtype) for memory in window.memories]
        cuts = bounds[::nodes]  # shares of the local ranks
        start, stop = cuts[self.local_rank], cuts[self.local_rank + 1]
        block = max(1, BLOCK_BYTES // array.itemsize)
        sources = []
        if not window.common:
            for at in range(start, stop, block):
                piece = slice(at, min(at + block, stop))
                others = [n[piece] for r, n in enumerate(neighbours) if r != self.local_rank]
                sources.append((array[piece], others))
        own = [(array[cuts[r]:cuts[r + 1]], neighbours[r][cuts[r]:cuts[r + 1]])
               for r in range(self.local_size) if r != self.local_rank and not window.common]
        inner = np.array(bounds[self.local_rank * nodes:(self.local_rank + 1) * nodes + 1], np.int64) - start
        return sources, own, array[start:stop], inner


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
