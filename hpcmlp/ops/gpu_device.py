"""A GPU that runs launches: CuPy for memory, streams and graphs, cuBLASLt for the products, NVRTC for the kernels."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlp.ops.cublaslt import WORKSPACE_BYTES, Blas, Product
from hpcmlp.ops.launches import Await, Fork, Join, Kernel, Mark, Multiply

TUNING_RUNS = 12


class GpuDevice:
    """The current CUDA device. Work is queued on its main stream and, where launches say so, on a second one.

    Local.

    Attributes
    ----------
    xp : CuPy.
    has_nccl : whether CuPy has found NCCL.
    captures : False where the environment variable HPCMLP_GPU_GRAPHS is 0: launches are then queued one by one.
    """

    prefers_nccl = True

    def __init__(self, xp: Any):
        self.xp = xp
        properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
        self.name = properties["name"].decode()
        self.multiprocessors = int(properties["multiProcessorCount"])
        self.has_nccl = _has_nccl()
        self.stream = xp.cuda.Stream(non_blocking=True)
        self._side = xp.cuda.Stream(non_blocking=True)
        self._scratch = [xp.zeros(WORKSPACE_BYTES, np.uint8) for _ in range(2)]
        self.blas = Blas(self.address, [a.data.ptr for a in self._scratch])
        source = Path(__file__).with_name("gpu_kernels.cu").read_text(encoding="ascii")
        self._module = xp.RawModule(code=source, options=("--std=c++17",))
        self._functions: dict[str, Any] = {}
        self._events: list[Any] = []
        self._pinned: dict[int, Any] = {}
        self.captures = os.environ.get("HPCMLP_GPU_GRAPHS") != "0"
        xp.cuda.runtime.deviceSynchronize()

    def zeros(self, count: int, dtype: Any) -> Any:
        """Return an array of zeros on the device. Local."""
        with self.stream:
            return self.xp.zeros(count, dtype)

    def address(self, array: Any) -> int:
        """Return where an array begins. Local."""
        return int(array.data.ptr)

    def upload(self, host: np.ndarray, out: Any) -> None:
        """Copy a host array to the device; the host array may be changed when this returns. Local."""
        host = np.ascontiguousarray(host)
        self.xp.cuda.runtime.memcpyAsync(out.data.ptr, host.ctypes.data, host.nbytes, 1, self.stream.ptr)
        self.stream.synchronize()

    def download(self, array: Any, out: np.ndarray) -> None:
        """Copy an array of the device to the host, after all that was queued. Local."""
        assert out.flags.c_contiguous and out.nbytes == array.nbytes
        self.xp.cuda.runtime.memcpyAsync(out.ctypes.data, array.data.ptr, out.nbytes, 2, self.stream.ptr)
        self.stream.synchronize()

    def make_feed(self, arrays: list[tuple[int, Any]]) -> "Feed":
        """Return a way for batches to the device: (elements, dtype) of each array of a batch. Local."""
        return Feed(self, arrays)

    def multiply(self, product: Product, side: bool = False) -> Multiply | None:
        """Return the launch of a product, or None when the library has no algorithm for it. Local."""
        planned = self.blas.plan(product)
        return None if planned is None else Multiply(product, planned, side)

    def run(self, launches: list[Any]) -> None:
        """Queue the launches. Local."""
        used, marks = 0, {}
        for launch in launches:
            if isinstance(launch, Kernel):
                self._launch(launch)
            elif isinstance(launch, Multiply):
                stream = self._side if launch.side else self.stream
                launch.planned(stream.ptr, int(launch.side))
            elif isinstance(launch, Await):
                self.stream.wait_event(marks[launch.mark])
            elif isinstance(launch, Fork | Join | Mark):
                if used == len(self._events):
                    self._events.append(self.xp.cuda.Event(disable_timing=True))
                event = self._events[used]
                used += 1
                event.record(self.stream if isinstance(launch, Fork) else self._side)
                if isinstance(launch, Mark):
                    marks[launch] = event
                else:
                    (self._side if isinstance(launch, Fork) else self.stream).wait_event(event)
            else:
                launch()

    def capture(self, launches: list[Any], times: int = 1) -> Callable[[], None]:
        """Return a function that queues the launches `times` times: as one graph, unless that is switched off.

        Local. The launches must have been run before: modules are loaded then.
        """
        if not self.captures:
            return lambda: [self.run(launches) for _ in range(times)] and None
        self.stream.begin_capture()
        try:
            for _ in range(times):
                self.run(launches)
        finally:
            graph = self.stream.end_capture()
        graph.upload(self.stream)
        return lambda: graph.launch(self.stream)

    @property
    def free_bytes(self) -> int:
        """Bytes that the device can still give."""
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    def settle(self) -> None:
        """Wait for everything on the device, also for what CuPy has queued beside these launches. Local."""
        self.xp.cuda.runtime.deviceSynchronize()

    def synchronize(self) -> None:
        """Wait until all that was queued is done. Local."""
        self.stream.synchronize()

    def seconds(self, action: Callable[[], None], times: int) -> float:
        """Return the device's time of one of `times` calls, seconds. Local."""
        begin, end = self.xp.cuda.Event(), self.xp.cuda.Event()
        begin.record(self.stream)
        for _ in range(times):
            action()
        end.record(self.stream)
        end.synchronize()
        return 1e-3 * float(self.xp.cuda.get_elapsed_time(begin, end)) / times

    def tune(self, launches: list[Any], known: dict[str, str]) -> dict[str, str]:
        """Choose for every product the algorithm that is fastest on its own buffers, and return the choices.

        Local. `known` choices are taken over where the library still has them: sums keep their order then, and bits
        their values. What the products write is what they would write in a step; nothing else is touched.
        """
        chosen = dict(known)
        for launch in launches:
            planned, key = launch.planned, launch.product.key()
            names = [bytes(algorithm).hex() for algorithm in planned.algorithms]
            if chosen.get(key) not in names:
                chosen[key] = names[self._fastest(planned)]
            planned.choice = names.index(chosen[key])
        return chosen

    def _fastest(self, planned: Any) -> int:
        """The place of the fastest algorithm; one that fails counts as slow."""
        times = []
        for k in range(len(planned.algorithms)):
            planned.choice = k
            try:
                planned(self.stream.ptr, 0)
                replay = self.capture([lambda: planned(self.stream.ptr, 0)], TUNING_RUNS)
                replay()
                times.append(min(self.seconds(replay, 1) for _ in range(3)))
            except RuntimeError:
                times.append(float("inf"))
        return int(np.argmin(times))

    def _launch(self, kernel: Kernel) -> None:
        function = self._functions.get(kernel.name)
        if function is None:
            function = self._functions[kernel.name] = self._module.get_function(kernel.name)
        arguments = tuple(np.uint64(0) if a is None else a for a in kernel.arguments)
        function((kernel.grid,), (kernel.block,), arguments, stream=self._side if kernel.side else self.stream)


def _has_nccl() -> bool:
    """Whether CuPy finds NCCL: an attribute of cupy.cuda only once it is imported."""
    try:
        return bool(importlib.import_module("cupy.cuda.nccl").available)
    except (ImportError, AttributeError, OSError):
        return False


class Feed:
    """Two places for a batch, pinned on the host and on the device: one is filled while the other is in use.

    Local. In this order: `wait(place)`, fill `host[place]`, `send(place)`, queue what reads `device[place]`,
    `used(place)`. Copies run on a stream of their own, beside the steps.
    """

    def __init__(self, device: GpuDevice, arrays: list[tuple[int, Any]]):
        xp = device.xp
        pinned = importlib.import_module("cupyx").empty_pinned
        self.host = [[pinned(count, dtype) for count, dtype in arrays] for _ in range(2)]
        self.device = [[device.zeros(count, dtype) for count, dtype in arrays] for _ in range(2)]
        self._runtime, self._main, self._copies = xp.cuda.runtime, device.stream, xp.cuda.Stream(non_blocking=True)
        self._sent, self._used = ([xp.cuda.Event(disable_timing=True) for _ in range(2)] for _ in range(2))

    def wait(self, place: int) -> None:
        """Wait until the host's arrays of this place have been copied. Local."""
        self._sent[place].synchronize()

    def send(self, place: int) -> None:
        """Copy the place to the device as soon as its last use is over, and let the main stream wait for it. Local."""
        self._copies.wait_event(self._used[place])
        for host, array in zip(self.host[place], self.device[place], strict=True):
            self._runtime.memcpyAsync(array.data.ptr, host.ctypes.data, host.nbytes, 1, self._copies.ptr)
        self._sent[place].record(self._copies)
        self._main.wait_event(self._sent[place])

    def used(self, place: int) -> None:
        """Note that what was queued so far is the last to read this place. Local."""
        self._used[place].record(self._main)
