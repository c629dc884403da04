"""`train --trace` through the command line: one file of all ranks, and the same parameters as without."""

import itertools
import json

import pytest

OPTIONS = ("--hidden", "16,16", "--epochs", 3, "--global-batch-size", 64, "--clip-norm", 5.0, "--bucket-mb", 0.001,
           "--accumulate", 2)
NAMES = {"step", "input", "gather rows", "forward layer 0", "forward layer 1", "forward layer 2", "loss",
         "backward layer 0", "backward layer 1", "backward layer 2", "check finite", "reduce", "reduce bucket 0",
         "norm", "update", "share", "all_gather bucket 0", "validation", "save"}


def parameters(run):
    return json.loads((run / "summary.json").read_text())["parameters_sha256"]


def spans_of(run):
    content = json.loads((run / "trace.json").read_text())
    return content["otherData"], [e for e in content["traceEvents"] if e["ph"] == "X"]


@pytest.fixture(scope="module")
def plain(flowers, hpcmlp, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain") / "run"
    done = hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, ranks=2)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("extra", [("--sync", "shared"), ("--sync", "ring"), ("--sync", "native"), ("--full-update",),
                                   ("--sync", "ring", "--overlap")])
def test_a_timeline_of_two_ranks(flowers, hpcmlp, tmp_path, plain, extra):
    run = tmp_path / "run"
    done = hpcmlp("train", "--data", flowers, "--out", run, *OPTIONS, *extra, "--trace", "--trace-steps", 20, ranks=2)
    assert done.returncode == 0, done.stderr
    other, spans = spans_of(run)
    assert other["ranks"] == 2 and len(other["clock_uncertainty_us"]) == 2
    for pid in (0, 1):
        names = {e["name"] for e in spans if e["pid"] == pid}
        own = [e for e in spans if e["pid"] == pid and e["tid"] == 0]
        behind = [e for e in spans if e["pid"] == pid and e["tid"] == 1]
        assert bool(behind) == ("--overlap" in extra)
        check_behind(own, behind)
        assert names >= NAMES, NAMES - names
        assert "reduce bucket 1" in names and ("wait" in names) == (extra[0] != "--sync" or extra[1] == "shared")
        assert [e["args"]["step"] for e in own if e["name"] == "step"] == list(range(6, 26))
        assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in own)
        check_nesting(own)
    # Rank 0 leaves no barrier of a reduce long before rank 1 has come: the clocks fit together.
    first = {e["pid"]: e["ts"] for e in reversed(spans) if e["name"] == "step"}
    assert abs(first[0] - first[1]) < 1e6
    assert not (plain / "trace.json").exists()
    if extra == ("--sync", "shared"):
        assert parameters(run) == parameters(plain)


def check_behind(own, behind):
    """Buckets follow each other, and those of one step's gradient end before its update begins."""
    assert all(a["ts"] + a["dur"] <= b["ts"] + 0.001 for a, b in itertools.pairwise(behind))
    for update in (e for e in own if e["name"] == "update"):
        step = update["args"]["step"]
        assert all(e["ts"] + e["dur"] <= update["ts"] for e in behind
                   if e["name"].startswith("reduce") and e["args"]["step"] == step)
    for e in behind:
        assert e["name"].split()[:2] in (["reduce", "bucket"], ["all_gather", "bucket"])


def check_nesting(events):
    open_ends = []
    for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        begin, end = round(1e3 * e["ts"]), round(1e3 * (e["ts"] + e["dur"]))
        while open_ends and open_ends[-1] <= begin:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], e
        open_ends.append(end)


def test_a_run_shorter_than_its_trace_and_one_without_steps_write_what_there_is(flowers, hpcmlp, tmp_path):
    for steps, expected in ((4, [3, 4]), (0, [])):
        run = tmp_path / str(steps)
        done = hpcmlp("train", "--data", flowers, "--out", run, "--steps", steps, "--trace")
        assert done.returncode == 0, done.stderr
        _, spans = spans_of(run)
        assert [e["args"]["step"] for e in spans if e["name"] == "step"] == expected


def test_trace_steps_without_trace_is_refused(flowers, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--trace-steps", 5)
    assert done.returncode == 78 and "--trace" in done.stderr and len(done.stderr.splitlines()) == 1
