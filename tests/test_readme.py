"""The README's commands are run as they stand, and what it says of exit codes and options is true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcmlp import errors
from hpcmlp.comm import COLLECTIVES
from hpcmlp.config import SYNCS

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands(heading):
    """The lines of the first sh block below a heading, comments dropped."""
    block = re.search(rf"^## {heading}\n.*?^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line.split("  #")[0].strip() for line in block[1].splitlines() if line.strip()]


def environment():
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_COMM", "HYDRA", "MPI_LOCAL", "MAKE"))}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command, folder, timeout=170):
    done = subprocess.run(["bash", "-euc", command], cwd=folder, env=environment(), capture_output=True, text=True,
                          timeout=timeout)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def write_measurements(folder):
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 3))
    rows = [f"{a:.5f},{b:.5f},{'left' if c > 0 else 'right'}" for a, b, c in x]
    target = x[:, 0] * 2 - x[:, 1] + (x[:, 2] > 0)
    (folder / "measurements.csv").write_text("heat,time,side,yield\n" + "".join(
        f"{row},{y:.5f}\n" for row, y in zip(rows, target, strict=True)))
    (folder / "new.csv").write_text("heat,time,side\n" + "".join(f"{row}\n" for row in rows[:7]))


def test_the_commands_of_use_work_in_order(tmp_path):
    write_measurements(tmp_path)
    for command in commands("Use"):
        output = run(command, tmp_path)
    assert "step-" in output
    assert (tmp_path / "predictions.h5").exists()
    assert json.loads((tmp_path / "runs/mine/summary.json").read_text())["status"] == "finished"


def test_make_run_trains_on_real_data_and_the_captured_output_is_of_that_form(tmp_path):
    """`make run` itself, into folders of its own and with one epoch; installing is what the suite has done already."""
    assert commands("Two commands")[0] == "make run"
    output = run(f"make -C {REPOSITORY} run VENV={Path(sys.executable).parent.parent} DATA={tmp_path}/mnist "
                 f"RUN={tmp_path}/run TRAIN_OPTIONS='--hidden 64 --epochs 1 --global-batch-size 512'", tmp_path)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"]["accuracy"] > 0.9
    captured = re.search(r"^```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    for words in ("hpcmlp    ", "ranks     2 on 1 node", "network   784-", "epoch ", "test loss", "accuracy"):
        assert words in output and words in captured


def test_make_targets_of_the_readme_exist():
    for target in set(re.findall(r"`make ([a-z-]+)", README)):
        done = subprocess.run(["make", "-n", target, f"VENV={Path(sys.executable).parent.parent}"], cwd=REPOSITORY,
                              env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_every_algorithm_has_its_line_in_the_table():
    section = README.split("## How gradients are combined")[1].split("\n## ")[0]
    assert set(SYNCS) - {"auto", "nccl", "direct", "server"} == set(COLLECTIVES)
    for name in SYNCS:
        assert f"| `{name}` |" in section


@pytest.mark.parametrize("code", sorted(errors.EXIT_CODES))
def test_exit_codes_are_told(code):
    assert f"{code} " in README.split("## When something is wrong")[1]


def test_no_placeholder_is_left():
    assert "@@" not in README and "TODO" not in README
