"""The fault campaign in short: a few faults of each program are as promised, and a broken promise shows."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks/faults"


@pytest.fixture(scope="module")
def campaign():
    spec = importlib.util.spec_from_file_location("campaign", FOLDER / "campaign.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_malformed_inputs_end_in_a_result_or_in_one_sentence(campaign):
    rows = list(campaign.load(FOLDER / "inputs.py").rows(60, 2))
    assert {row["fault"] for row in rows} >= {f"malformed {k}" for k in ("hdf5", "csv", "npz", "idx", "toml", "json")}
    for row in rows:
        assert row["injected"] == row["completed"] == 60, row
        assert "read, " in row["note"] and not row["note"].startswith("60 read")


def test_a_reader_that_breaks_its_promise_is_a_finding(campaign, monkeypatch, tmp_path):
    inputs = campaign.load(FOLDER / "inputs.py")
    from hpcmlp.data.npz_reader import NpzFile

    def broken(self, *_):
        raise RuntimeError("fault on purpose")
    monkeypatch.setattr(NpzFile, "__init__", broken)
    result, detail = inputs.judge("npz", inputs.corpus_file("npz"), tmp_path / "case", None, False)
    assert result == "finding" and "RuntimeError: fault on purpose" in detail


@pytest.mark.parametrize("text, flaw", [("", "empty"), ("x" * 3000, "3000 characters"), ("a\x1b", "control"),
                                        ("a", None)])
def test_a_sentence_that_a_terminal_would_obey_is_a_finding(campaign, text, flaw):
    found = campaign.load(FOLDER / "inputs.py").flaw_of(text)
    assert found is None if flaw is None else flaw in found


def test_errors_of_the_disk_leave_nothing_partial(campaign, tmp_path):
    """One call of each program in its middle; all of them: make campaign."""
    disk = campaign.load(FOLDER / "disk.py")
    bench = disk.Bench(tmp_path)
    for task, full in zip(bench.tasks, (True, False, True), strict=True):
        call = bench.calls(task) // 2
        assert call > 5                                # the shim sees the calls
        assert bench.fail_at(task, call, disk.errno.ENOSPC, full) in (None, True)


def test_a_row_that_does_not_complete_and_a_program_that_raises_show(campaign, monkeypatch, capsys, tmp_path):
    good = ('"""A program."""\n\n\ndef rows(count, seed):\n    yield dict(fault="a", injected=3, completed=2, '
            'identical=None, recover_s=0.1, note="")\n    raise ValueError("broken")\n')
    (tmp_path / "one.py").write_text(good)
    monkeypatch.setattr(campaign, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["campaign.py"])
    assert campaign.main() == 1
    assert "2 rows are not as promised" in capsys.readouterr().out


def test_a_killed_or_failing_rank_ends_the_job_on_all_others(campaign, monkeypatch, tmp_path):
    """Within 2 s on a quiet machine (make campaign); the suite may run on a crowded one."""
    ranks = campaign.load(FOLDER / "ranks.py")
    monkeypatch.setattr(ranks, "LIMIT_S", 15.0)
    monkeypatch.setattr(ranks, "ACTS", ("kill", "raise"))
    found = list(ranks.rows(1, 1))
    assert len(found) == 4
    for row in found:
        assert row["completed"] == row["injected"] == 1, row
