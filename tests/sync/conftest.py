"""Collectives for a test, which are given back when it has ended."""

import pytest

from hpcmlp.comm import make_collective


@pytest.fixture
def opened(topology, given_back):
    """A function that opens the collectives called `name` over all ranks, until the test ends."""
    return lambda name: given_back(make_collective(name, topology))
