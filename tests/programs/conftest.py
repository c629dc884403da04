"""Programs run as a user runs them: in processes of their own, under the launcher beside this interpreter."""

import csv
import json

import numpy as np
import pytest


@pytest.fixture(scope="session")
def hpcmlp(run_ranks):
    """Run `hpcmlp ARGUMENTS`; `ranks=None` without a launcher. Returns the finished process with text output."""
    def run(*arguments, ranks=None, timeout=120, **how):
        return run_ranks(ranks or 0, "-m", "hpcmlp", *arguments, timeout=timeout, **how)
    return run


IN_TURN = """
import json, os, sys
from hpcmlp import cli, launch
folder, commands = sys.argv[1], json.loads(sys.argv[2])
rank = launch.launcher_rank()
for number, words in enumerate(commands):
    with open(f"{folder}/{number}.{rank}", "w") as said:
        os.dup2(said.fileno(), 2)
    code = cli.main(words)
    sys.stderr.flush()
    with open(f"{folder}/{number}.{rank}.code", "w") as file:
        print(code, file=file)
"""


@pytest.fixture(scope="session")
def refusals(run_ranks, tmp_path_factory):
    """A function that gives the ranks several command lines in turn, all of which must be refused: one start for all.

    Returns a list of (exit codes of the ranks, standard error of all ranks). That the code of a rank becomes that of
    the launcher is shown where a program runs by itself.
    """
    def run(commands, ranks=None, **how):
        folder = tmp_path_factory.mktemp("refusals")
        done = run_ranks(ranks or 0, "-c", IN_TURN, folder, json.dumps([[*map(str, words)] for words in commands]),
                         timeout=120, **how)
        assert done.returncode == 0, done.stdout + done.stderr
        places = [[folder / f"{number}.{rank}" for rank in range(ranks or 1)] for number in range(len(commands))]
        return [({int(path.with_name(path.name + ".code").read_text()) for path in paths},
                 "".join(path.read_text() for path in paths)) for paths in places]
    return run


@pytest.fixture(scope="session")
def start_hpcmlp(start_ranks):
    """Start `hpcmlp ARGUMENTS` and return the process; whoever starts it waits for it or kills it."""
    def start(*arguments, ranks=None, **how):
        return start_ranks(ranks or 0, "-m", "hpcmlp", *arguments, **how)
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
