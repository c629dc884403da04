"""Signs of life between nodes, past MPI: small UDP messages between each node's first rank and rank 0.

A star: every node tells rank 0 of the ranks that have stood still for a while, and rank 0 answers with its own signs
and whether stacks are wanted. Nothing here ever waits. A message lost is one sign of life less; several in a row, and
the link or the host is down. Messages carry a random word that went round by MPI, so that strangers are not heard.
"""

import json
import os
import socket
from typing import Any

from hpcmlp.comm.messages import broadcast_bytes

MOST_BYTES = 60_000     # of a message


class Beacon:
    """This node's end of the star. Collective over `topology.comm`; opens a socket on each node's first rank alone.

    Attributes
    ----------
    node : number of this node, 0 for that of rank 0.
    center : host, ranks and process numbers of rank 0's node, as they are when all begin.
    note : why there is no contact with rank 0's node, "" where there may be.
    """

    def __init__(self, topology: Any, ranks: list[int], pids: list[int]):
        self.node, self.note = topology.cross_rank, ""
        self._socket: socket.socket | None = None
        self._address: Any = None       # of rank 0
        self._nodes: dict[int, Any] = {}    # on rank 0: who has spoken, and from where
        word = None
        if topology.rank == 0:
            self._socket = _open(("", 0))
            word = json.dumps([topology.host, self._socket.getsockname()[1], os.urandom(8).hex(), ranks,
                               pids]).encode()
        host, port, self._word, ranks, pids = json.loads(broadcast_bytes(topology.comm, word))
        self.center = host, ranks, pids
        if topology.local_rank == 0 and topology.rank:
            try:
                self._address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
                self._socket = _open(("", 0))
            except OSError as error:
                self.note = f"host {topology.host} cannot find host {host} ({error}): its ranks are watched alone"

    def send(self, message: dict[str, Any]) -> None:
        """Send plain values to rank 0, or from there to all nodes that have spoken. Local; never waits or fails."""
        if self._socket is None:
            return
        data = json.dumps({**message, "word": self._word, "node": self.node}).encode()
        if len(data) > MOST_BYTES:
            return
        for address in [self._address] if self._address is not None else list(self._nodes.values()):
            try:
                self._socket.sendto(data, address)
            except OSError:     # no route, a full queue: the other side sees that nothing comes
                pass

    def receive(self) -> list[dict[str, Any]]:
        """Return what has come since the last call; `node` says from where. Local; never waits."""
        came: list[dict[str, Any]] = []
        while self._socket is not None:
            try:
                data, address = self._socket.recvfrom(1 << 16)
            except OSError:     # nothing more, or word that an earlier message did not arrive
                return came
            try:
                message = json.loads(data)
                known = message.pop("word") == self._word and isinstance(message["node"], int)
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                continue
            if known:
                self._nodes[message["node"]] = address
                came.append(message)
        return came

    def close(self) -> None:
        """Close the socket. Local."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _open(address: tuple[str, int]) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.setblocking(False)
    opened.bind(address)
    return opened
