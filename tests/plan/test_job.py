"""Job scripts from the real templates: every value stands where SLURM and bash read it."""

import subprocess

import pytest

from hpcmlp.errors import ConfigError
from hpcmlp.plan.job import clock, fill_in, template

OUTLOOK = {"ranks": 12, "nodes": 3, "memory_bytes_per_node": 100 << 20, "memory_moment_bytes": 0,
           "time_limit_s": 4000.0}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_bash_reads_the_values_back(tmp_path, device):
    text = fill_in(template(device), OUTLOOK, 2, device, "data/mine", "runs/mine", ["--hidden 64,32", "--epochs 3"])
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    wanted = ["--nodes=3", "--ntasks-per-node=4", "--cpus-per-task=2", "--mem=179M", "--time=01:07:00"]
    assert all(f"#SBATCH {word}" in head for word in wanted)
    assert ("#SBATCH --gpus-per-node=4" in head) == (device == "gpu")
    assignments = text.split("set -euo pipefail")[1].split("# shellcheck")[0]
    done = subprocess.run(["bash", "-c", f"SLURM_JOB_ID=1; {assignments}\necho $DATA $RUN $OPTIONS"],
                          capture_output=True, text=True)
    assert done.stdout.strip() == "data/mine runs/mine --hidden 64,32 --epochs 3 --time-limit 65", done.stderr


@pytest.mark.parametrize("name", ["a b", "a'b", "$(x)", "a}b", "a`b"])
def test_a_name_that_bash_would_misread_is_refused(name):
    with pytest.raises(ConfigError, match="cannot stand in a job script"):
        fill_in(template("cpu"), OUTLOOK, 1, "cpu", name, None, [])


def test_a_template_without_a_line_to_fill_in_is_refused():
    with pytest.raises(ConfigError, match="no lines '#SBATCH --nodes="):
        fill_in(template("cpu").replace("--nodes=", "--knots="), OUTLOOK, 1, "cpu", None, None, [])


@pytest.mark.parametrize("seconds, text", [(1, "00:01:00"), (61, "00:02:00"), (3600, "01:00:00"),
                                           (360_000, "100:00:00")])
def test_times_are_whole_minutes(seconds, text):
    assert clock(seconds) == text
