"""What the ranks of a node hold together for training, counted by the kernel (Pss) after whole steps."""

import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks/memory_per_node.py"
SIZES = (784, 2048, 2048, 10)
VECTOR = 4 * sum(a * b + b for a, b in zip(SIZES, SIZES[1:], strict=False))     # bytes of all parameters


@pytest.fixture(scope="module")
def measured(run_ranks):
    """(sync, ranks) -> what the program measured."""
    found = {}
    for sync, ranks in (("shared", 1), ("shared", 3), ("ring", 3)):
        done = run_ranks(ranks, PROGRAM, "--rank-of", sync, "--sizes", *SIZES, timeout=120)
        assert done.returncode == 0, done.stderr
        found[sync, ranks] = json.loads(done.stdout)
    return found


def test_a_node_holds_parameters_and_moments_once_and_a_gradient_per_rank(measured):
    one, three = (measured["shared", ranks]["measured"] for ranks in (1, 3))
    assert 1.9 * VECTOR < three - one < 2.2 * VECTOR        # two more gradients, and a little for messages
    for ranks in (1, 3):
        assert measured["shared", ranks]["measured"] < 1.08 * measured["shared", ranks]["expected"]


def test_the_ring_holds_parameters_on_every_rank_which_the_measurement_sees(measured):
    assert measured["ring", 3]["measured"] - measured["shared", 3]["measured"] > 1.8 * VECTOR
