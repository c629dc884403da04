"""Learning curves are drawn from whole logs, from torn ones, for several runs, or not at all with one sentence."""

import json
import sys

import pytest

from hpcmlp.errors import DataError, InputMissing
from hpcmlp.run.curves import draw_curves, read_records

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
