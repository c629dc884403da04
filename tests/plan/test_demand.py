"""Memory, traffic and storage: against hand-made examples, and against what running collectives count."""

import numpy as np
import pytest

from hpcmlp import traffic
from hpcmlp.comm.served import Roles
from hpcmlp.nn.network import NetworkSpec
from hpcmlp.plan import demand
from hpcmlp.plan.machine import Process
from hpcmlp.plan.record import record
from hpcmlp.plan.workload import Workload
from hpcmlp.sync.memory import state_bytes
from hpcmlp.sync.storage import one_bucket

NOTHING = Process(0.0, 0.0)


def test_parameters_of_the_articles_example(workload):
    layers, total = demand.count_params(workload((784, 256, 256, 10)))
    assert layers == [200_960, 65_792, 2_570] and total == 269_322


def test_memory_by_hand(workload):
    """One hidden layer whose tensors need no padding: 32 x 16 + 16 and 16 x 16 + 16 parameters of 4 bytes."""
    w = workload((32, 16, 16), ranks=2, batch=20, sync="shared", rows=(100, 0, 0), row_bytes=32 * 4 + 4)
    found = demand.memory(w, record(w), Process(1000, 300))
    flat = 4 * (32 * 16 + 16 + 16 * 16 + 16)
    # 10 samples a rank: inputs, activations and logits, gradient of the logits, and one buffer of gradients behind.
    activations = 4 * 10 * (32 + 16 + 16 + 16 + 16)
    assert found.rank == {"parameters": flat, "gradients": flat, "optimizer": flat, "activations": activations,
                          "data": 50 * 132, "process": 1000}
    assert found.copy == 3 * flat       # parameters and two moments, for saving
    assert found.node == flat + 2 * (2 * flat + activations + 50 * 132 + 1000) + found.copy + 300


@pytest.mark.parametrize("ranks, per_node, sync, more", [
    (1, 4, "ring", 0), (1, 4, "shared", 0), (4, 4, "ring", 7), (4, 4, "shared", 50), (4, 2, "shared", 57),
    (4, 1, "shared", 7), (4, 2, "ring", 7), (4, 4, "server", 50)])
def test_mpi_takes_memory_of_its_own_by_the_ways_that_are_used(workload, ranks, per_node, sync, more):
    w = workload(ranks=ranks, per_node=per_node, sync=sync)
    quiet, busy = (demand.memory(w, record(w), p) for p in (Process(1000, 0), Process(1000, 0, windows=50, messages=7)))
    assert busy.rank["process"] - quiet.rank["process"] == more
    assert busy.node - quiet.node == more * min(ranks, per_node)


def test_ring_and_full_update_hold_more_than_shared_memory(workload):
    def node(**options):
        w = workload((256, 512, 10), ranks=4, batch=64, **options)
        return demand.memory(w, record(w), NOTHING).node

    flat = 4 * workload((256, 512, 10)).spec.layout().size
    assert node(sync="ring") - node(sync="shared") >= 3 * flat
    assert node(sync="ring", full_update=True) - node(sync="ring") == pytest.approx(4 * 2 * flat * 3 / 4, rel=0.01)


@pytest.mark.parametrize("sync, common", [("ring", 1), ("shared", 4)])
def test_slices_hold_what_a_sharded_run_was_measured_to_hold(workload, sync, common):
    """`state_bytes` is compared with running ranks in tests/sync/test_memory.py."""
    w = workload((784, *[512] * 6, 10), ranks=4, per_node=4, batch=64, sync=sync, sharded=True)
    found = demand.memory(w, record(w), NOTHING)
    kept = ("parameters", "gradients", "optimizer", "gathered layers", "gradients of layers")
    held = sum(found.rank[name] for name in kept)
    if sync == "shared":
        held -= found.rank["gathered layers"] * (1 - 1 / common)
    assert held == pytest.approx(state_bytes(w.spec, 2, 4, sharded=True, common=common), rel=0.01)
    assert found.copy == found.moment == 0      # saved and evaluated layer by layer
    one = demand.memory(workload((784, *[512] * 6, 10), batch=64), record(w), NOTHING)
    assert one.copy > 0


@pytest.fixture
def sent_by_steps(comm, topology, given_back):
    """A function that takes real steps with real messages and returns, per step, the bytes that the collectives count.

    They count what they hand to MPI (checked in test_bytes and test_served).
    """
    from hpcmlp.comm import open_exchange
    from hpcmlp.data.samples import Batch
    from hpcmlp.nn.losses import Loss
    from hpcmlp.nn.network import Network
    from hpcmlp.nn.optimizers import make_optimizer
    from hpcmlp.ops.host import HostOps
    from hpcmlp.sync import make_strategy, plan
    from hpcmlp.sync.step import Step

    def run(w, buckets=None):
        spec, ops, rows = w.spec, HostOps(), w.local_rows
        exchange = open_exchange(w.sync, topology, spec.layout().size, np.float32, wire=w.wire, servers=w.servers,
                                 in_step=False)
        given_back(exchange.collective)
        planned = plan(spec, exchange.collective, comm.size, topology.num_nodes, w.bucket_mb)
        network = Network(spec, ops, rows, exchange.params, exchange.grads, piece=planned.piece)
        strategy = make_strategy(False, exchange.collective.narrow)(
            exchange.collective, buckets or planned.buckets, comm.size, network.params, network.grads, ops)
        optimizer = make_optimizer("adam", ops, spec.layout(), strategy.ranges, np.float32)
        step = Step(network, Loss("softmax_cross_entropy"), optimizer, strategy, ops, rows=rows, clip_norm=w.clip_norm)
        x = np.ones((rows, spec.sizes[0]), np.float32)
        batch = Batch(rows, 0, rows, x, np.arange(rows), np.zeros(rows, np.int32), None)
        results = [step.run(batch, number, 1e-3) for number in range(3)]
        assert not any(result.skipped for result in results)
        return [result.bytes_sent for result in results]
    return run


@pytest.mark.mpi
@pytest.mark.parametrize("sizes, wire, bucket_mb", [
    ((20, 12, 3), "float32", None), ((64, 512, 64, 5), "float32", 0.05), ((64, 512, 64, 5), "bf16", None),
    ((64, 512, 64, 5), "int8", 0.05), ((1, 1), "float32", None), ((300, 300, 10), "float32", None)])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_ring_sends_what_was_foretold_to_the_byte(comm, sizes, wire, bucket_mb, clip, sent_by_steps):
    wire = wire if comm.size > 1 else "float32"
    w = Workload(NetworkSpec(sizes), comm.size, comm.size, 4 * comm.size, optimizer="adam", sync="ring",
                 bucket_mb=bucket_mb, wire=wire, clip_norm=clip)
    assert sent_by_steps(w) == [demand.sent_bytes(w, record(w), comm.rank)] * 3


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("servers", [1, 2, "all"])
def test_servers_and_workers_send_what_was_foretold_to_the_byte(comm, servers, clip, sent_by_steps):
    servers = comm.size if servers == "all" else servers
    w = Workload(NetworkSpec((64, 512, 64, 5)), comm.size, comm.size, 4 * comm.size, optimizer="adam", sync="server",
                 servers=servers, clip_norm=clip, only_messages=True)
    buckets = one_bucket(w.spec.layout().size, Roles(servers, comm.size))
    assert sent_by_steps(w, buckets) == [demand.sent_bytes(w, record(w), comm.rank)] * 3


def test_shared_memory_sends_nothing_on_a_node_and_a_share_between_nodes(workload):
    alone = workload((256, 512, 10), ranks=4, sync="shared")
    assert demand.sent_bytes(alone, record(alone)) == 0
    w = workload((256, 512, 10), ranks=8, per_node=4, sync="shared", overlap=False)
    flat = 4 * w.spec.layout().size
    # (N - 1)/N of a local rank's share in each half, and 9 words of 8 bytes; parts are cut at 16 elements.
    assert demand.sent_bytes(w, record(w)) == pytest.approx(2 * flat / 4 / 2 + 72, abs=2 * 64 + 1)


def test_local_steps_send_one_meeting_in_so_many_steps(workload):
    every, rarely = workload(ranks=4, local_steps=2), workload(ranks=4, local_steps=8)
    sent = demand.sent_bytes(every, record(every))
    assert demand.sent_bytes(rarely, record(rarely)) == pytest.approx(sent / 4, abs=1)


def test_a_checkpoint_holds_whole_arrays(workload):
    w = workload((784, 256, 10), rows=(1000, 100, 0))
    # parameters, two moments, the best parameters
    assert demand.storage(w, 5)["checkpoint"] == 4 * 4 * 203_530 and demand.storage(w, 5)["data"] == 5


def test_a_message_of_int8_carries_its_scales():
    assert traffic.part_bytes(2**18, "int8") == 2**18 + 4 * 2**10
    assert traffic.part_bytes(2**18 + 1, "int8") == 2**18 + 4 * 2**10 + 1 + 4


def test_an_evaluation_adds_its_samples_and_a_network_where_others_are_judged(workload):
    """32-16-16 on 2 ranks: 500 rows of validation and 1500 of test a rank, of which 1024 at once."""
    sizes, flat = (32, 16, 16), 4 * (32 * 16 + 16 + 16 * 16 + 16)
    rows = (4000, 1000, 3000)

    def found(**options):
        w = workload(sizes, ranks=2, batch=20, rows=rows, row_bytes=132, **options)
        return demand.memory(w, record(w), NOTHING)

    plain = found()
    # Forward buffers by the rows of a validation, what backward and the step need by the 10 rows of a batch.
    assert plain.rank["activations"] == 4 * (500 * (16 + 16) + 10 * (32 + 16 + 16))
    assert plain.rank["data"] == (2000 + 500) * 132 and plain.rank["best state"] == flat / 2
    # The best parameters and a network for them, 1024 rows of it, inputs and gradients of logits, all test rows.
    test = 1500 * 132 + 4 * 1024 * (32 + 16)
    assert plain.moment == 2 * (2 * flat + 4 * 1024 * (16 + 16) + test)
    averaged = found(ema=True)
    assert averaged.rank["averaged network"] == flat + 4 * 1024 * (16 + 16)     # stays from the first validation on
    assert averaged.moment == 2 * (flat + test)


def test_a_server_holds_state_and_a_worker_samples(workload):
    """32-16-16, one server and two workers on a node; 10 rows a worker, 100 of validation a rank."""
    flat = 4 * (32 * 16 + 16 + 16 * 16 + 16)

    def found(**options):
        w = workload((32, 16, 16), ranks=3, batch=20, sync="server", rows=(2000, 300, 0), row_bytes=132, **options)
        return demand.memory(w, record(w), NOTHING)

    val, forward = 100 * 132, 4 * 100 * (16 + 16)
    worker = 2 * flat + forward + 4 * 10 * (32 + 16 + 16) + 1000 * 132 + val
    server = 2 * flat + 2 * flat + flat + forward + val     # moments and best parameters whole
    in_step = found()       # parameters once
    assert in_step.node - in_step.copy == server + 2 * worker - 2 * flat
    by_messages = found(only_messages=True)     # segments of the second worker, parameters of each
    assert by_messages.node - by_messages.copy == server + 2 * flat + 2 * worker
    nodes = found(per_node=2)   # segments of the second worker
    assert nodes.node - nodes.copy == server + 2 * flat + worker
    assert in_step.rank_bytes == worker
    apart = found(staleness=True)       # a slice from each worker and one for it; workers have all samples
    assert apart.node - apart.copy == server + 4 * flat + 2 * (worker + 1000 * 132)


def test_the_sum_of_micro_batches_takes_a_gradient_of_the_longest_layer(workload):
    one, four = (demand.memory(w, record(w), NOTHING).rank["activations"]
                 for w in (workload((32, 16, 16), batch=5), workload((32, 16, 16), batch=20, accumulate=4)))
    assert four - one == 4 * (32 * 16 + 16)


def test_the_code_of_libraries_counts_once_on_a_node(workload):
    node, apart = workload(ranks=2), workload(ranks=2, per_node=1)
    for w, ranks in ((node, 2), (apart, 1)):
        more, less = (demand.memory(w, record(w), Process(100, code)) for code in (7000, 0))
        assert more.node - less.node == 7000 and less.rank["process"] == 100
        assert less.node - less.copy == pytest.approx(ranks * less.rank_bytes, abs=2)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("one_node", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_the_rings_buffers_are_those_foretold(comm, one_node, overlap, monkeypatch):
    """Between nodes messages are shorter than in a node, and so are the buffers that take them."""
    from types import SimpleNamespace

    from hpcmlp.comm import make_collective
    from hpcmlp.comm import ring as ring_module
    made, make = [], ring_module.work_buffers
    monkeypatch.setattr(ring_module, "work_buffers", lambda *given: made.append(make(*given)) or made[-1])
    ring = make_collective("ring", SimpleNamespace(comm=comm, size=comm.size, num_nodes=1 if one_node else comm.size))
    w = Workload(NetworkSpec((784, 2048, 512, 10)), comm.size, comm.size if one_node else 1, 16 * comm.size,
                 sync="ring", overlap=overlap)
    recording = record(w)
    grads = ring.empty(w.spec.layout().size, np.float32)
    for bucket in recording.planned.buckets:
        ring.start_reduce_scatter(grads[bucket.start:bucket.stop], bucket.bounds).wait()
    ring.free()
    held = sum(buffer.nbytes for buffers in made for buffer in buffers)
    assert demand.memory(w, recording, NOTHING).rank["messages"] == held


def test_a_narrow_wire_keeps_a_vector_for_saving_where_there_are_messages(workload):
    flat = 4 * (32 * 16 + 16 + 16 * 16 + 16)

    def kept(**options):
        w = workload((32, 16, 16), ranks=4, batch=20, wire="bf16", **options)
        found = demand.memory(w, record(w), NOTHING)
        return found.rank.get("gathered for saving"), found.moment

    # And rank 0's copies of the masters and of what is owed, for a moment.
    assert kept(sync="ring") == kept(sync="shared", per_node=2) == (flat, 2 * flat) and kept(sync="shared") == (None, 0)
