"""Planned steps on the emulated device beside float64 on the host, in every precision; padding; skipped updates."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcmlp.errors import Unavailable
from hpcmlp.nn.layout import Layout, PaddedLayout
from hpcmlp.nn.network import NetworkSpec
from hpcmlp.nn.planned_forward import Predictor
from hpcmlp.ops.emulated import EmulatedDevice

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "check_steps.py"


def load_program():
    """The table and the oracle are those of the program that checks a real GPU."""
    spec = importlib.util.spec_from_file_location("check_steps", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("check_steps", module)
    spec.loader.exec_module(module)
    return module


check = load_program()


@pytest.mark.parametrize("precision", check.BOUNDS)
@pytest.mark.parametrize("line", check.TABLE, ids=lambda line: f"{line[0]}-{line[2]}-{'-'.join(line[1]) or 'relu'}")
def test_steps_are_those_of_float64(device, line, precision):
    problem = check.Problem(line)
    wanted, losses = check.run_float64(problem, 18)     # one epoch has 14 steps, the last of them short
    got, records, network = check.run_on(device, problem, precision, 18)
    assert check.deviation(got, wanted) < check.BOUNDS[precision]
    assert check.padding(network) == 0.0
    assert [int(r["rows"]) for r in records] == [rows for _, _, rows in losses]
    assert np.allclose(records["weight"], [weight for _, weight, _ in losses], rtol=1e-5)
    assert np.allclose(records["loss"], [loss for loss, _, _ in losses],
                       rtol={"float32": 1e-5, "tf32": 1e-2, "bf16": 2e-2}[precision])


@pytest.mark.parametrize("fused", (True, False))
def test_a_hundred_steps_are_those_of_the_host(device, fused):
    problem = check.Problem(check.TABLE[0])
    wanted, _ = check.run_float64(problem, 100, dtype=np.float32)
    problem.options["fused"] = fused
    got, records, network = check.run_on(device, problem, "float32", 100)
    assert check.deviation(got, wanted) < 1e-5
    assert check.padding(network) == 0.0
    assert records["skipped"].sum() == 0


@pytest.mark.parametrize("epilogue", ("relu_aux_bias", "relu_bias", "drelu", "bgradb"))
def test_what_the_library_refuses_a_kernel_does(epilogue):
    try:
        device = EmulatedDevice(refuse=lambda product: product.epilogue in (epilogue, "relu_aux_bias"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    problem = check.Problem(check.TABLE[0])
    wanted, _ = check.run_float64(problem, 5)
    got, _, _ = check.run_on(device, problem, "float32", 5)
    assert check.deviation(got, wanted) < 1e-5


def own_is_faster(product, name):
    """A stand-in for timing."""
    return float(not name.startswith("own"))


def test_a_hundred_steps_with_products_of_our_own_are_those_of_the_host():
    problem, taken = check.Problem(check.TABLE[0]), {}
    wanted, _ = check.run_float64(problem, 100, dtype=np.float32)
    got, records, network = check.run_on(EmulatedDevice(seconds_of=own_is_faster), problem, "float32", 100,
                                         algorithms=taken)
    assert {name[:3] for names in taken.values() for name in names.split(" & ")} == {"own"} and len(taken) == 6
    assert check.deviation(got, wanted) < 1e-5
    assert check.padding(network) == 0.0
    assert records["skipped"].sum() == 0
    again, _, _ = check.run_on(EmulatedDevice(seconds_of=own_is_faster), problem, "float32", 100)
    assert np.array_equal(got, again)


@pytest.mark.parametrize("line", check.TABLE, ids=lambda line: f"{line[0]}-{line[2]}-{'-'.join(line[1]) or 'relu'}")
def test_steps_with_products_of_our_own_alone_are_those_of_float64(line):
    problem = check.Problem(line)
    wanted, _ = check.run_float64(problem, 18)
    got, _, network = check.run_on(EmulatedDevice(makers=("own",)), problem, "float32", 18)
    assert {maker for launch in network.products() for maker in launch.ways.makers} == {"own"}
    assert check.deviation(got, wanted) < check.BOUNDS["float32"]
    assert check.padding(network) == 0.0


def test_products_of_our_own_that_are_slower_change_no_bit():
    problem = check.Problem(check.TABLE[2])
    wanted, _, _ = check.run_on(EmulatedDevice(makers=("library",)), problem, "float32", 18)
    slower = EmulatedDevice(seconds_of=lambda _, name: float(name.startswith("own")))
    got, _, _ = check.run_on(slower, problem, "float32", 18)
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("tile", ("8x8", "16x16", "32x16", "32x32"))
def test_a_choice_that_is_known_is_repeated_whatever_is_faster_now(tile):
    problem, taken = check.Problem(check.TABLE[0]), {}
    device = EmulatedDevice(seconds_of=lambda _, name: float(tile not in name))
    check.run_on(device, problem, "float32", 4, algorithms=taken)
    assert tile in str(taken)
    wanted, _, _ = check.run_on(EmulatedDevice(makers=("library",)), problem, "float32", 18)
    known = [check.run_on(EmulatedDevice(seconds_of=seconds_of), problem, "float32", 18, algorithms=dict(taken))[0]
             for seconds_of in (own_is_faster, lambda *_: 0.0)]
    assert np.array_equal(*known) and not np.array_equal(known[0], wanted)


def test_products_that_share_a_mask_are_of_one_maker():
    """Ours is the faster reader here, but by less than it is the slower writer; the other way round it is taken."""
    problem = check.Problem(check.TABLE[0])
    wanted, _ = check.run_float64(problem, 8)
    for writer, maker in ((3.5, "library"), (2.5, "own")):
        def seconds_of(product, name, writer=writer):
            return 2.0 if name == "library" else writer if product.epilogue == "relu_aux_bias" else 1.0

        taken = {}
        got, _, network = check.run_on(EmulatedDevice(seconds_of=seconds_of), problem, "float32", 8, algorithms=taken)
        assert check.deviation(got, wanted) < 1e-5
        pairs = [names.split(" & ") for names in taken.values() if " & " in names]
        assert len(pairs) == 2 and all(name.startswith(maker) for pair in pairs for name in pair)
        assert all(names.startswith("own") for names in taken.values() if " & " not in names)


@pytest.mark.parametrize("late", (False, True))
def test_two_products_in_a_launch_change_no_bit(device, late):
    class Merging(Timed):
        """Says that the arrangement that came last, several products in a launch, was fastest."""

        def capture(self, launches, times=1):
            self.names = [getattr(launch, "name", "") for launch in launches]
            self.merged = getattr(self, "merged", 0) + self.names.count("small_products")
            return super().capture(launches, times)

    problem = check.Problem(check.TABLE[1])
    wanted, records, _ = check.run_on(EmulatedDevice(makers=("own",), late=late), problem, "float32", 18)
    device = Merging(makers=("own",), late=late)
    got, same, _ = check.run_on(device, problem, "float32", 18)
    assert np.array_equal(got, wanted) and same.tobytes() == records.tobytes()
    assert device.merged


def test_the_order_of_steps_in_calls_changes_no_bit(device):
    problem = check.Problem(check.TABLE[2])
    first, _, _ = check.run_on(device, problem, "float32", 8)
    again, _, _ = check.run_on(device, problem, "float32", 8)
    one_stream, _, _ = check.run_on(device, problem, "float32", 8, concurrent=False)
    assert np.array_equal(first, again) and np.array_equal(first, one_stream)


class Timed(EmulatedDevice):
    """Takes the time that is asked for, and says that what came last was fastest."""

    def seconds(self, action, times):
        action()
        self.last = getattr(self, "last", 1.0) / 2
        return self.last


@pytest.mark.parametrize("precision", ("float32", "bf16"))
@pytest.mark.parametrize("line", (0, 1, 3, 5), ids=lambda k: f"{check.TABLE[k][0]}-{check.TABLE[k][2]}")
@pytest.mark.parametrize("concurrent", (True, False))
def test_updates_beside_the_next_step_change_no_bit(device, line, precision, concurrent):
    problem = check.Problem(check.TABLE[line])
    problem.options |= {"clip_norm": 0.5, "average": 0.9}
    problem.x[500, 3] = np.inf     # one step of an epoch is skipped
    wanted, records, plain = check.run_on(device, problem, precision, 25, beside=(), concurrent=concurrent)
    assert records["skipped"].any() and not records["skipped"].all()
    for late in (False, True):
        got, same, network = check.run_on(EmulatedDevice(late=late), problem, precision, 25, beside=(1, 3),
                                          concurrent=concurrent)
        assert np.array_equal(got, wanted) and same.tobytes() == records.tobytes()
        assert np.array_equal(network.averaged, plain.averaged)
        assert all(np.array_equal(network.state[name], plain.state[name]) for name in plain.state)


def test_a_wait_that_is_missing_shows_on_a_late_device(monkeypatch):
    problem = check.Problem(check.TABLE[0])
    device = EmulatedDevice(late=True)
    wanted, _, _ = check.run_on(device, problem, "float32", 12, beside=(1, 3))
    monkeypatch.setattr("hpcmlp.nn.planned.Await", lambda mark: lambda: None)
    with pytest.raises(AssertionError):
        got, _, _ = check.run_on(device, problem, "float32", 12, beside=(1, 3), concurrent=False)
        assert np.array_equal(got, wanted)


def test_trying_ways_to_share_the_device_leaves_no_trace(device, monkeypatch):
    monkeypatch.setattr("hpcmlp.sync.planned.BESIDE_ELEMENTS", 0)
    problem = check.Problem(check.TABLE[0])
    problem.options["average"] = 0.9
    wanted, records, plain = check.run_on(device, problem, "bf16", 25, beside=())
    got, same, network = check.run_on(Timed(), problem, "bf16", 25)
    assert np.array_equal(got, wanted) and same.tobytes() == records.tobytes()
    assert np.array_equal(network.averaged, plain.averaged)


def test_a_step_with_a_number_that_is_not_finite_changes_nothing(device):
    problem = check.Problem(check.TABLE[2])
    problem.x[5, 3] = np.inf
    wanted = problem.flat.astype(np.float64)
    problem_steps = next(k for k in range(14) if _holds_row(k, 5))
    before, _, _ = check.run_on(device, problem, "float32", problem_steps)
    after, records, network = check.run_on(device, problem, "float32", problem_steps + 1)
    assert records["skipped"].tolist() == [0] * problem_steps + [1]
    assert np.array_equal(before, after)
    assert problem_steps == 0 or not np.array_equal(after, wanted)
    assert np.isfinite(after).all()


def _holds_row(step, row):
    order = check.Order(check.SHARDS, 64, seed=3)
    start, stop = order.parts(step, step + 1, 0, 1)
    return row in order.sequence(0, 0).rows(np.arange(start[0, 0], stop[0, 0]))


def test_padded_layout_holds_the_logical_tensors():
    spec = NetworkSpec((28, 40, 33, 10))
    plain, padded = spec.layout(), spec.layout(PaddedLayout)
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape).astype(np.float32)
               for name, shape in zip(plain.names, plain.shapes, strict=True)}
    flat = padded.pack(tensors)
    assert padded.num_params == plain.num_params
    assert all(np.array_equal(view, tensors[name]) for name, view in padded.unpack(flat).items())
    assert padded.sha256(flat) == plain.sha256(plain.pack(tensors))
    assert np.count_nonzero(flat) == sum(np.count_nonzero(t) for t in tensors.values())
    assert all(start % PaddedLayout.SLOT == 0 for start in padded.starts)
    assert padded.slot(flat, "layers.0.weight").size == 48 * 32
    assert isinstance(padded, Layout)


ACTIVATIONS = ("relu", "gelu", "tanh", "identity", "leaky_relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", (1, 17, 40))
def test_predictions_are_those_of_the_host(device, activation, rows):
    spec = NetworkSpec((28, 40, 33, 10), activation, dropout=0.3)
    flat = check.initialize(spec, 3, "auto", np.float32)
    host = check.Network(spec, check.PlainOps(np), 40, flat.astype(np.float64), dtype=np.float64)
    predictor = Predictor(spec, device, 40)
    predictor.set_params(predictor.layout.pack(spec.layout().views(flat)))
    x = np.random.default_rng(0).standard_normal((40, 28), dtype=np.float32)
    predictor.forward(x)        # what a fuller batch leaves behind is nobody's
    x[0, 3] = np.nan
    got, wanted = predictor.forward(x[:rows]), host.forward(x[:rows].astype(np.float64))
    assert got.shape == (rows, 10) and got.dtype == np.float32
    assert np.isnan(got[0]).all() and np.isnan(wanted[0]).all()     # the library's own relu would hide it
    assert np.allclose(got[1:], wanted[1:], rtol=1e-5, atol=1e-5)
    assert not predictor.x[-1].reshape(40, 16)[1:, 10:].any()       # padding


def test_predictions_do_not_touch_the_steps(device):
    problem = check.Problem(check.TABLE[1])
    wanted, records, _ = check.run_on(device, problem, "bf16", 6)
    Predictor(problem.spec, device, 8).forward(problem.x[:8])
    got, same, _ = check.run_on(device, problem, "bf16", 6)
    assert np.array_equal(got, wanted) and same.tobytes() == records.tobytes()
