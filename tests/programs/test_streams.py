"""Standard output that nobody reads any more ends a program quietly, and what it has written stays whole."""

import pytest

from hpcmlp.run import checkpoint


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_closed_standard_output_is_141_without_a_word(flowers, start_hpcmlp, hpcmlp, tmp_path, ranks):
    unread = ("bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash")
    process = start_hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--hidden", 4, "--epochs", 2,
                           ranks=ranks, within=unread)
    text = process.communicate(timeout=60)[1]
    if ranks is None:                                  # a launcher reads its ranks' output itself
        assert process.returncode == 141 and "Traceback" not in text, text
    assert not checkpoint.list_checkpoints(tmp_path / "run") or checkpoint.newest_good(tmp_path / "run")[0] is not None
    done = hpcmlp("train", "--data", flowers, "--out", tmp_path / "run", "--hidden", 4, "--epochs", 2, "--resume")
    assert done.returncode == 0, done.stderr
