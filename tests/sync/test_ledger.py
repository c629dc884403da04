"""The book of server 0: every task once, staleness within its bound, no endless wait, losses cost a share."""

import math
import random

import pytest

from hpcmlp.sync.ledger import Ledger


class Simulation:
    """Workers of random speed around a ledger, as server 0 treats them; time is a number of turns."""

    def __init__(self, ledger, seed, slow=()):
        self.ledger, self.random, self.slow = ledger, random.Random(seed), slow
        self.ready_at = {}
        self.done, self.staleness = [], []
        self.now = 0.0
        self.lost = set()

    def run(self, first, stop):
        ledger = self.ledger
        ledger.begin(first, stop, self.now)
        for worker in list(ledger.alive):
            ledger.hello(worker)
            self.give(worker)
        turns = 0
        while ledger.alive and not ledger.done:
            turns += 1
            assert turns < 100_000, "nobody moves any more"
            busy = {w: t for w, t in self.ready_at.items() if w not in self.lost}
            if busy:
                worker = min(busy, key=busy.get)
                self.now = max(self.now, self.ready_at.pop(worker))
                ledger.held.append(worker)
                self.add()
            else:
                self.now += 1.0
            for worker in ledger.late(self.now):
                ledger.drop(worker)
                self.add()
                for other in ledger.waiting():
                    self.give(other)

    def add(self):
        ledger = self.ledger
        while (worker := next((w for w in ledger.held if ledger.may_add(w)), None)) is not None:
            ledger.held.remove(worker)
            self.done.append(ledger.out[worker].task)
            self.staleness.append(ledger.add(worker))
            if ledger.full:
                ledger.close()
            self.give(worker)

    def give(self, worker):
        if self.ledger.give(worker, self.now) is not None:
            pace = 8.0 if worker in self.slow else 1.0
            self.ready_at[worker] = self.now + pace * self.random.expovariate(1.0)


@pytest.mark.parametrize("slots", [1, 2, 4, 7])
@pytest.mark.parametrize("bound", [1, 2, 4, math.inf])
def test_every_task_once_and_never_too_stale(slots, bound):
    largest = 0
    for seed in range(20):
        ledger = Ledger(slots, bound, math.inf)
        world = Simulation(ledger, seed, slow=(slots - 1,))
        world.run(0, 12)
        world.run(12, 25)
        assert sorted(world.done) == list(range(25 * slots)) and ledger.version == 25
        assert max(world.staleness) <= bound
        largest = max(largest, max(world.staleness))
    if slots > 1:
        # The bound is reached, so that a ledger that always allows would not pass; without one it is exceeded.
        assert largest == bound if bound <= 2 else largest > 2


def test_a_ledger_without_its_gate_is_caught_by_its_own_assertion():
    class Open(Ledger):
        def may_add(self, worker):
            return True

    with pytest.raises(AssertionError, match="exceeds 2"):
        for seed in range(50):
            Simulation(Open(4, 2, math.inf), seed, slow=(3,)).run(0, 30)


@pytest.mark.parametrize("bound", [1, 3, math.inf])
def test_a_lost_worker_costs_no_sample_and_stops_nobody(bound):
    ledger = Ledger(4, bound, timeout_s=50.0)
    world = Simulation(ledger, 1)
    world.lost = {2}
    world.run(0, 40)
    assert ledger.alive == [0, 1, 3] and sorted(world.done) == list(range(160))
    assert world.now >= 50.0
    world.lost |= {0, 1, 3}
    world.run(40, 45)
    assert not ledger.alive


def test_a_stop_ends_with_whole_updates():
    ledger = Ledger(3, 2, math.inf)
    ledger.begin(5, 50, 0.0)
    for worker in range(3):
        ledger.hello(worker)
    assert [ledger.give(worker, 0.0) for worker in (0, 1)] == [15, 16]
    ledger.stop()
    assert ledger.give(2, 0.0) == 17 and not ledger.done
    for worker in range(3):
        assert ledger.add(worker) == 0
    assert ledger.full
    ledger.close()
    assert [ledger.give(worker, 0.0) for worker in range(3)] == [None] * 3
    assert ledger.done and ledger.version == 6


def test_statistics_are_those_since_the_last_report():
    ledger = Ledger(2, 1, math.inf)
    Simulation(ledger, 0).run(0, 3)
    ledger.note(7, 0.5, 0.25)
    ledger.note(7, 0.5, 0.25)
    report = ledger.report()
    assert report.pushes == 6 and report.gives == 6 and report.workers[7].wait_s == 0.5
    assert ledger.report().pushes == 0
