"""Places of the ranks, also on nodes that are only simulated."""

import os

import pytest

from hpcmlp.comm.topology import Topology, usable_cores

SHOW = """
from hpcmlp import launch
world = launch.open_world()
from hpcmlp.comm.topology import Topology
t = Topology(world.comm)
import sys
sys.stdout.write(f"{t.rank} {t.local_rank}/{t.local_size} {t.cross_rank}/{t.cross_size} {t.num_nodes}\\n")
"""


@pytest.mark.mpi
def test_places_are_consistent(comm):
    topology = Topology(comm)
    assert (topology.rank, topology.size) == (comm.rank, comm.size)
    assert 0 <= topology.local_rank < topology.local_size <= comm.size
    assert 0 <= topology.cross_rank < topology.cross_size <= topology.num_nodes
    assert topology.node.size == topology.local_size and topology.cross.size == topology.cross_size
    places = comm.allgather((topology.host, topology.cross_rank, topology.local_rank))
    assert len(set(places)) == comm.size
    seen = comm.allgather((topology.local_size, len(os.sched_getaffinity(0))))
    for spread, values in zip((topology.local_sizes, topology.cores), zip(*seen, strict=True), strict=True):
        assert spread == (min(values), max(values))
    topology.free()


@pytest.mark.mpi
def test_cores_that_several_ranks_may_use_count_once(comm):
    topology, before = Topology(comm), os.sched_getaffinity(0)
    cores = sorted(before)
    try:
        os.sched_setaffinity(0, {cores[topology.local_rank % len(cores)]})
        assert usable_cores(topology.node) == min(topology.local_size, len(cores))
        os.sched_setaffinity(0, {cores[0]})
        assert usable_cores(topology.node) == 1
    finally:
        os.sched_setaffinity(0, before)
        comm.Barrier()
        topology.free()


def test_the_header_says_where_ranks_have_different_cores_and_threads(run_ranks):
    code = ("import os, sys\nfrom hpcmlp import launch\nrank = launch.launcher_rank()\n"
            "if rank == 1:\n    os.environ['OPENBLAS_NUM_THREADS'] = '3'\n"
            "world = launch.open_world()\n"
            "from hpcmlp.comm.topology import Topology\nt = Topology(world.comm)\n"
            "sys.stdout.write(f'{t.local_sizes} {t.threads}\\n')\n")
    result = run_ranks(2, "-c", code, env={"OPENBLAS_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == 2 * ["(2, 2) (1, 3)"]


def test_nodes_that_mpich_simulates(run_ranks):
    result = run_ranks(4, "-c", SHOW, env={"MPIR_CVAR_NUM_CLIQUES": "2"})
    assert result.returncode == 0, result.stderr
    lines = sorted(result.stdout.split("\n"))[1:]
    if lines[0].endswith(" 1"):
        pytest.skip("this MPI library does not simulate nodes")
    assert {line.split()[3] for line in lines} == {"2"}
    assert sorted(line.split()[1] for line in lines) == ["0/2", "0/2", "1/2", "1/2"]
    assert sorted(line.split()[2] for line in lines) == ["0/2", "0/2", "1/2", "1/2"]
