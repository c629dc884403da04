"""What a device computes, beside float64 on the host: whole runs of steps, and what its library can fuse."""

import importlib.metadata
import time
from typing import Any

import numpy as np

from hpcmlp.data.order import Order
from hpcmlp.data.samples import Samples
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.nn.optimizers import HYPER, make_optimizer
from hpcmlp.nn.planned import PlannedNetwork
from hpcmlp.ops.candidates import MAKERS
from hpcmlp.ops.cublaslt import Product
from hpcmlp.ops.plain import PlainOps
from hpcmlp.sync.planned import DeviceSamples, PlannedSteps

SHARDS = (300, 100, 470)
# kind of loss, options of the spec, rule, its options, further options
TABLE: list[tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = [
    ("softmax_cross_entropy", {}, "adamw", {}, {}),
    ("softmax_cross_entropy", {}, "adamw", {}, {"fused": False}),
    ("softmax_cross_entropy", {"dropout": 0.3}, "adam", {}, {"fused": False}),
    ("softmax_cross_entropy", {"dropout": 0.3}, "adam", {"weight_decay": 0.01}, {"clip_norm": 0.5}),
    ("softmax_cross_entropy", {"activation": "gelu"}, "adamw", {}, {"average": 0.9}),
    ("softmax_cross_entropy", {"activation": "silu", "dropout": 0.2}, "sgd", {"momentum": 0.9, "nesterov": True}, {}),
    ("binary_cross_entropy", {}, "adamw", {}, {}),
    ("mean_squared", {"activation": "tanh"}, "rmsprop", {"momentum": 0.5}, {}),
    ("mean_absolute", {"activation": "leaky_relu"}, "adagrad", {"lr_decay": 0.01}, {}),
    ("huber", {"activation": "elu"}, "sgd", {}, {}),
    ("huber", {"activation": "selu"}, "adamw", {}, {}),
    ("quantile", {"activation": "softplus"}, "adamw", {}, {}),
    ("quantile", {"activation": "sigmoid"}, "adamw", {}, {}),
    ("mean_squared", {"activation": "identity"}, "adamw", {}, {}),
]
BOUNDS = {"float32": 2e-5, "tf32": 3e-2, "bf16": 6e-2}


class Problem:
    """Made-up samples in three shards, and the network, loss and rule of one line of the table."""

    def __init__(self, line: tuple, sizes: tuple[int, ...] = (28, 40, 33, 10), weighted: bool = True, seed: int = 0):
        self.kind, spec, self.rule, hyper, options = line
        self.options = dict(options)    # tests add to them
        random = np.random.default_rng(seed)
        n, d, k = sum(SHARDS), sizes[0], sizes[-1]
        self.x = random.standard_normal((n, d), dtype=np.float32)
        of_loss: dict[str, Any] = {}
        if self.kind == "softmax_cross_entropy":
            self.y = random.integers(0, k, n).astype(np.int32)
            of_loss = {"label_smoothing": 0.1, "class_weights": tuple(0.5 + random.random(k))}
        elif self.kind == "quantile":
            sizes, of_loss = (*sizes[:-1], 6), {"quantiles": (0.1, 0.5, 0.9)}
            self.y = random.standard_normal((n, 2), dtype=np.float32)
        else:
            self.y = random.standard_normal((n, k), dtype=np.float32)
            if self.kind == "binary_cross_entropy":
                self.y = (self.y > 0).astype(np.float32)
        self.weight = random.random(n, dtype=np.float32) + 0.5 if weighted else None
        self.loss = Loss(self.kind, **of_loss)
        self.spec = NetworkSpec(sizes, **spec)
        self.hyper = HYPER[self.rule] | hyper
        self.flat = initialize(self.spec, 1, "auto", np.float32)

    @staticmethod
    def rate(number: int) -> float:
        """Return the learning rate of a step."""
        return 1e-3 / (1.0 + 0.01 * number)


def run_on(device: Any, problem: Problem, precision: str, steps: int, batch: int = 64,
           beside: tuple[int, ...] | None = None, algorithms: dict[str, str] | None = None,
           **options: Any) -> tuple[np.ndarray, np.ndarray, PlannedNetwork]:
    """Return the parameters in the host's layout (float64), the result records and the network after `steps` steps.

    algorithms : choices that are taken over; those made in the run are added.
    """
    algorithms = {} if algorithms is None else algorithms
    p = problem
    network = PlannedNetwork(p.spec, p.loss, device, batch, p.rule, p.hyper, precision=precision, seed=5,
                             target_width=0 if p.y.ndim == 1 else p.y.shape[1], **p.options, **options)
    network.set_params(network.layout.pack(p.spec.layout().unpack(p.flat)))
    shift, scale = 0.1 * np.arange(p.x.shape[1]), 1.0 + 0.01 * np.arange(p.x.shape[1])
    samples = DeviceSamples(device, Samples(p.x, p.y, p.weight), [0, 1, 2], shift, scale)
    run = PlannedSteps(network, samples, Order(SHARDS, batch, seed=3), p.rate, beside=beside)
    run.algorithms = dict(algorithms)
    number, records = 0, []
    while number < steps:
        now = min(run.room(number), steps - number)
        if now:
            run.queue(number, now)
            number += now
        else:
            records.append(run.results())
    records.append(run.results())
    host = np.empty(network.layout.size, np.float32)
    device.download(network.params, host)
    algorithms.update(run.algorithms)
    return p.spec.layout().pack(network.layout.unpack(host), np.float64), np.concatenate(records), network


def run_float64(problem: Problem, steps: int, batch: int = 64,
                dtype: type = np.float64) -> tuple[np.ndarray, list[tuple[float, float, int]]]:
    """Return the parameters after the same steps by plain arrays of `dtype` on the host, and (loss, weight, rows)."""
    p, ops, order, records = problem, PlainOps(np), Order(SHARDS, batch, seed=3), []
    network = Network(p.spec, ops, batch, p.flat.astype(dtype), dtype=dtype)
    optimizer = make_optimizer(p.rule, ops, network.layout, [(0, network.layout.size)], dtype, **p.hyper)
    bases, d = np.cumsum((0, *SHARDS)), p.x.shape[1]
    shift, scale = (0.1 * np.arange(d)).astype(np.float32), (1.0 + 0.01 * np.arange(d)).astype(np.float32)
    for number in range(steps):
        epoch, t = divmod(number, order.steps_per_epoch)
        start, stop = order.parts(t, t + 1, 0, 1)
        rows = np.concatenate([order.sequence(epoch, k).rows(np.arange(start[0, k], stop[0, k])) + bases[k]
                               for k in range(len(SHARDS))])
        x = ((p.x[rows] - shift) * scale).astype(dtype)
        logits = network.forward(x, training=True, seed=5, step=number)
        dlogits = np.empty_like(logits)
        targets = p.y[rows] if p.y.ndim == 1 else p.y[rows].astype(dtype)
        loss, weight = p.loss(ops, logits, targets, p.weight[rows].astype(dtype), dlogits)
        network.backward(dlogits)
        factor, clip = 1.0 / weight, p.options.get("clip_norm")
        norm = float(np.sqrt((network.grads.astype(np.float64) ** 2).sum())) * factor
        if clip is not None and norm > clip:
            factor *= clip / norm
        optimizer.update(network.params, network.grads, p.rate(number), number + 1, factor)
        records.append((loss, weight, len(rows)))
    return network.params.astype(np.float64), records


def padding(network: PlannedNetwork) -> float:
    """Return the largest absolute value in the padding of the parameters."""
    host = np.empty(network.layout.size, np.float32)
    network.device.download(network.params, host)
    for view in network.layout.views(host).values():
        view[...] = 0
    return float(np.abs(host).max())


def deviation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the norm of the difference over that of b."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check_all(device: Any, failures: list[str], steps: int = 40) -> None:
    """Print and judge every line of the table in every precision, in float32 also by one maker's products alone."""
    kinds = {precision: (precision, MAKERS) for precision in BOUNDS} \
        | {f"float32, {maker} products": ("float32", (maker,)) for maker in MAKERS}
    for line in TABLE:
        problem = Problem(line)
        wanted, losses = run_float64(problem, steps)
        for kind, (precision, makers) in kinds.items():
            name, bound = f"{line[0]} {line[1]} {line[2]} {kind}", BOUNDS[precision]
            device.makers = makers
            try:
                got, records, network = run_on(device, problem, precision, steps)
                off = deviation(got, wanted)
                loss = max(abs(r["loss"] - w[0]) / abs(w[0]) for r, w in zip(records, losses, strict=True))
                good = off < bound and padding(network) == 0.0
                print(f"  {'ok ' if good else 'BAD'} {name}: parameters {off:.1e}, loss {loss:.1e} {network.notes}")
                if not good:
                    failures.append(name)
            except Exception as error:
                failures.append(name)
                print(f"  BAD {name}: {type(error).__name__}: {error}")
            finally:
                device.makers = MAKERS


def versions(device: Any) -> None:
    """Print what is there."""
    runtime = device.xp.cuda.runtime
    print(f"  {device.name}, {device.multiprocessors} multiprocessors, driver {runtime.driverGetVersion()}, runtime "
          f"{runtime.runtimeGetVersion()}, cuBLASLt {device.blas.version}")
    for name in ("cupy-cuda13x", "cupy-cuda12x", "numpy", "torch", "nvidia-nccl-cu13", "mpi4py", "h5py"):
        try:
            print(f"  {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass


def probe(device: Any) -> None:
    """Print how many algorithms the library has per types, epilogue and width, and the time of the best of them."""
    rows = 1024
    a, b, d = (device.zeros(4096 * 4096, np.float32) for _ in range(3))
    vector, mask = device.zeros(4096, np.float32), device.zeros(4096 * 4096 // 8, np.uint8)
    half = [device.zeros(4096 * 4096, np.uint16) for _ in range(3)]
    half_vector = device.zeros(4096, np.uint16)
    kinds = {"bf16>bf16": (half[0], half[1], half[2], half_vector, "float32"),
             "bf16>f32": (half[0], half[1], d, vector, "float32"), "f32": (a, b, d, vector, "float32"),
             "tf32": (a, b, d, vector, "tf32")}
    for kind, (x, y, z, bias, compute) in kinds.items():
        for epilogue in ("none", "bias", "relu_bias", "relu_aux_bias", "drelu", "bgradb"):
            line = []
            for width in (4096, 304, 300, 16):
                transposed = dict(trans_b=True) if epilogue == "bgradb" else dict(trans_a=epilogue != "drelu")
                shape = dict(m=width, n=width, k=rows) if epilogue == "bgradb" else dict(m=width, n=rows, k=width)
                aux = epilogue in ("relu_aux_bias", "drelu")
                p = Product(**shape, a=x, b=y, d=z, lda=width, ldb=width, ldd=width, epilogue=epilogue,
                            bias=bias if "b" in epilogue and epilogue != "drelu" else None, compute=compute,
                            aux=mask if aux else None, aux_ld=-(-width // 128) * 128 if aux else 0, **transposed)
                try:
                    launch = device.multiply(p)
                    line.append(f"{width}: {len(launch.ways.of('library')) if launch else 0}")
                except RuntimeError as error:
                    line.append(f"{width}: {error}")
            print(f"  {kind:10s} {epilogue:14s} {'  '.join(line)}")


def main() -> None:
    """Check the steps on the emulated device."""
    from hpcmlp.ops.emulated import EmulatedDevice
    failures: list[str] = []
    begin = time.time()
    check_all(EmulatedDevice(), failures)
    print(failures, f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
