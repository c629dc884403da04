"""Foretold beside measured: what is off is named, what agrees is not."""

from hpcmlp.plan.compare import compare, lines

OUTLOOK = {"step_s": 0.010, "step_parts_s": {"products": 0.006, "passes": 0.001, "update": 0.0005, "fixed": 0.0005,
                                             "comm": 0.0019, "input": 0.0001},
           "memory_bytes_per_node": 100 << 20, "sent_bytes_per_rank_and_step": 1000}


def measured(step=0.010, comm=0.0019, memory=100 << 20, sent=1000, wait=0.0):
    return {"step_s": step, "parts_s": {"compute": 0.008, "comm": comm, "wait": wait, "input": 0.0001},
            "memory_bytes_per_node": memory, "sent_bytes_per_rank_and_step": sent}


def test_what_agrees_is_not_remarked_on():
    found = compare(OUTLOOK, measured(step=0.0105))
    assert found["off"] == [] and found["compute_s"]["ratio"] == 1.0
    assert len(lines(found)) == 1 and "foretold 10" in lines(found)[0]


def test_the_part_that_was_off_is_named():
    found = compare(OUTLOOK, measured(step=0.015, comm=0.0069))
    assert len(found["off"]) == 1 and "50 % longer" in found["off"][0]
    assert "communication: 6.9 ms, foretold 1.9" in found["off"][0]


def test_waiting_for_late_ranks_is_a_part_of_its_own():
    found = compare(OUTLOOK, measured(step=0.014, wait=0.004))
    assert found["comm_s"]["ratio"] == 1.0 and found["wait_s"] == {"foretold": 0.0, "measured": 0.004, "ratio": None}
    assert "waiting for late ranks: 4 ms, foretold 0" in found["off"][0]
    assert "wait 4 ms (foretold 0)" in lines(found)[0]


def test_memory_and_traffic_that_differ_are_named():
    found = compare(OUTLOOK, measured(memory=130 << 20, sent=1008))
    assert [sentence.split()[0] for sentence in found["off"]] == ["memory", "a"]
    assert "+30 MiB" in found["off"][0] and "1,008" in found["off"][1]


def test_without_times_only_memory_and_traffic_are_compared():
    known = {name: OUTLOOK[name] for name in ("memory_bytes_per_node", "sent_bytes_per_rank_and_step")}
    assert set(compare(known, measured())) == {*known, "off"}
    nothing = dict.fromkeys(measured())
    assert compare(OUTLOOK, nothing) == {"off": []}
