"""`plan` through the command line: no MPI, quick for thousands of ranks, files that can be used, and runs that tell."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from hpcmlp.plan.machine import read_machine
from hpcmlp.plan.profiles import profile

REPOSITORY = Path(__file__).resolve().parents[2]
MADE_UP = ("--rows", 54_000, "--features", 784)


@pytest.fixture(scope="module")
def machine(hpcmlp, tmp_path_factory):
    """A machine file of the profile, with links, as a file."""
    path = tmp_path_factory.mktemp("machine") / "m.json"
    path.write_text(json.dumps({"format": "hpcmlp-machine-1", **asdict(profile("epyc-7763"))}))
    return path


def test_the_articles_questions_have_a_line_each(hpcmlp, machine):
    done = hpcmlp("plan", "--config", REPOSITORY / "jobs/article.toml", *MADE_UP, "--machine", machine)
    assert done.returncode == 0, done.stderr
    lines = {line[:16].strip(): line[18:] for line in done.stdout.splitlines()}
    assert lines["model scale"].startswith("269,322 parameters in 3 layers (200,960 + 65,792 + 2,570)")
    assert "in all; inference 538 kFLOP a sample" in lines["compute demand"]
    assert "memory a node" in lines["training needs"] and "core-hours" in lines["training needs"]
    assert "samples/s a rank" in lines["inference needs"]


def test_thousands_of_ranks_are_answered_quickly_and_without_mpi():
    code = ("import sys, time; begin = time.process_time(); from hpcmlp.cli import main; "
            "code = main(['plan', '--hidden', '4096,4096,4096', '--rows', '100000000', '--features', '784', '--ranks', "
            "'4096', '--global-batch-size', '262144', '--machine', 'epyc-7763', '--network', 'infiniband-hdr', "
            "'--json']); "
            "assert code == 0 and not {'mpi4py', 'h5py', 'cupy'} & set(sys.modules), sorted(sys.modules); "
            "print(time.process_time() - begin, file=sys.stderr)")
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 4096 and found["scaling"]["strong"][-1]["ranks"] == 4096
    # Computing time: what else the machine does must not count. The promise is 2 s.
    assert float(done.stderr) < 4.0 and time.monotonic() - begin < 60


def test_without_a_machine_times_are_not_foretold_and_it_says_how(hpcmlp, flowers):
    done = hpcmlp("plan", "--data", flowers, "--ranks", 2)
    assert done.returncode == 0 and "bench --calibrate" in done.stdout and "sent by a rank" in done.stdout


UNPLANNED = [
    ((), 78, "--rows and --features"), (("--rows", 5), 78, "--rows and --features"),
    ((*MADE_UP, "--machine", "pdp-11"), 78, "built-in"), ((*MADE_UP, "--network", "ethernet-1g"), 78, "--machine"),
    ((*MADE_UP, "--picture", "x.png"), 78, "--machine"), (("--data", "nowhere"), 66, "nowhere"),
    ((*MADE_UP, "--hidden", "1000000,1000000", "--machine", "epyc-7763"), 69, "are missing"),
    ((*MADE_UP, "--ranks", 300, "--global-batch-size", 512, "--machine", "epyc-7763"), 78, "--network")]


def test_what_cannot_be_planned_is_one_sentence(refusals):
    said = refusals([["plan", *arguments] for arguments, _, _ in UNPLANNED])
    for (_, code, words), (codes, text) in zip(UNPLANNED, said, strict=True):
        assert codes == {code} and words in text and len(text.splitlines()) == 1, text


def test_a_run_that_does_not_fit_names_the_option_that_makes_it_fit(hpcmlp, machine, tmp_path):
    values = json.loads(machine.read_text())
    values["memory_bytes"] = 2 << 30
    (tmp_path / "small.json").write_text(json.dumps(values))
    done = hpcmlp("plan", "--rows", 2_000_000, "--features", 1000, "--machine", tmp_path / "small.json", "--ranks", 2)
    assert done.returncode == 69 and "data" in done.stderr and "--memory-limit" in done.stderr
    limit = done.stderr.split("--memory-limit ")[1].split()[0]
    again = hpcmlp("plan", "--rows", 2_000_000, "--features", 1000, "--machine", tmp_path / "small.json", "--ranks", 2,
                   "--memory-limit", limit)
    assert again.returncode == 0, again.stderr


def test_a_written_job_holds_what_was_planned(hpcmlp, flowers, machine, tmp_path):
    job, picture = tmp_path / "job.sh", tmp_path / "curves.png"
    done = hpcmlp("plan", "--data", flowers, "--out", "runs/flowers", "--ranks", 8, "--ranks-per-node", 4, "--hidden",
                  "32,16", "--machine", machine, "--network", "ethernet-10g", "--write-job", job, "--picture", picture,
                  "--epochs", 3)
    assert done.returncode == 0, done.stderr
    text = job.read_text()
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --cpus-per-task=1", "#SBATCH --mem="):
        assert line in text
    assert f"DATA=${{DATA:-{flowers}}}" in text and "RUN=${RUN:-runs/flowers}" in text
    assert "--hidden 32,16" in text and "--epochs 3" in text and "--time-limit" in text
    assert subprocess.run(["bash", "-n", job]).returncode == 0 and os.access(job, os.X_OK)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_calibration_writes_a_file_that_a_run_is_planned_with_and_compared_to(hpcmlp, flowers, tmp_path):
    path = tmp_path / "here.json"
    done = hpcmlp("bench", "--calibrate", path, "--rounds", 1, "--json", ranks=2, timeout=170)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["file"] == str(path)
    here = read_machine(path)
    assert here.busy == min(2, len(os.sched_getaffinity(0))) and (here.wait_s(0.01, 2) > 0) == (here.busy == 2)
    assert here.window_bytes > 0 and here.message_bytes > 0
    run = tmp_path / "run"
    done = hpcmlp("train", "--data", flowers, "--out", run, "--hidden", "16", "--epochs", 2, "--sync", "ring",
                  "--machine", path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "plan      measured: step" in done.stdout
    told = json.loads((run / "summary.json").read_text())["plan"]
    assert told["step_s"]["foretold"] > 0 and told["step_s"]["measured"] > 0
    assert (told["wait_s"]["foretold"] > 0) == (here.busy == 2) and told["wait_s"]["measured"] > 0
    assert told["sent_bytes_per_rank_and_step"]["ratio"] == 1.0
    assert told["memory_bytes_per_node"]["ratio"] == pytest.approx(1, abs=0.05)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r for r in records if r["kind"] == "plan"][0]["step_s"] == told["step_s"]
    report = hpcmlp("report", run)
    assert report.returncode == 0 and "plan      measured: step" in report.stdout


def test_a_run_without_a_machine_file_still_compares_memory_and_traffic(hpcmlp, flowers, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "run/summary.json").read_text())["plan"]
    assert "step_s" not in told and told["memory_bytes_per_node"]["measured"] > 0
