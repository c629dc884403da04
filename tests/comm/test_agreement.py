"""User errors of one rank are raised on all ranks alike."""

import pytest

from hpcmlp.comm.agreement import agree, agreed
from hpcmlp.errors import CannotWrite, ConfigError, DataError, HpcmlpError, RunFailed


@pytest.mark.mpi
def test_nothing_is_raised_when_all_is_well(comm):
    for _ in range(3):
        with agreed(comm):
            value = comm.rank
        assert value == comm.rank


@pytest.mark.mpi
@pytest.mark.parametrize("kind", [DataError, ConfigError, CannotWrite, RunFailed])
def test_error_of_any_rank_is_raised_on_all(comm, kind):
    for failing in range(comm.size):
        with pytest.raises(kind) as raised, agreed(comm):
            if comm.rank == failing:
                raise kind("shard a.h5, row 3: not finite, \u00e9.")
        text = str(raised.value)
        assert text.endswith("shard a.h5, row 3: not finite, \u00e9.") and raised.value.agreed
        assert text.startswith(f"rank {failing} (") == (comm.size > 1)
        assert len(set(comm.allgather(text))) == 1


@pytest.mark.mpi
def test_lowest_failing_rank_speaks(comm):
    with pytest.raises(DataError, match="said by 0"), agreed(comm):
        raise (DataError if comm.rank == 0 else ConfigError)(f"said by {comm.rank}")


@pytest.mark.mpi
def test_an_error_that_all_ranks_raise_is_not_agreed_again(comm):
    with pytest.raises(DataError) as raised:
        agree(comm, DataError("once"))
    with pytest.raises(DataError) as again:
        agree(comm, raised.value)
    assert str(again.value) == str(raised.value)


@pytest.mark.mpi(min_size=1)
def test_our_own_faults_pass_through(comm):
    # On all ranks at once, so that no rank waits: the abort hook is tested through the command line.
    with pytest.raises(ZeroDivisionError), agreed(comm):
        raise ZeroDivisionError
    with pytest.raises(HpcmlpError), agreed(comm):
        raise HpcmlpError("plain")
