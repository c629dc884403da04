"""A training step of a network as a list of launches over buffers that are made once: what a GPU replays.

Weights are row-major (out, in), activations (rows, width): seen column-major, as the library does, a weight is
(in, out) and an activation (width, rows). Every width is padded to 16, every batch has the same capacity; rows that are
not in use are zero and weigh nothing. A step is: gather; L forward products with bias and relu; the loss, which writes
its gradient over the logits; from the last layer to the first the weight gradient, beside the product for the layer
below and the kernel that applies the derivative and sums the bias gradient; the sums that decide about the update; the
update. Small networks let the products apply the mask of relu and sum the bias gradient: 3 L + 3 launches. What no
product can fuse a kernel does, decided here, once. The library computes the products, or a kernel of our own
(`ops.small_products`), whichever timing finds faster.

Precision: "float32"; "tf32", float32 everywhere but in the arithmetic of the products; "bf16", activations and a copy
of the parameters in bf16, sums, gradients of parameters and the parameters themselves in float32.
"""

from typing import Any

import numpy as np

from hpcmlp.nn.layout import PaddedLayout, pad
from hpcmlp.nn.planned_forward import THREADS, PlannedForward
from hpcmlp.ops import losses
from hpcmlp.ops.candidates import agree
from hpcmlp.ops.cublaslt import Product
from hpcmlp.ops.launches import CONTROL, HYPER, PARTIAL, Await, Fork, Join, Kernel, Mark, Multiply

RULES = {"adam": 0, "adamw": 0, "sgd": 1, "rmsprop": 2, "adagrad": 3}
STATE = {"adam": ("m", "v"), "adamw": ("m", "v"), "sgd": ("momentum",), "rmsprop": ("momentum", "v"),
         "adagrad": ("s",)}
MOST_THREADS = 1024
FUSED_ELEMENTS = 1 << 17
MASK_BITS = 128     # the library wants rows of the mask in such pieces


class PlannedNetwork(PlannedForward):
    """Buffers and launches of a step on one device.

    Local.

    Parameters
    ----------
    spec : `nn.network.NetworkSpec` without layer norm and residual sums.
    loss : `nn.losses.Loss`.
    device : `ops.gpu_device.GpuDevice`, or the emulated one.
    capacity : the most rows of a batch.
    rule, hyper : a key of `RULES` and its constants as in `nn.optimizers.HYPER`.
    precision : one of `planned_forward.PRECISIONS`.
    target_width : columns of the targets; 0 for classes.
    clip_norm, average : largest gradient norm, decay of the averaged weights; or None.
    seed : of dropout.
    concurrent : weight gradients run beside the rest of the backward pass.
    ranges : (start, stop) of the flat vector that this rank updates, multiples of 4; None: all of it.
    params, grads : flat vectors of the device of `layout`, zero; None: made here. layout : of `spec`; None: made here.
    fused : products apply the mask of relu and sum the bias gradient; None: where that is faster.

    Attributes
    ----------
    grads : flat float32 vector on the device.
    state : name -> vector over the ranges, the names of `nn.optimizers`; averaged : the same, or None.
    notes : what could not be fused.
    """

    def __init__(self, spec: Any, loss: Any, device: Any, capacity: int, rule: str, hyper: dict[str, Any], *,
                 precision: str = "float32", target_width: int = 0, clip_norm: float | None = None,
                 average: float | None = None, seed: int = 0, concurrent: bool = True, fused: bool | None = None,
                 ranges: list[tuple[int, int]] | None = None, params: Any = None, grads: Any = None,
                 layout: PaddedLayout | None = None):
        assert rule in RULES
        super().__init__(spec, device, capacity, precision=precision, params=params, layout=layout, seed=seed)
        self.loss, self.rule, self.hyper = loss, rule, hyper
        self.target_width, self.clip_norm, self.concurrent = target_width, clip_norm, concurrent
        self.notes: list[str] = []
        self.ranges = [(0, self.layout.size)] if ranges is None else ranges
        self._make_vectors(average, grads)
        self._make_gradients()
        self._hyper = device.zeros(HYPER.itemsize, np.uint8)
        device.upload(self._hyper_record(average).view(np.uint8), self._hyper)
        # In small networks, where launches are what takes time, all that can be fused is; in larger ones the library's
        # products with masks and sums take more time than plain ones and a kernel (measured, see benchmarks/notes).
        self._masked = self.capacity * max(self.widths) <= FUSED_ELEMENTS if fused is None else fused
        self._sums_bias = [False] * spec.num_layers
        self._partials: list[Any] = []  # of the list of launches in the making
        self._kept: list[Any] = []      # arrays that launches know by address
        self._plan_products()

    # ---- buffers

    def _make_vectors(self, average: float | None, grads: Any) -> None:
        zeros = self.device.zeros
        self.grads = zeros(self.layout.size, np.float32) if grads is None else grads
        names = STATE[self.rule]
        if not self.hyper.get("momentum") and self.rule in ("sgd", "rmsprop"):
            names = tuple(n for n in names if n != "momentum")
        owned = sum(stop - start for start, stop in self.ranges)
        self.state = {name: zeros(owned, np.float32) for name in names}
        self.averaged = None if average is None else zeros(owned, np.float32)

    def _make_gradients(self) -> None:
        zeros, rows, widths = self.device.zeros, self.capacity, self.widths
        # Gradient of each hidden layer: of its own, as weight gradients may still read the one above.
        self.d = [None, *(zeros(rows * w, self._storage) for w in widths[1:-1]), self.x[-1]]
        self.mask: list[Any] = [None] * len(widths)
        self._readers: list[Any] = [None] * len(widths)     # the products that read the masks
        self.targets = zeros(rows * max(1, self.target_width), np.float32 if self.target_width else np.int32)
        self.weights = zeros(rows, np.float32)
        self.loss_grid = -(-rows * 32 // THREADS)
        self._pairs = zeros(2 * self.loss_grid, np.float64)
        self.sum_grid = max(1, min(8 * self.device.multiprocessors, -(-self.layout.size // (4 * THREADS))))
        self._partial = zeros(self.sum_grid, np.float64)
        self._loss_vector = None
        values = self.loss.options.get("class_weights") or self.loss.options.get("quantiles")
        if values is not None:
            self._loss_vector = zeros(len(values), np.float32)
            self.device.upload(np.array(values, np.float32), self._loss_vector)

    def _hyper_record(self, average: float | None) -> np.ndarray:
        h, record = self.hyper, np.zeros(1, HYPER)
        record["rule"], record["decoupled"] = RULES[self.rule], self.rule == "adamw"
        record["nesterov"] = bool(h.get("nesterov"))
        record["beta1"], record["beta2"] = h.get("beta1", h.get("alpha", 0.0)), h.get("beta2", 0.0)
        record["eps"], record["decay"] = h.get("eps", 0.0), h["weight_decay"]
        record["momentum"], record["dampening"] = h.get("momentum", 0.0), h.get("dampening", 0.0)
        record["average"], record["clip"] = average or 0.0, self.clip_norm or 0.0
        return record

    @property
    def memory_bytes(self) -> int:
        """Bytes of all buffers on the device, without the samples."""
        arrays = [self.params, self.grads, self.copy, self.averaged, *self.state.values(), *self.x, *self.d[1:-1],
                  *self.pre, *self.mask]
        return sum(a.nbytes for a in arrays if a is not None)

    # ---- products

    def _plan_products(self) -> None:
        """Ask the device for every product, the fused forms first."""
        layers = range(self.spec.num_layers)
        self._plan_forward_products()
        self._weight_products = [self._plan_weight_gradient(layer) for layer in layers]
        self._input_products = [None, *(self._plan_input_gradient(layer) for layer in layers if layer)]

    def _plan_forward(self, layer: int) -> Multiply:
        """x[layer + 1] = f(x[layer] w^T + b), or the part of it that can be fused."""
        if layer < self.spec.num_layers - 1 and self.spec.activation == "relu":
            common = self._forward_terms(layer)
            fused = self._plan_with_mask(layer, common) if self._masked else None
            fused = fused or self.device.multiply(Product(d=self.x[layer + 1], epilogue="relu_bias", **common))
            if fused is not None:
                return fused
            self.notes.append(f"layer {layer}: relu by a kernel")
        return super()._plan_forward(layer)

    def _plan_with_mask(self, layer: int, common: dict[str, Any]) -> Multiply | None:
        """The forward product that writes a mask, if backward can use it."""
        bits = pad(self.widths[layer + 1], MASK_BITS)
        mask = self.device.zeros(self.capacity * bits // 8, np.uint8)
        fused = self.device.multiply(Product(d=self.x[layer + 1], epilogue="relu_aux_bias", aux=mask, aux_ld=bits,
                                             **common))
        reader = self.device.multiply(self._input_product(layer + 1, "drelu", mask, bits))
        if fused is None or reader is None or not agree(fused.ways, reader.ways):
            return None
        self.mask[layer + 1], self._readers[layer + 1] = mask, reader
        return fused

    def _plan_weight_gradient(self, layer: int) -> Multiply:
        """grads of weight = d^T x; and of bias = column sums of d where that is fused."""
        rows, w_in, w_out = self.capacity, self.widths[layer], self.widths[layer + 1]
        side = self.concurrent and layer > 0  # the last one has nothing to run beside
        common = dict(m=w_in, n=w_out, k=rows, a=self.x[layer], b=self.d[layer + 1], d=self.layout.slot(
            self.grads, f"layers.{layer}.weight"), lda=w_in, ldb=w_out, ldd=w_in, trans_b=True, compute=self._compute)
        fused = self.device.multiply(Product(epilogue="bgradb", bias=self._bias_gradient(layer), **common), side) \
            if self._masked else None
        self._sums_bias[layer] = fused is not None
        return fused or self._must(Product(**common), side)

    def _bias_gradient(self, layer: int) -> Any:
        return self.layout.slot(self.grads, f"layers.{layer}.bias")

    def _input_product(self, layer: int, epilogue: str, mask: Any = None, bits: int = 0) -> Product:
        """d[layer] = d[layer + 1] w, times the mask of hidden layer `layer` where it is fused."""
        rows, w_in, w_out = self.capacity, self.widths[layer], self.widths[layer + 1]
        return Product(m=w_in, n=rows, k=w_out, a=self._weight(layer), b=self.d[layer + 1], d=self.d[layer], lda=w_in,
                       ldb=w_out, ldd=w_in, epilogue=epilogue, aux=mask, aux_ld=bits, compute=self._compute,
                       gate=None if mask is None else self.x[layer])

    def _plan_input_gradient(self, layer: int) -> Multiply:
        if self._readers[layer] is not None:
            return self._readers[layer]
        return self._must(self._input_product(layer, "none"))

    # ---- launches

    def products(self) -> list[Multiply]:
        """Return the products of a step, for tuning and timing. Local."""
        return [*self._forward_products, *self._weight_products,
                *(p for p in self._input_products if p is not None)]

    def gradient(self, steps: Any) -> list[Any]:
        """Return the launches from the gathered batch to the gradient of the loss sum. Local.

        steps : the table of steps on the device (`ops.launches.STEP` records).
        """
        layers, launches = self.spec.num_layers, self.forward_launches(steps)
        launches.append(self._loss_kernel(steps))
        if not self._sums_bias[-1]:
            launches.append(self._backward_kernel(layers, steps, "identity", None))
        for layer in range(layers - 1, -1, -1):
            if self.concurrent and layer:
                launches.append(Fork())
            launches.append(self._weight_products[layer])
            if layer:
                launches.append(self._input_products[layer])
                launches += self._activate_backward(layer, steps)
        launches += self._sum_partials()
        if self.concurrent and layers > 1:
            launches.append(Join())
        return launches

    def _activate_backward(self, layer: int, steps: Any) -> list[Kernel]:
        """What the product that made d[layer] leaves to do: derivative, dropout, and the sums for the bias below."""
        if self.mask[layer] is not None:
            if not self.spec.dropout and self._sums_bias[layer - 1]:
                return []
            return [self._backward_kernel(layer, steps, "identity", None)]
        pre = self.pre[layer]
        return [self._backward_kernel(layer, steps, self.spec.activation, self.x[layer] if pre is None else pre)]

    def _backward_kernel(self, at: int, steps: Any, kind: str, pre: Any) -> Kernel:
        """d[at] times what the activation and dropout make of it, and its column sums, piece by piece."""
        packs, blocks = self.widths[at] * self._storage.itemsize // 16, 8 * self.device.multiprocessors
        across = packs if packs <= 64 else 32
        strips, depth = -(-packs // across), THREADS // across
        # Few rows a thread where a batch is small; where it is large as many pieces as fill the device.
        parts = max(1, min(blocks // strips, -(-self.capacity // (8 * depth))))
        chunk = -(-self.capacity // parts)
        parts = -(-self.capacity // chunk)
        dropped = at < self.spec.num_layers and self.spec.dropout > 0.0     # logits are not
        about = list(self._about(at, steps, kind))
        if not dropped:
            about[5] = np.uint32(0)
        partial = None
        if not self._sums_bias[at - 1]:
            partial = self.device.zeros(parts * self.widths[at], np.float32)
            self._partials.append((partial, self._bias_gradient(at - 1), parts, self.widths[at]))
        pre = None if kind == "identity" else pre
        name = "relu_backward" if kind in ("relu", "identity") and not dropped else "activate_backward"
        return Kernel(f"{name}_{self._suffix}", strips * parts, THREADS,
                      (*about, pre, self.d[at], partial, np.int32(across), np.int32(chunk)))

    def _sum_partials(self) -> list[Kernel]:
        """The launch that adds up the bias gradients of all layers that have only sums of pieces."""
        if not self._partials:
            return []
        records, block = np.zeros(len(self._partials), PARTIAL), 0
        for record, (partial, bias, parts, stride) in zip(records, self._partials, strict=True):
            record["partial"], record["bias"] = self.device.address(partial), self.device.address(bias)
            record["parts"], record["stride"], record["first_block"] = parts, stride, block
            block += -(-stride // 32)
        table = self.device.zeros(records.nbytes, np.uint8)
        self.device.upload(records.view(np.uint8), table)
        self._kept.append((table, self._partials))
        count, self._partials = len(records), []
        return [Kernel("sum_partials", block, THREADS, (table, np.int32(count)))]

    def _loss_kernel(self, steps: Any) -> Kernel:
        o = self.loss.options
        return Kernel(f"loss_{self._suffix}", self.loss_grid, THREADS,
                      (self.control, steps, np.int32(losses.KINDS.index(self.loss.kind)),
                       np.float32(o.get("label_smoothing", 0.0)), np.float32(o.get("delta", 0.0)), self._loss_vector,
                       np.int32(self.target_width), np.int32(self.capacity), np.int32(self.spec.sizes[-1]),
                       np.int32(self.widths[-1]), self.x[-1], self.targets, self.weights, self._pairs))

    def sums(self, steps: Any, results: Any, closes: bool = True, part: tuple[int, int] | None = None) -> Kernel:
        """Return the launch that sums the squares of the gradient, or of a part of it, and the losses. Local.

        closes : decide about the update from these sums, and go on to the next line of the table; else the sums wait in
            the control block.
        """
        start, stop = part or (0, self.layout.size)
        return Kernel("finish_sums", self.sum_grid, THREADS,
                      (self.control, steps, results, np.float32(self.clip_norm or 0.0), np.int32(closes),
                       np.uint64(stop - start), self.grads[start:stop], np.int32(self.loss_grid), self._pairs,
                       self._partial))

    def close(self, steps: Any, results: Any) -> Kernel:
        """Return the launch that decides about the update from the sums in the control block, and goes on. Local."""
        return Kernel("close_step", 1, 1, (self.control, steps, results, np.float32(self.clip_norm or 0.0)))

    @property
    def words(self) -> Any:
        """The sums in the control block, float64: loss, weight, square of the gradient, not finite."""
        return self.control[CONTROL.fields["loss"][1]:].view(np.float64)

    def update(self) -> list[Kernel]:
        """Return the launches that update the parameters of this rank's ranges. Local."""
        launches, at = [], 0
        for start, stop in self.ranges:
            launches.append(self._update(start, stop, at))
            at += stop - start
        return launches

    def _update(self, start: int, stop: int, at: int, blocks: int = 0, side: bool = False) -> Kernel:
        """The update of a piece of the flat vector, whose state begins at `at`; `blocks`: few and large ones."""
        owned, here = slice(at, at + stop - start), slice(start, stop)
        first, second = (_cut(v, owned) for v in (self.state.get("m", self.state.get("momentum")),
                                                  self.state.get("v", self.state.get("s"))))
        grid = max(1, min(16 * self.device.multiprocessors, -(-(stop - start) // (4 * THREADS))))
        return Kernel("update", blocks or grid, MOST_THREADS if blocks else THREADS, (
            self.control, self._hyper, np.uint64(stop - start), self.grads[here], self.params[here], first, second,
            _cut(self.copy, here), _cut(self.averaged, owned)), side)

    def update_beside(self, step: list[Any], whole: int, blocks: int) -> list[Any]:
        """Return the launches of an update on the second stream beside those of the step behind it. Local.

        The forward product of each layer waits for the update of its parameters; every number is what it is without
        the second stream. Wanted: one range, all of the vector.

        step : what follows, without its own update. whole : how many layers the whole device updates first, as the
        first products need them at once; the others are left to `blocks` blocks, so that products keep the rest.
        """
        assert self.ranges == [(0, self.layout.size)]
        layers = range(self.spec.num_layers)
        starts = [self.layout.starts[self.layout.names.index(f"layers.{k}.weight")] for k in layers]
        ends, marks = [*starts[1:], self.layout.size], [Mark() for _ in layers]
        launches: list[Any] = [Fork()]
        for k in layers:
            launches += [self._update(starts[k], ends[k], starts[k], 0 if k < whole else blocks, side=True), marks[k]]
        waits = {id(self._forward_products[k].product): Await(marks[k]) for k in layers}
        for launch in step:
            if isinstance(launch, Multiply) and id(launch.product) in waits:
                launches.append(waits[id(launch.product)])
            launches.append(launch)
        return launches

    def set_params(self, flat: np.ndarray) -> None:
        """Take the host vector `flat` of the layout as the parameters; a new average begins there. Local."""
        super().set_params(flat)
        if self.averaged is not None:
            self.device.upload(np.concatenate([flat[start:stop] for start, stop in self.ranges]), self.averaged)

    def step_lines(self, out: np.ndarray, first: int, rates: Any) -> None:
        """Fill what the update needs into the lines of the host table `out`: steps first, first + 1, ... of the run.

        Local. rates : their learning rates. The conventions are those of `ops.plain`, in float64 until stored.
        """
        h = self.hyper
        number = np.arange(first, first + len(out), dtype=np.float64) + 1.0
        rates = np.asarray(rates, np.float64)
        out["number"] = np.arange(first, first + len(out))
        out["keep"] = 1.0 - rates * h["weight_decay"]
        out["starts"] = number == 1.0
        out["rate"], out["second"] = rates, 1.0
        if RULES[self.rule] == 0:
            out["rate"] = rates / (1.0 - h["beta1"] ** number)
            out["second"] = (1.0 - h["beta2"] ** number) ** -0.5
        if self.rule == "adagrad":
            out["rate"] = rates / (1.0 + (number - 1.0) * h["lr_decay"])


def _cut(vector: Any, piece: slice) -> Any:
    return None if vector is None else vector[piece]
