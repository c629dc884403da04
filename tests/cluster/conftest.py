"""Several hosts on this machine: everything here is skipped, with the reason, where namespaces are not to be had."""

from pathlib import Path

import numpy as np
import pytest

HOSTS = Path(__file__).with_name("hosts.py")


@pytest.fixture(scope="session", autouse=True)
def hosts_are_to_be_had(run_ranks):
    tried = run_ranks(0, HOSTS, "--hosts", 2, "--rate", "1gbit", "--", "{mpiexec}", "true")
    if tried.returncode == 69:
        pytest.skip(tried.stderr.strip())
    assert tried.returncode == 0, tried.stderr


@pytest.fixture(scope="session")
def run_hosts(run_ranks):
    """A function that runs a command on hosts of its own and returns the finished process with text output.

    run_hosts("2,1", "{mpiexec}", "{python}", ..., rate=None, cores=1, env=None, timeout=60): ranks per host, command.
    """
    def run(ranks, *command, rate=None, cores=1, **options):
        words = ["--hosts", ranks.count(",") + 1, "--ranks", ranks, "--cores", cores]
        words += ["--rate", rate] if rate else []
        return run_ranks(0, HOSTS, *words, "--", *command, **options)
    return run


@pytest.fixture(scope="session")
def hpcmlp(run_hosts, run_ranks):
    """Run `hpcmlp ARGUMENTS` with so many ranks on each host; `ranks=None`: on this machine, without a launcher."""
    def run(*arguments, ranks=None, **options):
        if ranks is None:
            return run_ranks(0, "-m", "hpcmlp", *arguments, **options)
        return run_hosts(ranks, "{mpiexec}", "{python}", "-m", "hpcmlp", *arguments, **options)
    return run


@pytest.fixture(scope="session")
def clouds(tmp_path_factory, hpcmlp):
    """A small prepared data set: 800 points of three clouds in eight dimensions."""
    folder = tmp_path_factory.mktemp("clouds")
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 800)
    x = random.standard_normal((3, 8))[y] * 1.5 + random.standard_normal((800, 8))
    np.savez(folder / "clouds.npz", x=x.astype(np.float32), y=y)
    done = hpcmlp("prepare", folder / "clouds.npz", "--out", folder / "data", "--shards", 3)
    assert done.returncode == 0, done.stderr
    return folder / "data"
