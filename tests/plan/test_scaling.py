"""Curves, the best of them and advice, on the machine of round numbers."""

import pytest

from hpcmlp.plan import scaling
from hpcmlp.plan.events import step_time


def test_rank_counts_are_powers_of_two_and_the_planned_one():
    assert scaling.rank_counts(16, also=6) == [1, 2, 4, 6, 8, 16]
    assert scaling.rank_counts(1) == [1]


def test_a_curve_holds_what_the_event_model_says_of_each_count(workload, machine):
    w = workload((300, 300, 10), batch=4096, sync="shared")
    points = scaling.curve(w, machine, [1, 2, 4, 8], 4, weak=False)
    assert [p.ranks for p in points] == [1, 2, 4, 8]
    for point in points:
        alone = scaling.on_ranks(w, point.ranks, 4)
        assert point.step_s == step_time(alone, machine).step_s
        assert point.efficiency == pytest.approx(points[0].step_s / point.ranks / point.step_s)


def test_weak_scaling_keeps_the_local_batch(workload, machine):
    points = scaling.curve(workload((300, 300, 10), ranks=2, batch=64), machine, [1, 2, 4], 4, weak=True)
    assert [p.global_batch_size for p in points] == [32, 64, 128]
    assert points[1].samples_per_s == pytest.approx(64 / points[1].step_s)


def test_strong_scaling_ends_where_ranks_would_have_no_samples(workload, machine):
    points = scaling.curve(workload(batch=6), machine, [1, 2, 4, 8], 8, weak=False)
    assert [p.ranks for p in points] == [1, 2, 4]


def test_the_best_counts_are_those_of_the_curve():
    points = [scaling.Point(p, 64, s, 64 / s, e, "compute") for p, s, e in
              ((1, 8.0, 1.0), (2, 4.4, 0.91), (4, 2.9, 0.69), (8, 3.0, 0.33))]
    best = scaling.best(points, 0.8)
    assert best["shortest"] == 4 and best["efficient"] == 2


def test_narrow_numbers_help_a_slow_link_and_not_a_single_node(workload, machine):
    def options(**where):
        w = workload((1000, 1000, 10), ranks=4, batch=64, overlap=False, **where)
        return {e["option"]: e["gain"] for e in scaling.advice(w, machine, step_time(w, machine))}

    between, inside = options(per_node=1), options(per_node=4, sync="shared")
    assert between["--wire int8"] > between["--wire bf16"] > 0.2
    assert not [name for name in inside if name.startswith("--wire")]
