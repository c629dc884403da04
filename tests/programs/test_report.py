"""Learning curves are drawn from whole logs, from torn ones, for several runs, or not at all with one sentence."""

import json
import sys

import pytest

from hpcmlp.errors import DataError, InputMissing
from hpcmlp.run.curves import draw_curves, read_records
from hpcmlp.run.timeline import read_trace, shares

PNG = b"\x89PNG\r\n\x1a\n"


def write_log(run, epochs=3, val=True, kinds=("step", "epoch")):
    run.mkdir()
    lines = []
    for step in range(1, 10 * epochs + 1):
        lines.append({"kind": "step", "step": step, "epoch": step // 10, "loss": 2.0 / step if step != 5 else None,
                      "lr": 0.1 / step, "compute_s": 0.3, "comm_s": 0.1, "input_s": 0.02})
        if step % 10 == 0:
            lines.append({"kind": "epoch", "epoch": step // 10, "step": step, "train_loss": 2.0 / step,
                          "val": {"rows": 9, "loss": 2.5 / step, "accuracy": 1 - 1 / step} if val else {}})
    lines = [line for line in lines if line["kind"] in kinds] + [{"kind": "event", "event": "saved", "step": 3}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_report_draws_one_run_into_its_directory_and_several_into_another(tmp_path, hpcmlp):
    first, second = write_log(tmp_path / "first"), write_log(tmp_path / "second", epochs=5)
    done = hpcmlp("report", first)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(first / "curves.png")
    assert (first / "curves.png").read_bytes().startswith(PNG)
    done = hpcmlp("report", first, second, "--out", tmp_path / "new" / "both")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "both" / "curves.png").read_bytes().startswith(PNG)
    assert not (second / "curves.png").exists()


def test_a_missing_run_is_one_sentence(tmp_path, hpcmlp):
    done = hpcmlp("report", tmp_path / "nothing")
    assert done.returncode == 66 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "metrics.jsonl" in done.stderr


@pytest.mark.parametrize("form", [{"val": False, "kinds": ("epoch",)}, {"kinds": ("step",)}, {"epochs": 0}])
def test_whatever_a_log_holds_is_drawn(tmp_path, form):
    pytest.importorskip("matplotlib")
    run = write_log(tmp_path / "run", **form)
    assert draw_curves([run], run / "curves.png") is None
    assert (run / "curves.png").read_bytes().startswith(PNG)


def test_runs_of_one_name_and_of_different_tasks_share_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    runs = [write_log(tmp_path / "a" / "run"), write_log(tmp_path / "b" / "run")]
    text = (runs[1] / "metrics.jsonl").read_text().replace("accuracy", "rmse")
    (runs[1] / "metrics.jsonl").write_text(text)
    assert draw_curves(runs, tmp_path / "both.png") is None


def test_a_torn_last_line_is_left_out_and_a_damaged_one_named(tmp_path):
    run = write_log(tmp_path / "run")
    whole = read_records(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    assert read_records(run) == whole
    (run / "metrics.jsonl").write_text('{"kind": "step"}\nnot json\n{}\n')
    with pytest.raises(DataError, match="line 2"):
        read_records(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputMissing):
        read_records(run)


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"kind": "server", "x": ' + b"[" * 100_000, b"[1]", b"7"])
def test_a_log_that_is_no_log_is_one_sentence(tmp_path, hpcmlp, line):
    write_log(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    done = hpcmlp("report", tmp_path / "run")
    assert done.returncode == 65 and "is not a JSON object" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["text", True, [1], {"a": 1}, 10**400, 1e999, -1e300, None])
def test_values_that_cannot_be_drawn_are_left_out(tmp_path, value):
    write_log(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    odd = [{**r, **dict.fromkeys(set(r) - {"kind"}, value), "val": {"loss": value, "accuracy": value},
            "seconds": {"compute": value}} for r in lines]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(r) + "\n" for r in odd)
    assert draw_curves([tmp_path / "run"], tmp_path / "out.png") is None


def test_without_matplotlib_there_is_a_sentence_and_no_picture(tmp_path, monkeypatch):
    run = write_log(tmp_path / "run")
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    note = draw_curves([run], run / "curves.png")
    assert "hpcmlp[plot]" in note and not (run / "curves.png").exists()


def test_report_without_matplotlib_is_an_error(tmp_path, hpcmlp):
    run = write_log(tmp_path / "run")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "matplotlib.py").write_text("raise ImportError('not here')\n")
    done = hpcmlp("report", run, env={"PYTHONPATH": tmp_path / "hidden"})
    assert done.returncode == 78 and "hpcmlp[plot]" in done.stderr and len(done.stderr.splitlines()) == 1


def write_trace(run, tail=""):
    """Two ranks, two steps of 100 us: by hand so that the shares below are known without any program."""
    events = []
    for pid, wait in ((0, 30), (1, 10)):
        for step in (1, 2):
            at = 100 * step + 0.001     # not representable: the sum with 100.0 rounds
            for name, begin, us in (("step", 0, 100), ("input", 0, 5), ("gather rows", 5, 5),
                                    ("forward layer 0", 10, 20), ("backward layer 0", 30, 10),
                                    ("reduce", 40, 40), ("reduce bucket 0", 41, 38),
                                    ("wait", 45, wait), ("update", 80, 10)):
                events.append({"name": name, "ph": "X", "pid": pid, "tid": 0, "ts": at + begin, "dur": us,
                               "args": {"step": step}})
    events.append({"name": "reduce bucket 0", "ph": "X", "pid": 1, "tid": 1, "ts": 130, "dur": 50, "args": {"step": 1}})
    events.append({"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "rank 0"}})
    (run / "trace.json").write_text(json.dumps({"otherData": {"ranks": 2}, "traceEvents": events[::-1]}) + tail)


def test_shares_of_a_timeline_count_inner_events_once(tmp_path):
    (tmp_path / "run").mkdir()
    write_trace(tmp_path / "run")
    ranks = read_trace(tmp_path / "run" / "trace.json")
    for rank, wait in zip(ranks, (0.3, 0.1), strict=True):
        found = shares(rank)
        expected = {"input": 0.1, "forward": 0.2, "backward": 0.1, "reduce": 0.4 - wait, "wait": wait, "update": 0.1,
                    "other": 0.1, "check": 0.0, "share": 0.0, "validation": 0.0}
        assert {kind: found[kind] for kind in expected} == pytest.approx(expected, abs=1e-4)
    assert shares(ranks[0])["behind"] == 0 and shares(ranks[1])["behind"] == pytest.approx(0.25)


def test_report_tells_and_draws_the_timeline_of_a_single_run(tmp_path, hpcmlp):
    first, second = write_log(tmp_path / "first"), write_log(tmp_path / "second")
    write_trace(first)
    done = hpcmlp("report", first)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "perfetto" in lines[0] and lines[2].split()[:3] == ["0", "0.100", "10.0"] and len(lines) == 6
    assert (first / "timeline.png").read_bytes().startswith(PNG)
    done = hpcmlp("report", first, second, "--out", tmp_path / "both")
    assert done.returncode == 0 and str(first / "trace.json") in done.stdout
    assert not (tmp_path / "both" / "timeline.png").exists()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"otherData": {"ranks": 1}, "traceEvents": [{"ph": "X"}]}'])
def test_a_damaged_timeline_is_one_sentence(tmp_path, text):
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(DataError, match="not a timeline"):
        read_trace(tmp_path / "trace.json")


def test_an_event_of_a_rank_that_is_not_there_is_refused(tmp_path):
    event = {"name": "step", "ph": "X", "pid": 3, "tid": 0, "ts": 0, "dur": 1, "args": {"step": 1}}
    (tmp_path / "trace.json").write_text(json.dumps({"otherData": {"ranks": 2}, "traceEvents": [event]}))
    with pytest.raises(DataError, match="rank 3"):
        read_trace(tmp_path / "trace.json")
