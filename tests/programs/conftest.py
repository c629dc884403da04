"""Programs run as a user runs them: in processes of their own, under the launcher beside this interpreter."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TIMEOUT_S = 90


def launcher() -> str:
    beside = Path(sys.executable).with_name("mpiexec")
    return os.environ.get("MPIEXEC") or (str(beside) if beside.exists() else shutil.which("mpiexec"))


def command(*arguments, ranks=None):
    base = [sys.executable, "-m", "hpcmlp", *map(str, arguments)]
    return base if ranks is None else [launcher(), "-n", str(ranks), *base]


def clean_environment(**more):
    """The environment without what a launcher of the test suite itself has left in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_", "HYDRA", "MPI_LOCAL", "SLURM_"))}
    return {**kept, **{k: str(v) for k, v in more.items()}}


@pytest.fixture(scope="session")
def hpcmlp():
    """Run `hpcmlp ARGUMENTS`; `ranks=None` without a launcher. Returns the finished process with text output."""
    def run(*arguments, ranks=None, env=None, timeout=TIMEOUT_S, cwd=None):
        return subprocess.run(command(*arguments, ranks=ranks), capture_output=True, text=True, timeout=timeout,
                              env=clean_environment(**(env or {})), cwd=cwd)
    return run


@pytest.fixture(scope="session")
def start_hpcmlp():
    """Start `hpcmlp ARGUMENTS` and return the process; whoever starts it waits for it or kills it."""
    def start(*arguments, ranks=None, env=None):
        return subprocess.Popen(command(*arguments, ranks=ranks), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, env=clean_environment(**(env or {})))
    return start


def write_csv(path, rows, seed=0):
    """Three classes in eight features that a small network can tell apart, with a weight column of ones left out."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((3, 8)) * 1.5
    labels = random.integers(0, 3, rows)
    x = centres[labels] + random.standard_normal((rows, 8))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"f{k}" for k in range(8)), "kind"])
        for values, label in zip(x, labels, strict=True):
            writer.writerow([*(f"{v:.6g}" for v in values), ("ant", "bee", "cat")[label]])


@pytest.fixture(scope="session")
def flowers(tmp_path_factory, hpcmlp):
    """A small prepared classification data set: 1,000 rows, three classes, five training shards."""
    folder = tmp_path_factory.mktemp("flowers")
    write_csv(folder / "table.csv", 1000)
    done = hpcmlp("prepare", folder / "table.csv", "--target", "kind", "--out", folder / "data", "--shards", 5,
                  "--seed", 1)
    assert done.returncode == 0, done.stderr
    return folder / "data"
