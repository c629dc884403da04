"""hpcmlp over several hosts: what it sees, what it computes, what crosses the links, and how it ends."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcmlp.run import checkpoint

# Ranks answer in files: a launcher may mix what ranks of several hosts print at once, in the middle of a word.
SEE = """
import sys
from hpcmlp import launch
world = launch.open_world()
from hpcmlp.comm.topology import Topology
t = Topology(world.comm)
with open(f"{sys.argv[1]}/{t.rank}", "w") as file:
    print(t.host, t.local_rank, t.local_size, t.cross_rank, t.cross_size, t.num_nodes, file=file)
"""


def answers(folder):
    """Return what the ranks have written, in rank order."""
    return [(folder / str(rank)).read_text().strip() for rank in range(len(list(folder.iterdir())))]


@pytest.mark.parametrize("ranks, seen", [
    # host, local_rank, local_size, cross_rank, cross_size, num_nodes
    ("2,2", ["n1 0 2 0 2 2", "n1 1 2 0 2 2", "n2 0 2 1 2 2", "n2 1 2 1 2 2"]),
    ("2,1", ["n1 0 2 0 2 2", "n1 1 2 0 1 2", "n2 0 1 1 2 2"]),
    ("1,1,1", ["n1 0 1 0 3 3", "n2 0 1 1 3 3", "n3 0 1 2 3 3"]),
])
def test_ranks_know_their_hosts(run_hosts, tmp_path, ranks, seen):
    done = run_hosts(ranks, "{mpiexec}", "{python}", "-c", SEE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path) == seen


MEASURE = """
import sys
import numpy as np
from hpcmlp import launch
world = launch.open_world()
from hpcmlp.comm import open_exchange
from hpcmlp.comm.topology import Topology
folder, name, wire, elements = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
topology = Topology(world.comm)
exchange = open_exchange(name, topology, elements, np.float32, wire=wire)
assert exchange.name == name

def sent():
    with open("/sys/class/net/eth0/statistics/tx_bytes") as file:
        return int(file.read())

REPEAT = 4
for count in (1, REPEAT):       # the first call prepares its messages and connections
    world.comm.Barrier()
    before = sent()
    world.comm.Barrier()        # nobody sends before all have read
    for _ in range(count):
        exchange.grads[:] = world.rank + 1
        exchange.collective.all_reduce(exchange.grads)
    world.comm.Barrier()
    after = sent()
total = world.size * (world.size + 1) / 2
assert np.allclose(exchange.grads, total, rtol=0.01), exchange.grads[:5]
with open(f"{folder}/{world.rank}", "w") as file:
    print((after - before) / REPEAT / (4 * elements), file=file)
"""


@pytest.mark.parametrize("ranks, sync, wire, least, most", [
    # what a host sends, as a multiple of the array; P ranks send 2 (P - 1)/P each
    ("1,1", "ring", "float32", 1.0, 1.0),
    ("1,1,1", "ring", "float32", 4 / 3, 4 / 3),
    ("2,2", "ring", "float32", 1.5, 1.5),       # one rank of a host has its right neighbour on the other
    ("2,2", "shared", "float32", 1.0, 1.0),     # both ranks send a half, to one rank of two: 2 x 2 (2 - 1)/2 / 2
    ("1,1", "ring", "bf16", 0.5, 0.75),         # half the bytes in the reduce-scatter, or in both halves
])
def test_only_what_the_scheme_promises_crosses_the_link(run_hosts, tmp_path, ranks, sync, wire, least, most):
    done = run_hosts(ranks, "{mpiexec}", "{python}", "-c", MEASURE, tmp_path, sync, wire, 1 << 20)
    assert done.returncode == 0, done.stderr
    factors = [float(text) for text in answers(tmp_path)]
    assert len(factors) == sum(map(int, ranks.split(",")))
    for factor in factors:      # headers, acknowledgements and barriers come on top
        assert 0.99 * least <= factor <= 1.05 * most, factors


SMALL = ("--hidden", "16,16", "--epochs", 3, "--global-batch-size", 32, "--lr", 0.01, "--log-every", 1)


def summary(run):
    return json.loads((run / "summary.json").read_text())


def losses(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "step"]


@pytest.fixture(scope="module")
def alone(clouds, hpcmlp, tmp_path_factory):
    """The training on one rank of this machine."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = hpcmlp("train", "--data", clouds, "--out", run, *SMALL)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("ranks, options, sync, nodes", [
    ("2,2", (), None, 2),       # by trial
    ("2,2", ("--sync", "shared"), "shared", 2),
    ("2,1", ("--sync", "shared"), "ring", 2),   # node memory wants the same number of ranks everywhere
    ("1,1,1", ("--sync", "ring"), "ring", 3),
    ("3,1,2", ("--sync", "shared"), "ring", 3),
    ("1,1,1,1", (), None, 4),
    ("2,2", ("--sync", "server"), "server", 2),     # three workers
])
def test_training_over_hosts_is_the_training_of_one_rank(clouds, alone, hpcmlp, tmp_path, ranks, options, sync, nodes):
    done = hpcmlp("train", "--data", clouds, "--out", tmp_path / "run", *SMALL, *options, ranks=ranks)
    assert done.returncode == 0, done.stderr
    result = summary(tmp_path / "run")
    assert result["nodes"] == nodes and result["sync"] in ([sync] if sync else ["shared", "ring", "native"])
    assert ("by trial" in done.stdout) == (sync is None)
    assert f"on {nodes} nodes" in done.stdout
    uneven = len(set(ranks.split(","))) > 1
    assert uneven == ("nodes hold different numbers of ranks" in done.stdout)
    assert (ranks == "3,1,2") == ("6 on 3 nodes (1 to 3 each); 1 cores and 1 BLAS" in done.stdout)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)
    ours, theirs = (checkpoint.load_model(run, "last").params for run in (tmp_path / "run", alone))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)
    if ranks == "2,2" and not options:
        done = hpcmlp("evaluate", tmp_path / "run", "--json", ranks=ranks)
        same = hpcmlp("evaluate", tmp_path / "run", "--json")
        assert done.returncode == same.returncode == 0, done.stderr
        ours, theirs = (json.loads(result.stdout) for result in (done, same))
        assert ours["confusion"] == theirs["confusion"]
        assert ours["log_loss"] == pytest.approx(theirs["log_loss"], rel=1e-5)


def test_a_narrow_wire_trains_between_hosts(clouds, alone, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", clouds, "--out", tmp_path / "run", *SMALL, "--wire", "bf16", ranks="1,1")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run")["wire"] == "bf16"
    np.testing.assert_allclose(losses(tmp_path / "run")[-1], losses(alone)[-1], rtol=0.05)


@pytest.mark.parametrize("sync", ["shared", "ring"])
def test_a_rank_killed_on_another_host_ends_the_job_soon(clouds, hpcmlp, tmp_path, sync):
    # The others would wait for ever; a quiet machine needs 3 s, most of them for the start.
    done = hpcmlp("train", "--data", clouds, "--out", tmp_path / "run", *SMALL, "--sync", sync, ranks="2,2",
                  env={"HPCMLP_FAULT": "rank=3,step=5,act=kill"}, timeout=40)
    assert done.returncode != 0
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_tests_of_the_collectives_pass_between_hosts(run_hosts):
    done = run_hosts("2,2", "{mpiexec}", "{python}", "-m", "pytest", "-q", "--only-mpi", "-p", "no:cacheprovider",
                     "tests/comm/test_topology.py", "tests/comm/test_shared.py", timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_readmes_command_over_ssh_works_as_it_stands(run_hosts, hpcmlp, tmp_path):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    command = re.search(r"Without SLURM, over hosts.*?^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)[1]
    x = np.random.default_rng(0).standard_normal((400, 2))
    np.savetxt(tmp_path / "measurements.csv", np.column_stack([x, x @ (2, -1)]), delimiter=",", header="a,b,yield",
               comments="")
    done = hpcmlp("prepare", "measurements.csv", "--target", "yield", "--out", "data/measurements", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / ".venv").symlink_to(sys.prefix)
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = run_hosts("2,2", "bash", "-euc", command, cwd=tmp_path, env=path)
    if done.returncode and "unrecognized" in done.stderr + done.stdout:
        pytest.skip("the launcher is not MPICH's, whose options the README shows")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 on 2 nodes" in done.stdout and summary(tmp_path / "runs/hosts")["epochs"] == 20


def test_the_doctor_names_the_slow_link(run_hosts, tmp_path):
    """Three hosts, one of them behind a tenth of the others' rate, in and out."""
    shape = "root tbf rate 20mbit burst 128kb latency 200ms"
    script = f"tc qdisc replace dev v3 {shape}; on n3 tc qdisc replace dev eth0 {shape}; exec \"$@\""
    done = run_hosts("1,1,1", "bash", "-c", script, "bash", "{mpiexec}", "{python}", "-m", "hpcmlp", "doctor", "--json",
                     "--dir", tmp_path, rate="500mbit")
    checks = {check["name"]: check for check in json.loads(done.stdout.splitlines()[-1])["checks"]}
    assert done.returncode == 78 and not checks["links"]["ok"], done.stdout + done.stderr
    assert "n3" in checks["links"]["found"] and "n1 -> n2" not in checks["links"]["found"]
    assert "on 3 nodes" in checks["launcher"]["found"]
