"""Every job script, run with stand-ins for SLURM's programs; tests/cluster runs them under a real SLURM."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SCRIPTS = sorted(JOBS.glob("*.sh"))
BATCH = [path for path in SCRIPTS if "#SBATCH" in path.read_text()]

# srun: once per node with --mpi=none, else as many ranks as it is told, by the MPI's own launcher; its words are kept.
SRUN = """#!/bin/bash
printf '%s\\n' "$*" >>"$STANDIN/srun.log"
ranks=$SLURM_NTASKS mpi=
while [ "${1#-}" != "$1" ]; do
    case $1 in --ntasks=*) ranks=${1#*=} ;; --mpi=*) mpi=${1#*=} ;; esac
    shift
done
if [ "$mpi" = none ]; then for ((k = 0; k < ranks; k++)); do "$@" || exit; done; exit; fi
unset "${!SLURM_@}"
"$STANDIN_MPIEXEC" -n "$ranks" "$@" &
echo $! >"$STANDIN/step.pid"
wait $!
"""
# scancel --signal=USR1 JOB: to the processes of the steps.
SCANCEL = """#!/bin/bash
printf '%s\\n' "$*" >>"$STANDIN/scancel.log"
kill -USR1 "$(cat "$STANDIN/step.pid")"
"""
# scontrol requeue JOB: SLURM ends the batch script, however long it would stay. It knows of no time limit.
SCONTROL = """#!/bin/bash
[ "$1" = requeue ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
printf '%s\\n' "$*" >>"$STANDIN/scontrol.log"
{ sleep 1; kill -KILL -- "-$(cat "$STANDIN/script.pid")"; } >/dev/null 2>&1 &
"""
SBCAST = """#!/bin/bash
printf '%s\\n' "$*" >>"$STANDIN/sbcast.log"
cp "${@: -2:1}" "${@: -1:1}"
"""


def header(path):
    """The #SBATCH lines of a script as {option: value}."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-x", "-P", JOBS.parent, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    lines = path.read_text().splitlines()
    said = any(line.startswith("# Edit:") for line in lines[:4])
    assert said or path.name == "site.sh", "say at the top what to edit"
    assert path.name == "site.sh" or os.access(path, os.X_OK)


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_batch_scripts_name_what_slurm_needs(path):
    words = header(path)
    assert {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "output"} <= words.keys()
    assert "##SBATCH --partition=NAME" in path.read_text() and "partition" not in words


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A file of samples, for `prepare`."""
    path = tmp_path_factory.mktemp("samples") / "clouds.npz"
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 600)
    x = random.standard_normal((3, 8))[y] + random.standard_normal((600, 8))
    np.savez(path, x=x.astype(np.float32), y=y)
    return path


@pytest.fixture(scope="module")
def prepared(samples, run_ranks):
    """The data set that jobs/prepare.sh makes of the samples."""
    folder = samples.with_name("prepared")
    done = run_ranks(0, "-m", "hpcmlp", "prepare", samples, "--out", folder, "--shards", 8, "--seed", 1)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def slurm(tmp_path, monkeypatch, samples):
    """A place to submit from, with jobs/, a data set, and stand-ins; returns start(script, *arguments, **variables)."""
    monkeypatch.delenv("MPIEXEC", raising=False)
    standin = tmp_path / "standin"
    standin.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL), ("sbcast", SBCAST)):
        (standin / name).write_text(text)
        (standin / name).chmod(0o755)
    (tmp_path / "jobs").symlink_to(JOBS)
    (tmp_path / "clouds.npz").symlink_to(samples)

    def start(script, *arguments, ranks=2, nodes=1, **variables):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PMI", "OMPI", "PMIX", "HYDRA"))}
        # A Python in PATH is that of the environment here; mpiexec stands beside it, or in PATH.
        beside = Path(sys.executable).parent / "mpiexec"
        environment = {**kept, "PATH": f"{standin}:{os.environ['PATH']}", "STANDIN": str(standin),
                       "TMPDIR": str(tmp_path), "STANDIN_MPIEXEC": str(beside) if beside.exists() else "mpiexec",
                       "PYTHONPATH": str(JOBS.parent), "HPCMLP_ENV": str(Path(sys.executable).parent.parent),
                       "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                       "SLURM_JOB_ID": "7", "SLURM_NTASKS": str(ranks), "SLURM_JOB_NUM_NODES": str(nodes),
                       "SLURM_CPUS_PER_TASK": "1", **{name: str(value) for name, value in variables.items()}}
        process = subprocess.Popen([JOBS / script, *map(str, arguments)], cwd=tmp_path, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        (standin / "script.pid").write_text(str(process.pid))
        return process
    start.folder = tmp_path
    start.log = lambda name: (standin / f"{name}.log").read_text() if (standin / f"{name}.log").exists() else ""
    return start


def finish(process, code=0, timeout=120):
    """Wait for the end of a script and return what it printed."""
    try:
        output = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(process.communicate()[0])
    assert process.returncode == code, output
    return output


@pytest.fixture
def data(slurm, prepared):
    return shutil.copytree(prepared, slurm.folder / "data/clouds")


def summary(run):
    return json.loads((run / "summary.json").read_text())


SHORT = "--hidden 8 --epochs 2 --global-batch-size 64"


def test_data_are_prepared_on_a_login_node(slurm, prepared):
    finish(slurm("prepare.sh", slurm.folder / "clouds.npz", "--seed", 1, ranks=""))
    assert "train" in finish(slurm("prepare.sh", slurm.folder / "clouds.npz"))     # the second time: what is there
    assert not slurm.log("srun")
    data = slurm.folder / "data/clouds"
    assert len(list(data.glob("train-*-of-00008.h5"))) == 8
    # What the other tests take in place of the script's, so as not to run it once each.
    made, taken = ({p.name: p.read_bytes() for p in folder.glob("*.h5")} for folder in (data, prepared))
    assert made == taken


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_training_on_cores(slurm, data, launcher):
    finish(slurm("train-cpu.sh", "--seed", 3, DATA=data, RUN="runs/a", OPTIONS=SHORT, LAUNCHER=launcher))
    result = summary(slurm.folder / "runs/a")
    assert (result["status"], result["ranks"]) == ("finished", 2)
    if launcher == "srun":
        kind = "pmix" if "Open MPI" in result["versions"].get("mpi", "") else "pmi2"
        assert re.match(rf"--mpi={kind} --kill-on-bad-exit=1 ", slurm.log("srun"))
        assert slurm.log("srun").rstrip().endswith("--seed 3")
    else:
        assert not slurm.log("srun")


def test_training_on_gpus_starts_a_rank_per_gpu(slurm, data):
    words = header(JOBS / "train-gpu.sh")
    assert words["ntasks-per-node"] == words["gpus-per-node"]
    slurm("train-gpu.sh", DATA=data, RUN="runs/gpu", SLURM_CPUS_PER_TASK=8).communicate(timeout=120)
    assert "train --data" in slurm.log("srun") and "--device gpu" in slurm.log("srun")


LONG = "--hidden 8 --epochs 15 --validate-every 5 --global-batch-size 16 --checkpoint-every 100"
SLOW = {"HPCMLP_FAULT": "act=sleep:0.005"}      # a step: so that signals come in time


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_preempted_job_saves_is_queued_again_and_ends_as_if_undisturbed(slurm, data):
    finish(slurm("train-preemptible.sh", DATA=data, RUN="runs/whole", OPTIONS=LONG, **SLOW))
    run = slurm.folder / "runs/parts"
    process = slurm("train-preemptible.sh", DATA=data, RUN=run, OPTIONS=LONG, **SLOW)
    wait_for(lambda: list(run.glob("checkpoints/step-*")))
    os.kill(process.pid, signal.SIGUSR1)        # --signal=B:USR1@60: to the script alone
    output = finish(process, -signal.SIGKILL)
    assert "ranks ended with 75" in output, output
    assert slurm.log("scancel") == "--signal=USR1 7\n" and slurm.log("scontrol") == "requeue 7\n"
    assert not (run / "summary.json").exists()
    finish(slurm("train-preemptible.sh", DATA=data, RUN=run, OPTIONS=LONG, **SLOW, SLURM_RESTART_COUNT=1))
    whole, parts = summary(slurm.folder / "runs/whole"), summary(run)
    assert whole["steps"] == parts["steps"] and whole["parameters_sha256"] == parts["parameters_sha256"]
    assert slurm.log("scontrol").count("\n") == 1


def test_a_cancelled_job_saves_and_is_not_queued_again(slurm, data):
    run = slurm.folder / "runs/cancelled"
    process = slurm("train-preemptible.sh", DATA=data, RUN=run, OPTIONS=LONG, **SLOW)
    wait_for(lambda: list(run.glob("checkpoints/step-*")))
    os.kill(process.pid, signal.SIGTERM)        # scancel: to the script ...
    step = int((slurm.folder / "standin/step.pid").read_text())
    os.kill(step, signal.SIGUSR1)               # ... and to the ranks; Open MPI's mpiexec would kill them on TERM
    wait_for(lambda: not Path(f"/proc/{step}").exists() or "State:\tZ" in Path(f"/proc/{step}/status").read_text())
    time.sleep(1.5)
    assert process.poll() is None               # stays, so that SLURM says how it ended
    os.killpg(process.pid, signal.SIGKILL)
    assert "ranks ended with 75" in process.communicate()[0]
    assert not slurm.log("scontrol")


def test_restarts_are_counted(slurm, data):
    run = slurm.folder / "runs/often"
    output = finish(slurm("train-preemptible.sh", "--time-limit", 1e-4, DATA=data, RUN=run, OPTIONS=LONG,
                          SLURM_RESTART_COUNT=2, MOST_RESTARTS=2), 75)
    assert "2 restarts are used up" in output and not slurm.log("scontrol")


def test_each_task_of_an_array_takes_its_line(slurm, data):
    (slurm.folder / "settings.txt").write_text("--lr 0.001\n--lr 0.01 --hidden 4,4\n")
    for task in (1, 2):
        finish(slurm("tune-array.sh", DATA=data, OPTIONS=SHORT, SLURM_ARRAY_JOB_ID=7, SLURM_ARRAY_TASK_ID=task))
    runs = [slurm.folder / f"runs/tune-7/trial-{task}" for task in (1, 2)]
    assert "lr = 0.001\n" in (runs[0] / "config.toml").read_text()
    assert "hidden = [4, 4]\n" in (runs[1] / "config.toml").read_text()
    assert "no line 3" in finish(slurm("tune-array.sh", DATA=data, SLURM_ARRAY_JOB_ID=7, SLURM_ARRAY_TASK_ID=3), 66)


def test_the_scaling_study_makes_a_table_and_a_picture(slurm):
    finish(slurm("scaling.sh", ranks=2, nodes=2, SLURM_NTASKS_PER_NODE=1, SIZES="16,8,4", BATCH=64, STEPS=5, REPEATS=2,
                 OUT="study"))
    rows = [line.split("|") for line in (slurm.folder / "study/scaling.md").read_text().splitlines()[4:]]
    seen = [tuple(word.strip() for word in row[1:5]) for row in rows]
    assert seen == [("one rank", "1", "1", "64"), ("strong", "1", "1", "64"), ("strong", "2", "2", "64"),
                    ("weak", "2", "2", "128")]
    assert float(rows[1][8]) == 1.0 and rows[1][9].strip() == "100 %"
    assert float(rows[3][8]) == pytest.approx(2 * int(rows[3][9].strip(" %")) / 100, abs=0.02)
    assert (slurm.folder / "study/scaling.png").stat().st_size > 10_000
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in slurm.log("srun")


def test_a_failed_measurement_ends_the_study(slurm):
    output = finish(slurm("scaling.sh", "--sync", "nosuch", SIZES="16,8,4", OUT="study"), 1)
    assert "not a result of bench step" in output or "is not known" in output


def test_the_bundle_holds_all_a_run_needs(slurm, data):
    assert "wrote hpcmlp-bundle.tar" in finish(slurm("bundle.sh", ranks=""))
    local = slurm.folder / "local-disk"
    finish(slurm("train-bundle.sh", DATA=data, RUN="runs/bundle", OPTIONS=SHORT, LOCAL=local, LOCAL_DATA="yes",
                 PYTHONPATH=""))
    assert summary(slurm.folder / "runs/bundle")["ranks"] == 2
    started = [line for line in slurm.log("srun").splitlines() if " train " in line]
    assert len(started) == 1 and f" {local}/environment/bin/python -m hpcmlp train " in started[0]
    assert f"--data {local}/data" in started[0]
    assert not local.exists() and not list(slurm.folder.glob("*.data-*"))
    assert slurm.log("sbcast").count("\n") == 2


def test_the_container_definition_has_its_sections_and_files():
    text = (JOBS / "hpcmlp.def").read_text()
    assert {"%files", "%post", "%environment", "%runscript", "%test"} <= set(re.findall(r"^%\w+", text, re.MULTILINE))
    for name in re.findall(r"^    (\S+) /opt/source", text, re.MULTILINE):
        assert (JOBS.parent / name).exists()
