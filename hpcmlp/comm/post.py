"""Pushes and pulls at any time: what workers and dedicated servers send each other when they are not in step.

A worker's turn: `push` sends every server its slice of the gradient and, once all slices have left, the words to
server 0; `pull` waits for server 0's grant and for every server's slice of the parameters. Server 0 decides in which
order pushes are added, updates made and slices given, and passes each decision on to the other servers as an order;
they carry the orders out in the order of their coming. MPI does not let messages of one pair overtake each other, so
all servers make the same updates from the same pushes, and every pull is one version of the whole vector.

Words leave last: server 0 never knows of a push of which a slice could still be missing elsewhere, even if the worker
stops for ever in the next moment.

Two-sided, persistent messages rather than MPI-3 windows (put and get on the server's memory). Measured, one server,
push and pull of 4 MiB on one node: 36 against 37 ms with one worker, 48 against 20 ms with three, all on two loaded
cores (benchmarks/notes/2026-11-24-server.md): windows win where memory is shared. There a server in step needs neither
(`comm.served_node`); over a network a put is a message too, and a second one must tell the server that there is
something to add; its progress is the library's choice, while here all progress is made by ranks that sit in MPI: a
server whenever it does not add, update or copy, a worker whenever it waits. And a window cannot be freed or made once a
worker is lost.

What a server gives is a copy of its slice, one buffer per worker: it may update while a copy is on its way, and a
worker that stops while it receives holds up nobody. A buffer is free again when its worker has pushed.
"""

import os
import time
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from hpcmlp.comm.messages import LIMIT_BYTES, pieces
from hpcmlp.comm.served import Roles

SLICE_TAG, WORDS_TAG, GRANT_TAG, PARAMS_TAG, ORDER_TAG = 1, 2, 3, 4, 5
ORDER_SLOTS = 64        # orders that may be on their way to one server
EAGER_S = 1e-4          # how long a server looks for messages before it gives its core away between looks
PAUSE_S = 5e-5


def look(request_tests: object, give_up_s: float) -> list[int] | None:
    """Return what `request_tests()` returns once it is not empty, None after `give_up_s` seconds. Local.

    Looks without rest for a moment, then with short sleeps: a core that a waiting server burns is one that a worker
    of the same node lacks.
    """
    begin = time.perf_counter()
    while True:
        found = request_tests()
        if found:
            return found
        waited = time.perf_counter() - begin
        if waited > give_up_s:
            return None
        if waited < EAGER_S:
            os.sched_yield()
        else:
            time.sleep(PAUSE_S)


class Post:
    """The prepared messages of this rank, worker or dedicated server.

    Collective over `comm`, which is duplicated.

    Parameters
    ----------
    roles : who serves and who works; the servers must be dedicated.
    bounds : (servers + 1,) element offsets of the slices.
    params, grads : (bounds[-1],) float32; a worker sends from `grads` and receives into `params`.
    num_words, num_facts : float64 numbers of a worker's words, and of a grant or an order.
    """

    def __init__(self, comm: MPI.Intracomm, roles: Roles, bounds: Sequence[int], params: np.ndarray,
                 grads: np.ndarray, num_words: int, num_facts: int, limit_bytes: int = LIMIT_BYTES):
        self.comm, self.rank, self.roles = comm.Dup(), comm.rank, roles
        self.slices = [(int(a), int(b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        self._limit = limit_bytes
        if self.rank < roles.servers:
            self._open_server(params.dtype, num_words, num_facts)
        else:
            self._open_worker(params, grads, num_words, num_facts)

    # ---- the worker's side

    def _open_worker(self, params: np.ndarray, grads: np.ndarray, num_words: int, num_facts: int) -> None:
        comm = self.comm
        self.words, self.grant = np.zeros(num_words), np.zeros(num_facts)
        self._pushes = [comm.Send_init(piece, server, SLICE_TAG) for server, (a, b) in enumerate(self.slices)
                        for piece in pieces(grads[a:b], self._limit)]
        self._words_send = comm.Send_init(self.words, 0, WORDS_TAG)
        self._pulls = [comm.Recv_init(self.grant, 0, GRANT_TAG)]
        self._pulls += [comm.Recv_init(piece, server, PARAMS_TAG) for server, (a, b) in enumerate(self.slices)
                        for piece in pieces(params[a:b], self._limit)]

    def push(self, gradient: bool = True) -> None:
        """Send the slices of `grads`, if `gradient`, then `words`; receives for the answer are posted first. Local."""
        MPI.Prequest.Startall(self._pulls)
        if gradient:
            MPI.Prequest.Startall(self._pushes)
            MPI.Request.Waitall(self._pushes)
        self._words_send.Start()
        self._words_send.Wait()

    def pull(self) -> np.ndarray:
        """Return the grant that answers the last push; `params` is then the granted version. Local."""
        MPI.Request.Waitall(self._pulls)
        return self.grant

    # ---- the servers' side

    def _open_server(self, dtype: np.dtype, num_words: int, num_facts: int) -> None:
        comm, workers = self.comm, self.roles.workers
        start, stop = self.slices[self.rank]
        shape = (len(workers), stop - start)
        self._in, self._out = np.zeros(shape, dtype), np.zeros(shape, dtype)
        self._grants = np.zeros((len(workers), num_facts))
        self.words = np.zeros((len(workers), num_words))
        self._slice_receives = [[comm.Recv_init(piece, rank, SLICE_TAG) for piece in pieces(row, self._limit)]
                                for rank, row in zip(workers, self._in, strict=True)]
        self._gives = [[comm.Send_init(piece, rank, PARAMS_TAG) for piece in pieces(row, self._limit)]
                       for rank, row in zip(workers, self._out, strict=True)]
        self._word_receives: list[MPI.Request] = []
        if self.rank == 0:
            for k, rank in enumerate(workers):
                self._gives[k].insert(0, comm.Send_init(self._grants[k], rank, GRANT_TAG))
                self._word_receives.append(comm.Recv_init(self.words[k], rank, WORDS_TAG))
            MPI.Prequest.Startall(self._word_receives)
        for receives in self._slice_receives:
            MPI.Prequest.Startall(receives)
        self._taken = [False] * len(workers)
        self._order = np.zeros(num_facts)
        self._order_slots = np.zeros((ORDER_SLOTS, num_facts))
        self._order_sends: list[list[MPI.Request]] = [[] for _ in range(ORDER_SLOTS)]
        self._order_number = 0

    def arrived(self, give_up_s: float) -> list[int]:
        """Return the workers (numbers, not ranks) whose words have come, none after `give_up_s` seconds. Server 0."""
        return look(lambda: MPI.Request.Testsome(self._word_receives), give_up_s) or []

    def take(self, worker: int) -> np.ndarray:
        """Return this server's slice of the gradient that `worker` has pushed, valid until `give`. Local."""
        MPI.Request.Waitall(self._slice_receives[worker])
        self._taken[worker] = True
        return self._in[worker]

    def give(self, worker: int, part: np.ndarray, facts: np.ndarray) -> None:
        """Send `worker` a copy of this server's slice `part`; server 0 adds the grant `facts`. Local."""
        MPI.Request.Waitall(self._gives[worker])    # done: the worker has pushed since
        if self._taken[worker]:
            self._taken[worker] = False
            MPI.Prequest.Startall(self._slice_receives[worker])
        if self.rank == 0:
            self._word_receives[worker].Start()
        self._out[worker] = part
        self._grants[worker] = facts
        MPI.Prequest.Startall(self._gives[worker])

    def order(self, facts: np.ndarray) -> None:
        """Pass a decision on to all other servers. Server 0, local."""
        if self.roles.servers == 1:
            return
        slot = self._order_number % ORDER_SLOTS
        self._order_number += 1
        MPI.Request.Waitall(self._order_sends[slot])
        self._order_slots[slot] = facts
        self._order_sends[slot] = [self.comm.Isend(self._order_slots[slot], server, ORDER_TAG)
                                   for server in range(1, self.roles.servers)]

    def next_order(self) -> np.ndarray:
        """Return the next decision of server 0. The other servers, local."""
        request = self.comm.Irecv(self._order, 0, ORDER_TAG)
        while look(lambda: [0] if request.Test() else [], 1.0) is None:
            pass
        return self._order

    def forget(self, worker: int) -> None:
        """Listen to `worker` no more. Local."""
        if self.rank == 0:
            self._word_receives[worker] = MPI.REQUEST_NULL

    def free(self) -> None:
        """Give everything back, when no rank was lost.

        Collective over `comm`.
        """
        if self.rank < self.roles.servers:
            idle = [*self._word_receives, *(r for rs in self._slice_receives for r in rs)]
            for request in idle:
                request.Cancel()
            MPI.Request.Waitall(idle)
            done = [*idle, *(r for rs in self._gives for r in rs)]
            MPI.Request.Waitall([r for rs in self._order_sends for r in rs])
        else:
            done = [*self._pushes, self._words_send, *self._pulls]
        MPI.Request.Waitall(done)
        for request in done:
            request.Free()
        self.comm.Free()
