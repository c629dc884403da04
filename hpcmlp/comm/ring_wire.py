"""The ring with narrow numbers on the wire: gradients rounded at each hop, and what was rounded away fed back.

Only the reduce-scatter of float32 arrays is narrow. Hop k as in `ring`: rank r adds its numbers, in float32, to the
decoded partial sum that came in, and rounds once, when it encodes the new partial sum S for rank r + 1. The last rank
of a part, its owner, adds without rounding. So each rank rounds each element of all parts but its own once a call.

Error feedback: what this rank rounded away, S - decode(encode(S)), is kept per element and added to its own numbers of
the same array in the next call, before it rounds again. That is the error of the whole partial sum, not only of this
rank's share, so nothing is lost on any hop: over T calls the results add up to the exact sum less the ranks' present
residuals, and the error of the mean falls as 1/T. (Seide et al., "1-bit stochastic gradient descent", Interspeech
2014; Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019.) Residuals that are not finite become 0.
They are this rank's own: no checkpoint holds them, and a run that resumes starts with none. A step that is skipped
takes the residuals of its own call along.

The all-gather stays float32: owners' float32 parameters reach all ranks with the same bits, as do control words
(float64, exact) and float64 arrays.

Cost: bytes of the first half fall to 1/2 (bf16, float16) or about 1/4 (int8); memory grows by the residuals, 4 bytes an
element, and the messages on their way. Rounding takes time: 16 MiB between two ranks of a node, where memory is the
wire, took 1.3 ms in float32, 8.5 in bf16, 9.9 in int8, 34 in float16 (2 cores, 2026-11-24). By these figures, not by
trial, narrow wires gain below about 5 Gbit/s between ranks, float16 below about 1.
"""

import math

import numpy as np
from mpi4py import MPI

from hpcmlp.comm.exact_sum import join, split
from hpcmlp.comm.messages import LIMIT_BYTES
from hpcmlp.comm.ring import DATA_TAG, DEPTH, SEGMENT_BYTES, Bounds, Ring, _ReduceScatter
from hpcmlp.comm.wire import make_format


class WireRing(Ring):
    """The ring whose reduce-scatter of float32 arrays sends numbers of the format `wire`.

    Collective over `comm`, which is duplicated. Residuals are kept per array and bounds, with the array itself, until
    `forget` or `free`: made for arrays that are kept, as a step's gradients are.

    Parameters
    ----------
    wire : "bf16", "float16" or "int8".
    feedback : keep residuals and add them in the next call.
    segment_bytes : size of one message's values as float32.
    """

    def __init__(self, comm: MPI.Intracomm, wire: str, feedback: bool = True, segment_bytes: int = SEGMENT_BYTES,
                 limit_bytes: int = LIMIT_BYTES):
        super().__init__(comm, segment_bytes, limit_bytes)
        most = max(1, self.segment_bytes // 4)
        self.wire, self.feedback = make_format(wire, most), feedback
        self._decoded = np.empty(most, np.float32)
        self._residuals: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def reduce_scatter(self, array: np.ndarray, bounds: Bounds, words: np.ndarray | None = None) -> None:
        """Sum over the ranks as `Ring.reduce_scatter` does; a float32 array is rounded on its way.

        Collective over `comm`. `words` are exact.
        """
        if array.dtype != np.float32:
            super().reduce_scatter(array, bounds, words)
        elif self.size > 1:
            plan = self._plan(_NarrowReduceScatter, array, bounds, 0 if words is None else words.size)
            with np.errstate(over="ignore", invalid="ignore"):  # gradients that are not finite are told by the words
                plan.run(words)

    def forget(self) -> None:
        """Drop the prepared messages, the residuals and the references to the caller's arrays. Local."""
        super().forget()
        self._residuals.clear()

    def _residual(self, array: np.ndarray, bounds: list[int]) -> np.ndarray | None:
        """Return the residual of an array, which outlives the plans of the many that a step may use."""
        if not self.feedback:
            return None
        key = (array.__array_interface__["data"][0], array.size, tuple(bounds))
        if key not in self._residuals:
            # The array is kept, so that its address cannot come to mean another one.
            self._residuals[key] = (array, np.zeros(array.size, np.float32))
        return self._residuals[key][1]


class _NarrowReduceScatter(_ReduceScatter):
    """The messages of one reduce-scatter in a narrow format, prepared."""

    def __init__(self, ring: WireRing, array: np.ndarray, bounds: list[int], num_words: int):
        comm, rank, size = ring.comm, ring.rank, ring.size
        self._wire, self._decoded = ring.wire, ring._decoded
        residual = ring._residual(array, bounds)
        parts = ring._parts(array, bounds)
        rests = [[None] * len(part) for part in parts] if residual is None else ring._parts(residual, bounds)
        self._sends, self._receives = [], []

        def outgoing(part: int) -> list[tuple]:
            steps = []
            for own, rest in zip(parts[part], rests[part], strict=True):
                out = np.empty(ring.wire.num_bytes(own.size), np.uint8)
                send = comm.Send_init(out, ring._right, DATA_TAG)
                self._sends.append(send)
                steps.append((own, rest, out, send))
            return steps

        self._start = outgoing((rank - 1) % size)
        works, hops = [], []
        for hop in range(size - 1):
            part = (rank - 2 - hop) % size
            hops.append(outgoing(part) if hop < size - 2 else [(own, None, None, None) for own in parts[part]])
            for own in parts[part]:
                work = ring._work[len(works) % DEPTH][:ring.wire.num_bytes(own.size)]
                self._receives.append(comm.Recv_init(work, ring._left, DATA_TAG))
                works.append(work)
        # A work buffer takes segment i + DEPTH as soon as segment i has been added.
        incoming = zip(self._receives, works, [*self._receives[DEPTH:], *[None] * DEPTH], strict=False)
        self._hops = [[(*next(incoming), *step) for step in steps] for steps in hops]
        self._prepare_words(ring, num_words)
        self._first = [*self._receives[:DEPTH], *self._word_receives, *self._word_sends[:1]]

    def run(self, words: np.ndarray | None) -> None:
        rows = self._rows
        if words is not None:
            split(words, rows[0])
        MPI.Prequest.Startall(self._first)
        for own, rest, out, send in self._start:
            self._round(own, rest, out, send)
        for hop, steps in enumerate(self._hops):
            if self._word_sends:
                self._word_receives[hop].Wait()
                np.add(rows[hop + 1], rows[0], rows[hop + 1])
                if hop + 1 < len(self._hops):
                    self._word_sends[hop + 1].Start()
            for receive, work, later, own, rest, out, send in steps:
                decoded = self._decoded[:own.size]
                receive.Wait()
                self._wire.decode(work, decoded)
                if later is not None:
                    later.Start()
                np.add(own, decoded, own)
                if send is not None:
                    self._round(own, rest, out, send)
        MPI.Request.Waitall(self._sends)
        if words is not None:
            join(rows[-1], words)

    def _round(self, own: np.ndarray, rest: np.ndarray | None, out: np.ndarray, send: MPI.Prequest) -> None:
        """Send the partial sum `own` on, and keep in `rest` what the narrow format leaves of it."""
        if rest is not None:
            np.add(own, rest, own)
        self._wire.encode(own, out)
        send.Start()
        if rest is not None:
            decoded = self._decoded[:own.size]
            self._wire.decode(out, decoded)     # reading what is being sent is allowed
            np.subtract(own, decoded, rest)
            if not math.isfinite(rest.sum()):
                rest[~np.isfinite(rest)] = 0
