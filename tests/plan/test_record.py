"""The recorded step: the operations of a real step in their order, and arrays as large as real ones."""

import numpy as np
import pytest

from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import make_optimizer
from hpcmlp.ops.host import HostOps
from hpcmlp.plan.record import Op, RecordingOps, Transfer, record
from hpcmlp.plan.workload import Workload
from hpcmlp.sync.buckets import cut
from hpcmlp.sync.step import Step
from hpcmlp.sync.strategy import SlicedUpdate


def test_flops_of_a_step_are_those_of_its_matrix_products(workload):
    sizes, rows = (20, 12, 7, 3), 64
    weights = sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))
    assert record(workload(sizes, batch=rows)).flops == 6 * rows * weights - 2 * rows * sizes[0] * sizes[1]


class SpyingOps(HostOps):
    """Real arithmetic that writes down which of its operations were called, and what was allocated."""

    def __init__(self):
        super().__init__()
        self.calls, self.allocated = [], 0

    def empty(self, shape, dtype):
        self.allocated += np.dtype(dtype).itemsize * int(np.prod(shape))
        return super().empty(shape, dtype)

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        array[...] = 0
        return array


def spy(name):
    def call(self, *args, **kwargs):
        self.calls.append(name)
        return getattr(HostOps, name)(self, *args, **kwargs)
    return call


OPERATIONS = [name for name in vars(RecordingOps) if not name.startswith("_") and callable(getattr(HostOps, name, None))
              and name not in ("empty", "zeros", "bring", "to_host", "from_host", "stage")]
for operation in OPERATIONS:
    setattr(SpyingOps, operation, spy(operation))


class Nobody:
    """The collective of a rank alone."""

    part, narrow, starts, threads, bytes_sent = 0, False, True, False, 0

    def reduce_scatter(self, array, bounds, words=None):
        pass

    def all_gather(self, array, bounds):
        pass


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"layer_norm": True}, {"residual": True},
                                     {"activation": "gelu"}])
def test_what_is_recorded_is_what_a_real_step_does_and_allocates(options):
    spec, rows = NetworkSpec((9, 8, 8, 3), **options), 16
    ops, layout = SpyingOps(), spec.layout()
    params, grads = ops.zeros(layout.size, np.float32), ops.zeros(layout.size, np.float32)
    params[...] = 0.01
    network = Network(spec, ops, rows, params, grads)
    strategy = SlicedUpdate(Nobody(), cut(layout.size, spec.layer_starts(), 1 << 20, 1), 1, params, grads, ops)
    optimizer = make_optimizer("adam", ops, layout, strategy.ranges, np.float32)
    from hpcmlp.data.samples import Batch
    from hpcmlp.nn.losses import Loss
    step = Step(network, Loss("softmax_cross_entropy"), optimizer, strategy, ops, rows=rows)
    batch = Batch(rows, 0, rows, np.ones((rows, 9), np.float32), np.arange(rows), np.zeros(rows, np.int32), None)
    step.run(batch, 0, 1e-3)
    ops.calls.clear()
    step.run(batch, 1, 1e-3)
    recording = record(Workload(spec, global_batch_size=rows, optimizer="adam", sync="ring"))
    assert sum(recording.held.values()) == ops.allocated
    products = [name for name in ops.calls if name.startswith("linear")]
    assert len([e for e in recording.events if isinstance(e, Op) and e.product]) == len(products)
    assert [e.name for e in recording.events if isinstance(e, Op)][-1] == "adam" and ops.calls[-1] == "adam"


def test_buckets_are_started_while_backward_goes_on_and_waited_for_in_the_next_forward_pass(workload):
    w = workload((784, 1024, 1024, 10), ranks=2, per_node=1, sync="ring", bucket_mb=1.0)
    events = record(w).events
    starts = [k for k, e in enumerate(events) if isinstance(e, Transfer) and e.action == "start" and e.half == "reduce"]
    products = [k for k, e in enumerate(events) if isinstance(e, Op) and e.name == "input"]
    assert len(starts) > 2 and starts[0] < products[-1]
    first_forward = next(k for k, e in enumerate(events) if isinstance(e, Op) and e.name == "forward")
    waits = [k for k, e in enumerate(events) if isinstance(e, Transfer) and e.action == "wait" and e.half == "gather"]
    assert waits and waits[0] < first_forward < waits[-1]


def test_a_network_too_large_for_any_machine_costs_nothing_to_record(workload):
    recording = record(workload((784, 2**20, 2**20, 10), ranks=64, sync="shared", per_node=4, batch=2**20))
    assert recording.held["parameters"] > 4 * 2**40
