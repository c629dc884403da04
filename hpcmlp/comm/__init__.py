"""Arrays between ranks: topology, collectives by our ring or by the MPI library."""

from hpcmlp.comm.native import Native
from hpcmlp.comm.ring import Ring
from hpcmlp.comm.topology import Topology
from hpcmlp.errors import ConfigError

COLLECTIVES = {"ring": Ring, "native": Native}


def make_collective(name: str, topology: Topology) -> Ring | Native:
    """Return the collectives called `name` over all ranks.

    Collective over `topology.comm`. Raises ConfigError when there are none of that name.
    """
    if name not in COLLECTIVES:
        raise ConfigError(f"sync = {name!r} is not known (legal: {', '.join(COLLECTIVES)}).")
    return COLLECTIVES[name](topology.comm)
