"""The forward pass of a network as a list of launches over buffers that are made once.

Weights are row-major (out, in), activations (rows, width): seen column-major, as the library does, a weight is
(in, out) and an activation (width, rows). Every width is padded to 16; padding stays zero. `Predictor` is what
evaluates and predicts; training adds the rest of a step (`nn.planned`).
"""

from dataclasses import replace
from typing import Any

import numpy as np

from hpcmlp.nn.layout import PaddedLayout, pad
from hpcmlp.ops import activations, counter
from hpcmlp.ops.cublaslt import Product
from hpcmlp.ops.launches import CONTROL, Kernel, Multiply

PRECISIONS = ("float32", "tf32", "bf16")
THREADS = 256


class PlannedForward:
    """Parameters, activations and forward products of a network on one device.

    Local.

    Parameters
    ----------
    spec : `nn.network.NetworkSpec` without layer norm and residual sums.
    device : `ops.gpu_device.GpuDevice`, or the emulated one.
    capacity : the most rows of a batch.
    precision : one of `PRECISIONS`.
    params : flat vector of the device of `layout`, zero; None: made here. layout : of `spec`; None: made here.
    seed : of dropout.

    Attributes
    ----------
    layout : PaddedLayout of all flat vectors.
    params : flat float32 vector on the device; copy : in bf16, or None.
    x : input of every layer, and the logits, as flat vectors of (capacity, padded width).
    """

    def __init__(self, spec: Any, device: Any, capacity: int, *, precision: str = "float32", params: Any = None,
                 layout: PaddedLayout | None = None, seed: int = 0):
        assert not spec.layer_norm and not spec.residual and precision in PRECISIONS
        self.spec, self.device, self.capacity = spec, device, max(1, capacity)
        self.precision, self.seed = precision, seed
        self.layout, self.dtype = layout or spec.layout(PaddedLayout), np.dtype(np.float32)
        self.widths = [pad(n, PaddedLayout.WIDTH) for n in spec.sizes]
        self.narrow = precision == "bf16"
        self._compute = "tf32" if precision == "tf32" else "float32"
        self._suffix = "bf16" if self.narrow else "f32"
        self._storage = np.dtype(np.uint16 if self.narrow else np.float32)
        zeros, size = device.zeros, self.layout.size
        self.params = zeros(size, np.float32) if params is None else params
        self.copy = zeros(size, np.uint16) if self.narrow else None
        self.x = [zeros(self.capacity * w, self._storage) for w in self.widths]
        self.pre: list[Any] = [None] * len(self.widths)
        self.control = device.zeros(CONTROL.itemsize, np.uint8)

    def _weight(self, layer: int) -> Any:
        return self.layout.slot(self.copy if self.narrow else self.params, f"layers.{layer}.weight")

    def _bias(self, layer: int) -> Any:
        return self.layout.slot(self.copy if self.narrow else self.params, f"layers.{layer}.bias")

    def _plan_forward_products(self) -> None:
        self._forward_products = [self._plan_forward(layer) for layer in range(self.spec.num_layers)]

    def _forward_terms(self, layer: int) -> dict[str, Any]:
        """What all forms of the forward product of a layer have in common."""
        w_in, w_out = self.widths[layer], self.widths[layer + 1]
        return dict(m=w_out, n=self.capacity, k=w_in, a=self._weight(layer), b=self.x[layer], lda=w_in, ldb=w_in,
                    ldd=w_out, trans_a=True, bias=self._bias(layer), compute=self._compute)

    def _plan_forward(self, layer: int) -> Multiply:
        """x[layer] w^T + b, into x[layer + 1] or, where an activation follows, in front of it."""
        out = self.x[layer + 1]
        if layer < self.spec.num_layers - 1:
            out = self.pre[layer + 1] = self.device.zeros(self.capacity * self.widths[layer + 1], self._storage)
        return self._must(Product(d=out, epilogue="bias", **self._forward_terms(layer)))

    def _must(self, product: Product, side: bool = False) -> Multiply:
        launch = self.device.multiply(product, side)
        if launch is None:
            raise RuntimeError(f"the library has no algorithm for the product {product.key()}")
        return launch

    def forward_launches(self, steps: Any) -> list[Any]:
        """Return the launches from the gathered batch to the logits. Local.

        steps : the table of steps on the device (`ops.launches.STEP` records); None without dropout.
        """
        launches: list[Any] = []
        for layer, product in enumerate(self._forward_products):
            launches.append(product)
            if layer < self.spec.num_layers - 1:
                launches += self._activate(layer, steps)
        return launches

    def _dropout(self, layer: int) -> tuple[Any, ...]:
        """The kernels' words about dropout behind hidden `layer`."""
        rate = self.spec.dropout
        return (np.uint64(counter.mix64(self.seed)), np.uint64(layer),
                np.uint32(counter.threshold(rate) if rate else 0), np.float32(1.0 / (1.0 - rate)))

    def _activate(self, layer: int, steps: Any) -> list[Kernel]:
        """What the forward product of hidden `layer` leaves to do."""
        at, pre, kind = layer + 1, self.pre[layer + 1], self.spec.activation
        if pre is None:
            if not self.spec.dropout:
                return []
            pre, kind = self.x[at], "identity"
        grid = max(1, min(16 * self.device.multiprocessors, -(-self.capacity * self.widths[at] // THREADS)))
        return [Kernel(f"activate_{self._suffix}", grid, THREADS, (*self._about(at, steps, kind), pre, self.x[at]))]

    def _about(self, at: int, steps: Any, kind: str) -> tuple[Any, ...]:
        """What the activation kernels are told about x[at] or d[at]."""
        return (self.control, steps, np.int32(_ACTIVATION[kind]), *self._dropout(at - 1), np.int32(self.capacity),
                np.int32(self.spec.sizes[at]), np.int32(self.widths[at]))

    def narrow_params(self) -> list[Kernel]:
        """Return the launch that rounds the parameters into their bf16 copy: after they came from outside. Local."""
        if self.copy is None:
            return []
        grid = max(1, min(16 * self.device.multiprocessors, -(-self.layout.size // THREADS)))
        return [Kernel("narrow", grid, THREADS, (np.uint64(self.layout.size), self.params, self.copy))]

    def set_params(self, flat: np.ndarray) -> None:
        """Take the host vector `flat` of the layout as the parameters. Local."""
        self.device.upload(flat, self.params)
        self.device.run(self.narrow_params())


class Predictor(PlannedForward):
    """A network that predicts, in float32, as `nn.network.Network` does: with the same `forward`.

    Local. Products of the library with relu make 0 of what is not a number; here kernels apply it, so that a row with
    such an input gives such an output, as on the host. `max_rows` : the most rows of a call.
    """

    def __init__(self, spec: Any, device: Any, max_rows: int):
        super().__init__(replace(spec, dropout=0.0), device, max_rows)
        self.max_rows = self.capacity
        self._plan_forward_products()
        self._launches = self.forward_launches(None)

    def forward(self, x: Any) -> Any:
        """Return the logits (n, k) of the rows `x` (n, d), both on the device; valid until the next call. Local."""
        self._rows_of(0, len(x))[...] = x
        self.device.settle()    # the rows are there, and what reads the logits of before is over
        self.device.run(self._launches)
        self.device.synchronize()
        return self._rows_of(-1, len(x))

    def _rows_of(self, at: int, rows: int) -> Any:
        return self.x[at].reshape(self.capacity, self.widths[at])[:rows, :self.spec.sizes[at]]


_ACTIVATION = {kind: number for number, kind in enumerate(activations.KINDS)}
