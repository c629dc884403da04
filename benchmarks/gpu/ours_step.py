"""Our planned step on a GPU for a case: made, checked against float64, and timed."""

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
from cases import CASES, Case, samples

from hpcmlp.data.order import Order
from hpcmlp.data.samples import Samples
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import NetworkSpec
from hpcmlp.nn.optimizers import HYPER
from hpcmlp.nn.planned import PlannedNetwork
from hpcmlp.ops.cublaslt import Product
from hpcmlp.ops.launches import Kernel, Multiply
from hpcmlp.sync.planned import DeviceSamples, PlannedSteps


class OurStep:
    """One case on one device."""

    def __init__(self, device: Any, case: Case, beside: tuple[int, ...] | None = None, **options: Any):
        self.device, self.case, self.number = device, case, 0
        spec = NetworkSpec(case.sizes)
        self.network = PlannedNetwork(spec, Loss(case.loss), device, case.batch, "adamw", HYPER["adamw"],
                                      precision=case.precision, **options)
        flat = initialize(spec, 0, "auto", np.float32)
        self.network.set_params(self.network.layout.pack(spec.layout().unpack(flat)))
        x, y = samples(case)
        shards = [case.rows]
        self.steps = PlannedSteps(self.network, DeviceSamples(device, Samples(x, y, None), [0]),
                                  Order(shards, case.batch, seed=1), lambda number: 1e-3, beside=beside)

    def run(self, count: int) -> None:
        """Queue `count` steps."""
        while count:
            now = min(count, self.steps.room(self.number))
            if not now:
                self.steps.results()
                continue
            self.steps.queue(self.number, now)
            self.number += now
            count -= now

    def params(self) -> np.ndarray:
        """Return the parameters, padded, on the host."""
        host = np.empty(self.network.layout.size, np.float32)
        self.device.download(self.network.params, host)
        return host

    def time_ms(self, count: int) -> float:
        """Return milliseconds a step over `count` of them, the laying out of tables included."""
        return 1e3 * self.device.seconds(lambda: self.run(count), 1) / count

    def products_ms(self) -> tuple[float, float, list[tuple[str, float]]]:
        """Return the time of the products as planned, of the same without epilogues, and of each launch alone."""
        planned = self.network.products()
        plain = []
        for launch in planned:
            p = launch.product
            plain.append(self.device.multiply(Product(p.m, p.n, p.k, p.a, p.b, p.d, p.lda, p.ldb, p.ldd, p.trans_a,
                                                      p.trans_b, compute=p.compute)))
        self.device.tune(plain, {})
        each = [(launch.name,
                 1e3 * self._time([replace(launch, side=False)] * 8) / 8)
                for launch in self.steps.launches if isinstance(launch, Multiply | Kernel)
                and launch.name != "finish_sums"]
        main = [Multiply(launch.product, launch.ways) for launch in planned]
        return 1e3 * self._time(main), 1e3 * self._time(plain), each

    def _time(self, launches: list[Any]) -> float:
        replay = self.device.capture(launches, 4)
        replay()
        return min(self.device.seconds(replay, 5) for _ in range(3)) / 4


def open_device() -> Any:
    """Return the GPU."""
    import cupy

    from hpcmlp.ops.gpu_device import GpuDevice
    return GpuDevice(cupy)


def first_step() -> None:
    """Take one step of the first case and say when it was done."""
    step = OurStep(open_device(), next(iter(CASES.values())))
    step.run(1)
    step.steps.results()
    print(json.dumps({"done": time.time()}), flush=True)


if __name__ == "__main__":
    first_step()
