"""What an epoch and a run were spent on: communication of any rank, waiting of each, computing of those that train."""

from types import SimpleNamespace

import pytest

from hpcmlp.run import account
from hpcmlp.sync.step import StepResult

pytestmark = pytest.mark.mpi


def open_account(comm, **more):
    """An account of a run without anything else, and the records that it logs."""
    records = []
    progress = SimpleNamespace(step=0, skipped=0, spikes=0, loss_sum=0.0, weight_sum=0.0, lr_factor=1.0)
    parts = SimpleNamespace(comm=comm, session=SimpleNamespace(progress=progress), roles=None, apart=None, local=False,
                            plan=SimpleNamespace(overlap=False), steps_per_epoch=8, total_steps=16,
                            topology=SimpleNamespace(rank=comm.rank), config=SimpleNamespace(print_every=0, steps=None))
    vars(parts).update(more)
    console = SimpleNamespace(line=lambda text: None, progress=lambda *rest: None)
    return account.Account(parts, console, records.append), records


def take(counter, number, compute_s, comm_s, steps=1):
    # Skipped: the statistics of losses are not what is looked at here.
    result = StepResult(rows=4, weight=4.0, compute_s=compute_s, comm_s=comm_s, flight_s=comm_s, skipped=True,
                        steps=steps)
    counter.count(result, number, 0, 0.25, compute_s + comm_s + 0.25, False)


@pytest.mark.parametrize("last_steps", [100, 4])
def test_waiting_for_a_rank_is_the_others_and_no_communication(comm, monkeypatch, last_steps):
    """Also where an epoch has more steps than are kept: the last ones stand for it."""
    monkeypatch.setattr(account, "LAST_STEPS", last_steps)
    counter, records = open_account(comm)
    late = comm.size - 1
    for number in range(8):
        is_late = comm.rank == late
        take(counter, number, 3.0 if is_late else 1.0, 0.5 if is_late else 2.5)
    parts = counter.median_parts_s()
    counter.end_epoch(0, {})
    told = next(r for r in records if r["kind"] == "ranks")
    assert told["comm_s"] == 8 * 0.5
    assert told["wait_s"] == [0.0 if rank == late else 8 * 2.0 for rank in range(comm.size)]
    assert told["compute_s"] == [8 * (3.0 if rank == late else 1.0) for rank in range(comm.size)]
    seconds = next(r for r in records if r["kind"] == "epoch")["seconds"]
    assert seconds["comm"] == 4.0 and seconds["wait"] == told["wait_s"][comm.rank] and seconds["input"] == 2.0
    others = late / comm.size
    assert parts == pytest.approx({"compute": 3.0 - 2.0 * others, "comm": 0.5, "wait": 2.0 * others, "input": 0.25})


def test_the_next_epoch_begins_anew_and_rounds_count_as_one(comm):
    counter, records = open_account(comm)
    take(counter, 0, 1.0, 8.0)
    counter.end_epoch(0, {})
    for number in range(3):     # a round of local steps: the ranks meet in the last one
        take(counter, 8 + number, 1.0, 0.0 if number < 2 else 1.5, steps=0 if number < 2 else 3)
    counter.end_epoch(1, {})
    assert [r["comm_s"] for r in records if r["kind"] == "ranks"] == [8.0, 1.5]


def test_servers_that_do_not_train_are_left_out_of_the_means(comm):
    counter, _ = open_account(comm, roles=SimpleNamespace(workers=range(comm.size - 1, comm.size)))
    trains = comm.rank == comm.size - 1
    for number in range(3):
        take(counter, number, 1.0 if trains else 0.0, 0.5 if trains else 1.5)
    assert counter.median_parts_s() == {"compute": 1.0, "comm": 0.5, "wait": 0.0, "input": 0.25}


def test_nothing_is_told_apart_where_ranks_are_not_in_step(comm):
    """No call among them either that one of them might not make: each counts what it likes."""
    counter, records = open_account(comm, apart=object())
    for number in range(comm.rank):
        take(counter, number, 1.0, 2.0)
    counter.end_epoch(0, {})
    told = next(r for r in records if r["kind"] == "ranks")
    assert told["comm_s"] is None and told["wait_s"] == [2.0 * rank for rank in range(comm.size)]
    assert "wait" not in next(r for r in records if r["kind"] == "epoch")["seconds"]
    assert counter.median_parts_s() == ({"compute": 1.0, "comm": 2.0, "input": 0.25} if comm.rank else {})


def test_a_run_without_a_step_has_no_parts(comm):
    counter, records = open_account(comm)
    assert counter.median_parts_s() == {}
    counter.end_epoch(0, {})
    assert next(r for r in records if r["kind"] == "ranks")["comm_s"] == 0.0
