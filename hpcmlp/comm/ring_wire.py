"""The ring with narrow numbers on the wire: both halves rounded, and what was rounded away fed back.

Reduce-scatter of float32 arrays: hop k as in `ring`: rank r adds its numbers, in float32, to the decoded partial sum
that came in, and rounds once, when it encodes the new partial sum S for rank r + 1. The last rank of a part, its owner,
adds without rounding. So each rank rounds each element of all parts but its own once a call.

Error feedback: what this rank rounded away, S - decode(encode(S)), is kept per element and added to its own numbers of
the same array in the next call, before it rounds again. That is the error of the whole partial sum, not only of this
rank's share, so nothing is lost on any hop: over T calls the results add up to the exact sum less the ranks' present
residuals, and the error of the mean falls as 1/T. (Seide et al., "1-bit stochastic gradient descent", Interspeech
2014; Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019.) Residuals that are not finite become 0. A step
that is skipped takes the residuals of its own call along. Only the sum of the ranks' residuals matters: `settle` gives
it for a checkpoint and leaves it with the rank before the owner, so that a run that goes on and one that resumes from
the checkpoint, at the same rank count, hold the same.

`gather_towards` is the narrow second half: the owner of a part holds its master; it sends master - replica, encoded,
and every rank, the owner too, adds the decoded difference to its replica. Replicas stay float32 with the same bits on
all ranks, and what was rounded away is in the next difference: an element is never further from its master than one
rounding of its last way. (P. Richtarik et al., "EF21", NeurIPS 2021; the sending owner is the server of H. Tang et
al., "DoubleSqueeze", ICML 2019.)

`all_gather` and control words (float64, exact) and float64 arrays stay as in `ring`.

Cost: bytes of both halves fall to 1/2 (bf16, float16) or about 1/4 (int8); memory grows by the residuals, 4 bytes an
element, and by the messages on their way, 2 times 2 (1) bytes an element.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcmlp.comm.exact_sum import join, split
from hpcmlp.comm.messages import LIMIT_BYTES, pieces
from hpcmlp.comm.ring import DEPTH, Bounds, Ring, _All, _Plan, _ReduceScatter, work_buffers
from hpcmlp.comm.wire import make_format
from hpcmlp.traffic import SEGMENT_BYTES


class WireRing(Ring):
    """The ring that sends float32 arrays in numbers of the format `wire`.

    Collective over `comm`, which is duplicated. Residuals are kept per array and bounds, with the array itself, until
    `forget` or `free`: made for arrays that are kept, as a step's gradients are.

    Parameters
    ----------
    wire : "bf16", "float16" or "int8".
    feedback : keep residuals and add them in the next call.
    segment_bytes : size of one message's values as float32.
    """

    def __init__(self, comm: MPI.Intracomm, wire: str, feedback: bool = True, segment_bytes: int = SEGMENT_BYTES,
                 limit_bytes: int = LIMIT_BYTES, small_bytes: int | None = None):
        super().__init__(comm, segment_bytes, limit_bytes, small_bytes)
        self.narrow = self.size > 1
        self.wire, self.feedback = make_format(wire, max(1, self.segment_bytes // 4)), feedback
        self._residuals: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def _is_small(self, array: np.ndarray, share: int = 1) -> bool:
        return array.dtype != np.float32 and super()._is_small(array, share)

    def _reduce_plan(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None) -> _Plan:
        """Plan a `reduce_scatter`: a float32 array is rounded on its way, `words` are exact."""
        if array.dtype != np.float32:
            return super()._reduce_plan(array, bounds, words)
        return self._plan(_NarrowReduceScatter, array, bounds, 0 if words is None else words.size)

    def gather_towards(self, array: np.ndarray, bounds: Bounds, kept: np.ndarray) -> None:
        """Move every part towards what its owner has in its place, alike on all ranks, by a rounded difference.

        Collective over `comm`.

        Parameters
        ----------
        array : float32, contiguous. Before, this rank's part holds its master, other parts the replica that all ranks
            have; after, all parts hold the moved replica, with the same bits on all ranks.
        bounds : (size+1,) ascending element offsets, the same on all ranks; parts may be empty.
        kept : float32, contiguous, as long as this rank's part: before, its replica; after, its master.
        """
        if self.size == 1:
            np.copyto(kept, array[int(bounds[0]):int(bounds[1])])
        else:
            self._run(self._plan(_NarrowAllGather, array, bounds, 0), kept)

    def start_gather_towards(self, array: np.ndarray, bounds: Bounds, kept: np.ndarray) -> Any:
        """Start a `gather_towards` and return it at once: `wait()` it, and leave `kept` alone until then.

        Collective over `comm`, as `start_reduce_scatter`.
        """
        if self.size == 1:
            self.gather_towards(array, bounds, kept)
        return self._start(self._plan(_NarrowAllGather, array, bounds, 0) if self.size > 1 else None, kept)

    def settle(self, array: np.ndarray, bounds: Bounds, out: np.ndarray) -> None:
        """Write into `out` what all ranks' reductions of `array` still owe it, and keep that as `put_residual` does.

        Collective over `comm`. `out`, like `array`, becomes the sum of the ranks' residuals, with the same bits on all
        ranks; it is 0 outside the bounds.
        """
        rest = self._residual(array, [int(bound) for bound in bounds])
        out[...] = 0.0 if rest is None else rest
        if self.size > 1:
            self._run(super()._reduce_plan(out, bounds, None), None)
        self.all_gather(out, bounds)
        self.put_residual(array, bounds, out)

    def put_residual(self, array: np.ndarray, bounds: Bounds, owed: np.ndarray) -> None:
        """Take from `owed`, which all ranks hold alike, as the residual of `array` the part of the next rank's.

        Local. With the rank before the owner a residual rounds once more only.
        """
        rest = self._residual(array, [int(bound) for bound in bounds])
        if rest is not None:
            start, stop = int(bounds[self._right]), int(bounds[self._right + 1])
            rest[...] = 0.0
            rest[start:stop] = owed[start:stop]

    def forget(self) -> None:
        """Drop the prepared messages, the residuals and the references to the caller's arrays. Local."""
        super().forget()
        self._residuals.clear()

    def _residual(self, array: np.ndarray, bounds: list[int]) -> np.ndarray | None:
        """Return the residual of an array, which outlives the plans of the many that a step may use."""
        if not self.feedback or self.size == 1:
            return None
        key = (array.__array_interface__["data"][0], array.size, tuple(bounds))
        if key not in self._residuals:
            # The array is kept, so that its address cannot come to mean another one.
            self._residuals[key] = (array, np.zeros(array.size, np.float32))
        return self._residuals[key][1]


class _NarrowReduceScatter(_ReduceScatter):
    """The messages of one reduce-scatter in a narrow format."""

    def __init__(self, ring: WireRing, array: np.ndarray, bounds: list[int], num_words: int, tag: int):
        _Plan.__init__(self, array, ring._host)
        comm, rank, size = ring.comm, ring.rank, ring.size
        self._wire = ring.wire
        residual = ring._residual(array, bounds)
        parts = ring._parts(array, bounds)
        rests = [[None] * len(part) for part in parts] if residual is None else ring._parts(residual, bounds)

        def outgoing(part: int) -> list[tuple]:
            steps = []
            for own, rest in zip(parts[part], rests[part], strict=True):
                out = np.empty(ring.wire.num_bytes(own.size), np.uint8)
                steps.append((own, rest, out, self._prepare_send(ring, out, tag)))
            return steps

        self._start = outgoing((rank - 1) % size)
        works, hops, buffers = [], [], work_buffers(parts, self.sums)
        for hop in range(size - 1):
            part = (rank - 2 - hop) % size
            hops.append(outgoing(part) if hop < size - 2 else [(own, None, None, None) for own in parts[part]])
            for own in parts[part]:
                work = buffers[len(works) % DEPTH][:ring.wire.num_bytes(own.size)]
                self._receives.append(comm.Recv_init(work, ring._left, tag))
                works.append(work)
        # A work buffer takes segment i + DEPTH as soon as segment i has been added.
        incoming = zip(self._receives, works, [*self._receives[DEPTH:], *[None] * DEPTH], strict=False)
        self._hops = [[(*next(incoming), *step) for step in steps] for steps in hops]
        self._posted = self._receives[:DEPTH]
        self._prepare_words(ring, num_words, tag + 1)
        self._sent = _All(self.sends)

    def steps(self, words: np.ndarray | None) -> Iterator[Any]:
        rows = self._rows
        if words is not None:
            split(words, rows[0])
        MPI.Prequest.Startall(self._word_sends[:1])
        for own, rest, out, send in self._start:
            self._send(own, rest, out, send)
        for hop, steps in enumerate(self._hops):
            if self._word_sends:
                yield self._word_receives[hop]
                np.add(rows[hop + 1], rows[0], rows[hop + 1])
                if hop + 1 < len(self._hops):
                    self._word_sends[hop + 1].Start()
            if hop + 1 == len(self._hops):
                self.all_started = True
            for receive, work, later, own, rest, out, send in steps:
                yield receive
                with quiet():
                    self._wire.add(work, own)
                if later is not None:
                    later.Start()
                if send is not None:
                    self._send(own, rest, out, send)
        yield self._sent
        if words is not None:
            join(rows[-1], words)

    def _send(self, own: np.ndarray, rest: np.ndarray | None, out: np.ndarray, send: MPI.Prequest) -> None:
        """Send the partial sum `own` on, and keep in `rest` what the narrow format leaves of it."""
        with quiet():
            if rest is None:
                self._wire.encode(own, out)
            else:
                self._wire.round(own, rest, out)
        send.Start()


class _NarrowAllGather(_Plan):
    """The messages of one gathering of rounded differences; a segment goes on before it is decoded."""

    def __init__(self, ring: WireRing, array: np.ndarray, bounds: list[int], num_words: int, tag: int):
        super().__init__(array, ring._host)
        comm, rank, size = ring.comm, ring.rank, ring.size
        self._wire, self._segment_bytes = ring.wire, ring.segment_bytes
        parts = ring._parts(array, bounds)
        self._own, self._others = [], []

        def buffer(values: np.ndarray) -> np.ndarray:
            return np.empty(ring.wire.num_bytes(values.size), np.uint8)

        for own in parts[rank]:
            data = buffer(own)
            self._own.append((own, data, self._prepare_send(ring, data, tag)))
        for hop in range(size - 1):
            for values in parts[(rank - 1 - hop) % size]:
                data = buffer(values)
                self._receives.append(comm.Recv_init(data, ring._left, tag))
                send = self._prepare_send(ring, data, tag) if hop < size - 2 else None
                self._others.append((self._receives[-1], values, data, send, hop == size - 2))
        self._posted = self._receives
        self._sent = _All(self.sends)

    def steps(self, kept: np.ndarray) -> Iterator[Any]:
        for (own, data, send), replica in zip(self._own, pieces(kept, self._segment_bytes), strict=True):
            with quiet():
                self._wire.towards(own, replica, data)
            send.Start()
        for receive, values, data, send, last_hop in self._others:
            self.all_started = last_hop
            yield receive
            if send is not None:
                send.Start()
            with quiet():
                self._wire.add(data, values)    # reading what is being sent is allowed
        self.all_started = True
        yield self._sent


def quiet() -> np.errstate:
    """Return the context in which NumPy says nothing of numbers that are not finite: the control words do. Local.

    Only around arithmetic: what a generator sets lasts over its yields, in the code of whoever drives it.
    """
    return np.errstate(over="ignore", invalid="ignore")
