"""What --sync auto takes between nodes, says, and keeps when a run resumes: one rank per pretended node."""

import re

import pytest

PRETEND = """
import sys
from hpcmlp import launch
launch.open_world()
from hpcmlp.comm import topology

def one_rank_per_node(self, comm, plain=topology.Topology.__init__):
    plain(self, comm)
    self.free()
    self.node, self.cross = comm.Split(comm.rank), comm.Dup()
    self.local_rank, self.local_size = 0, 1
    self.cross_rank, self.cross_size, self.num_nodes = comm.rank, comm.size, comm.size

topology.Topology.__init__ = one_rank_per_node
from hpcmlp import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def train(flowers, run_ranks, tmp_path):
    def run(ranks, *arguments):
        done = run_ranks(ranks, "-c", PRETEND, "train", "--data", flowers, "--out", tmp_path / "run", "--hidden", "8",
                         "--no-test", *map(str, arguments), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return re.search(r"sync (\w+)( \(.*\))?", done.stdout).groups()
    return run


def test_a_resumed_run_keeps_what_the_trial_took_unless_it_is_told_or_moved(train):
    name, why = train(2, "--steps", 3)
    assert name in ("ring", "native")
    assert re.fullmatch(r" \(by trial: (ring|native) .* ms, (ring|native) .* ms(, too close to call)?\)", why)
    assert train(2, "--steps", 5, "--resume") == (name, None)
    other = "native" if name == "ring" else "ring"
    assert train(2, "--steps", 7, "--resume", "--sync", other) == (other, None)
    assert train(2, "--steps", 9, "--resume") == (other, None)      # what its last checkpoint used
    assert train(3, "--steps", 11, "--resume")[1].startswith(" (by trial: ")
    assert train(1, "--steps", 13, "--resume") == ("ring", " (one rank)")
