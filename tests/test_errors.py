"""Every error is one line that a terminal shows and does not obey."""

import pytest

from hpcmlp.errors import printable, printable_lines


@pytest.mark.parametrize("given, shown", [
    ("plain", "plain"), ("two\nlines", "two lines"), ("\x1b[31mred\x07", r"\x1b[31mred\x07"), ("caf\xe9", "caf\xe9"),
    ("half \ud800", r"half \ud800"), ("raw \udcff byte", r"raw \udcff byte"), ("right\u202eleft", r"right\u202eleft"),
    ("sep\u2028arated", r"sep\u2028arated"), ("tab\t", r"tab\t")])
def test_what_a_terminal_would_obey_is_escaped(given, shown):
    assert printable(given) == shown
    shown.encode()


def test_an_endless_sentence_is_shortened_in_the_middle():
    text = "begin" + "x" * 1_000_000 + "\n" + "y" * 10
    assert len(printable(text)) <= 1500 and printable(text).startswith("beginx") and " ... " in printable(text)
    assert printable("a" * 1500) == "a" * 1500


def test_lines_stay_lines():
    assert printable_lines("a\n\x1bb\n") == "a\n\\x1bb\n"
