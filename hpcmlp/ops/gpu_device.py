"""A GPU that runs launches: CuPy for memory, streams and graphs, cuBLASLt for the products, NVRTC for the kernels."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlp.ops.candidates import MAKERS, choose, offer
from hpcmlp.ops.cublaslt import WORKSPACE_BYTES, Blas, Product
from hpcmlp.ops.launches import Await, Fork, Join, Kernel, Mark, Multiply
from hpcmlp.ops.small_products import SmallProduct, launch_of, ways_to_cut

TUNING_RUNS = 12


class GpuDevice:
    """The current CUDA device. Work is queued on its main stream and, where launches say so, on a second one.

    Local.

    Attributes
    ----------
    xp : CuPy.
    has_nccl : whether CuPy has found NCCL.
    makers : whose ways to compute a product are taken where they have one: all, or one maker's to check and time it.
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
        self.makers = MAKERS
        self._modules: dict[str, Any] = {}
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
        """Return the launch of a product, or None when there is no way to compute it. Local."""
        own = [(way.name, way) for way in ways_to_cut(product, self.address)]
        ways = offer(self.blas.plan(product), own, self.makers)
        return Multiply(product, ways, side) if ways.names else None

    def run(self, launches: list[Any]) -> None:
        """Queue the launches. Local."""
        used, marks = 0, {}
        for launch in launches:
            if isinstance(launch, Kernel):
                self._launch(launch)
            elif isinstance(launch, Multiply):
                self._multiply(launch.ways.chosen, launch.side)
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
        """Choose for every product the way that is fastest on its own buffers: `ops.candidates.choose`. Local.

        What the products write is what they would write in a step; nothing else is touched.
        """
        return choose(launches, known, self._seconds_of)

    def _seconds_of(self, launch: Multiply, place: int) -> float:
        """The time of one way to compute a product; of one that fails, infinite."""
        way = launch.ways.ways[place]
        try:
            self._multiply(way, False)
            replay = self.capture([lambda: self._multiply(way, False)], TUNING_RUNS)
            replay()
            return min(self.seconds(replay, 1) for _ in range(3))
        except Exception:   # the library's errors, and the compiler's where it meets our source for the first time
            return float("inf")

    def _multiply(self, way: Any, side: bool) -> None:
        if isinstance(way, SmallProduct):
            self._launch(launch_of(way, side=side))
        else:
            way((self._side if side else self.stream).ptr, int(side))

    def _launch(self, kernel: Kernel) -> None:
        function = self._functions.get(kernel.name)
        if function is None:
            function = self._functions[kernel.name] = self._module(kernel.source).get_function(kernel.name)
        arguments = tuple(np.uint64(0) if a is None else a for a in kernel.arguments)
        function((kernel.grid,), (kernel.block,), arguments, stream=self._side if kernel.side else self.stream)

    def _module(self, source: str) -> Any:
        """A file of kernels, compiled where it is wanted for the first time."""
        if source not in self._modules:
            code = Path(__file__).with_name(source).read_text(encoding="ascii")
            self._modules[source] = self.xp.RawModule(code=code, options=("--std=c++17",))
        return self._modules[source]


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
