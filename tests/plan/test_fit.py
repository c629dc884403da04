"""What does not fit is refused with what is missing and an option that, taken, makes it fit."""

from dataclasses import replace

import pytest

from hpcmlp.plan.demand import memory
from hpcmlp.plan.fit import MARGIN, needed_bytes, shortage
from hpcmlp.plan.machine import Process
from hpcmlp.plan.record import record

NOTHING = Process(0.0, 0.0)


def test_what_fits_is_not_refused(workload):
    w = workload((256, 512, 10), ranks=2, sync="shared", overlap=False)
    needed = needed_bytes(memory(w, record(w), NOTHING))
    assert shortage(w, int(needed / (1 - MARGIN)) + 2, "here", NOTHING) == ""
    assert "here has" in shortage(w, int(needed / (1 - MARGIN)) - 2, "here", NOTHING)


@pytest.mark.parametrize("options, option, change", [
    ({"sync": "ring"}, "--sync shared", {"sync": "shared"}),
    ({"sync": "shared", "batch": 65536}, "--accumulate 2", {"accumulate": 2}),
    ({"sync": "shared", "rows": (10**6, 0, 0), "row_bytes": 2000}, "--memory-limit", None)])
def test_the_named_option_makes_it_fit(workload, options, option, change):
    w = workload((784, 1024, 1024, 10), ranks=4, overlap=False, **options)
    needed = needed_bytes(memory(w, record(w), NOTHING))
    sentence = shortage(w, int(0.85 * needed), "n1", NOTHING)
    assert option in sentence and "are missing" in sentence and len(sentence.splitlines()) == 1
    if change is None:
        change = {"memory_limit": int(sentence.split("--memory-limit ")[1].split()[0]) << 20}
    assert shortage(replace(w, **change), int(0.85 * needed), "n1", NOTHING) == ""


def test_a_network_beyond_all_machines_is_refused_at_once(workload):
    w = workload((784, 2**24, 2**24, 10), ranks=2, per_node=2, sync="shared")
    assert "no single option makes it fit" in shortage(w, 2**34, "n1", NOTHING)
