"""Planted failures: the harness ends each within seconds, with the failing rank's own words."""

import shutil
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

PLANTED = '''
import pytest
from mpi4py import MPI

@pytest.mark.mpi
def test_planted(comm):
    {body}

@pytest.mark.mpi
def test_after(comm):
    comm.Barrier()
'''


@pytest.fixture
def planted(tmp_path, run_ranks):
    """A function that runs a test body on 2 ranks under the harness: (result, seconds)."""
    def run(body, *options):
        shutil.copy(REPOSITORY / "tests/conftest.py", tmp_path / "conftest.py")
        (tmp_path / "test_planted.py").write_text(PLANTED.format(body=body))
        start = time.monotonic()
        result = run_ranks(2, "-m", "pytest", "-c", REPOSITORY / "pyproject.toml", "--rootdir", tmp_path, "--only-mpi",
                           "-p", "no:cacheprovider", "--color=no", *options, tmp_path, timeout=60, cwd=tmp_path,
                           env={"HPCMLP_TEST_PATIENCE": "1"})
        return result, time.monotonic() - start
    return run


def test_failure_of_one_rank_is_told_by_rank_0_and_later_tests_run(planted):
    result, seconds = planted("assert comm.rank != 1, 'planted on rank one'")
    assert result.returncode == 1, result.stderr
    assert "--- rank 1 of 2: failed ---" in result.stdout and "planted on rank one" in result.stdout
    assert "1 failed, 1 passed" in result.stdout
    assert seconds < 20


def test_failure_before_a_collective_ends_the_run_with_that_ranks_traceback(planted):
    result, seconds = planted("assert comm.rank != 1, 'planted before the barrier'; comm.Barrier()")
    assert result.returncode == 1, result.stdout
    assert "rank 1 failed while others wait" in result.stderr and "planted before the barrier" in result.stderr
    assert seconds < 20


def test_deadlock_without_a_failure_ends_with_the_stacks(planted):
    result, seconds = planted("comm.Barrier() if comm.rank == 0 else comm.Recv(bytearray(1), 0)",
                              "-o", "faulthandler_timeout=2")
    assert result.returncode != 0
    assert "Timeout" in result.stderr and "test_planted.py" in result.stderr
    assert seconds < 20


def test_skip_on_one_rank_only_is_a_failure(planted):
    result, _ = planted("comm.rank == 1 and pytest.skip('planted')")
    assert result.returncode == 1
    assert "--- rank 1 of 2: skipped ---" in result.stdout and "1 failed, 1 passed" in result.stdout


def test_collection_error_on_one_rank_ends_the_run(planted):
    result, seconds = planted("pass\n\nif MPI.COMM_WORLD.rank == 1:\n    raise RuntimeError('planted at import')")
    assert result.returncode not in (0, 5)
    assert "planted at import" in result.stderr
    assert seconds < 20


def test_unknown_word_in_a_marker_is_an_error(planted):
    result, _ = planted("pass\n\n@pytest.mark.mpi(minsize=4)\ndef test_word():\n    pass")
    assert result.returncode != 0
    assert "does not know ['minsize']" in result.stdout + result.stderr
