"""A multi-layer perceptron on preallocated arrays: forward to logits, backward into one flat gradient.

Hidden layer l: a = f(norm(x @ w.T + b)), then dropout, then + x where residual and the widths agree (not for the
first layer, whose input is data); the last layer is linear. What does not change from step to step is planned once: per
layer one tuple of views, cut to the rows in use and kept for the last few row counts, so that a step is a loop of calls
into `ops` and allocates nothing. Kept for backward: one (rows, width) array per layer; a second one only where the
derivative needs it (pre-activations of gelu and silu; input of a layer norm; f itself under dropout or a residual sum
when its derivative comes from its output). Gradients of activations share two buffers of the greatest width (three with
residual sums). Cost of a step: 6 * rows * weights flops, less 2 * rows * sizes[0] * sizes[1], as data need no gradient.

Gradients of weights come before those of activations, and those of large weights in pieces, rows of the matrix, where
the caller wants to hear early of what is final (`on_closed`), or has the parameters late (`need`).

With `recompute` activations are kept at the ends of segments of layers only, and the buffers of the layers between are
shared by all segments: backward takes each segment but the last through forward once more, with the same bits (T. Chen
et al., "Training deep nets with sublinear memory cost", arXiv:1604.06174). `segments` picks the cut that keeps least,
of the order of the square root of the layers; the price is up to 2 * rows * weights flops.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcmlp.nn.layout import Layout

# Derivatives that need only the sign of the output, which dropout in place leaves alone where it matters.
FROM_SIGN = frozenset({"relu", "leaky_relu", "identity"})
EVALUATION_ROWS = 1024  # that a rank takes through the network at once while it validates
PLANS_KEPT = 8  # row counts whose views are kept; a run has two or three
# Of a piece of a weight, at least. 2048 samples through 784-2048 and 2048-2048 take 1 % longer in pieces of 512 rows on
# an AMD EPYC, 6 % in 256, 12 % in 128 (benchmarks/notes/2026-11-28-server-on-a-node.md, with steps over 1 Gbit/s).
PIECE_ROWS = 512
FIRST_LAYER = 4  # so much smaller are pieces of the first layer: nothing hides its last gradient and first parameters
ROW_ALIGN = 64  # pieces begin at multiples: aligned in memory for any width, and whole tiles of the matrix product


@dataclass(frozen=True)
class NetworkSpec:
    """The shape of a network; `sizes` are the widths from input to logits."""

    sizes: tuple[int, ...] = (784, 256, 10)
    activation: str = "relu"
    dropout: float = 0.0
    layer_norm: bool = False
    residual: bool = False

    @property
    def num_layers(self) -> int:
        """Number of weight layers. Local."""
        return len(self.sizes) - 1

    def layout(self, kind: type[Layout] = Layout) -> Layout:
        """Return the layout of the parameters: per layer weight (out, in), bias, then its norm. Local."""
        tensors = []
        for layer, (d_in, d_out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            tensors += [(f"layers.{layer}.weight", (d_out, d_in)), (f"layers.{layer}.bias", (d_out,))]
            if self.layer_norm and layer < self.num_layers - 1:
                tensors += [(f"norms.{layer}.weight", (d_out,)), (f"norms.{layer}.bias", (d_out,))]
        return kind(tensors)

    def layer_starts(self) -> list[int]:
        """Return where each layer's tensors begin in the flat vector, ascending. Local.

        The gradient from such a place to the end is final once backward has left that layer.
        """
        return [t.start for t in self.layout().tensors if t.name.startswith("layers.") and t.name.endswith(".weight")]

    def layer_spans(self) -> list[tuple[int, int]]:
        """Return the elements [start, stop) of the flat vector that each layer's tensors take, padding included. Local.
        """
        starts = self.layer_starts()
        return list(zip(starts, [*starts[1:], self.layout().size], strict=True))

    def _kept_beside_output(self, layer: int, needs_pre: bool) -> list[str]:
        """Name what forward leaves in `layer` for backward, of the size of its output."""
        if layer == self.num_layers - 1:
            return []
        overwritten = self.is_residual(layer) or self.dropout > 0.0 and self.activation not in FROM_SIGN
        return ["f"] * (overwritten and not needs_pre) + ["pre"] * needs_pre + ["z"] * self.layer_norm

    def segments(self, needs_pre: bool) -> list[int]:
        """Return where segments of layers begin, and the number of layers: the cut that keeps fewest activations.

        Local. Of cuts into equally many layers; one segment when no cut is better. `needs_pre`: the derivative of the
        activation comes from its input.
        """
        count = self.num_layers
        cuts = [[count * k // parts for k in range(parts + 1)] for parts in range(1, count + 1)]
        return min(cuts, key=lambda cut: self.kept_activations(needs_pre, cut))

    def kept_activations(self, needs_pre: bool, cut: list[int] | None = None) -> int:
        """Return how many numbers per sample forward keeps for backward, masks of dropout and norms' means apart.

        Local. `cut` : as `segments` returns it; None: without recomputation.
        """
        cut = cut or [0, self.num_layers]
        own, places = 0, {}
        for first, stop in zip(cut, cut[1:], strict=False):
            for layer in range(first, stop):
                names, width = self._kept_beside_output(layer, needs_pre), self.sizes[layer + 1]
                if layer == stop - 1 and stop < self.num_layers:
                    own += width    # the output of a segment has a place to itself
                else:
                    names.append("out")
                for name in names:
                    places[layer - first, name] = max(places.get((layer - first, name), 0), width)
        return own + sum(places.values())

    def entries(self, segments: list[int], needs_pre: bool) -> list[int]:
        """Return the layers in the order in which a forward and its backward read their parameters. Local.

        segments : as `segments` returns them; backward runs all but the last once more.
        """
        order, again = list(range(self.num_layers)), {b - 1: a for a, b in zip(segments, segments[1:-1], strict=False)}
        for layer in reversed(range(self.num_layers)):
            if layer in again:
                order += range(again[layer], self.redone(layer, needs_pre))
            if self.reads_in_backward(layer):
                order.append(layer)
        return order

    def reads_in_backward(self, layer: int) -> bool:
        """Tell whether backward reads parameters of `layer`: data need no gradient. Local."""
        return layer > 0 or self.layer_norm and layer < self.num_layers - 1

    def redone(self, last: int, needs_pre: bool) -> int:
        """Return where the segment that ends with `last` need not be run again: its output may tell all of it. Local.
        """
        more = needs_pre or self.layer_norm or self.dropout or self.is_residual(last)
        return last + 1 if more else last

    def row_cuts(self, layer: int, piece: int | None = None) -> list[int]:
        """Return the rows at which the weight of `layer` is cut into pieces, from 0 to its height.

        Local. A piece holds at least `piece` elements (None: the whole weight), of the first layer 1/FIRST_LAYER of
        that, and PIECE_ROWS rows.
        """
        width, height = self.sizes[layer], self.sizes[layer + 1]
        if piece is not None and layer == 0:
            piece = -(-piece // FIRST_LAYER)
        count = 1 if piece is None else max(1, height // max(PIECE_ROWS, -(-piece // width)))
        return [height * k // count // ROW_ALIGN * ROW_ALIGN for k in range(count)] + [height]

    def closings(self, piece: int | None = None) -> list[int]:
        """Return from where on the gradient is final at some time of the backward pass, ascending from 0. Local.

        These are the layers' starts, and the pieces that `row_cuts` makes.
        """
        return [start + row * self.sizes[layer] for layer, start in enumerate(self.layer_starts())
                for row in self.row_cuts(layer, piece)[:-1]]

    def is_residual(self, layer: int) -> bool:
        """Tell whether hidden `layer` adds its input to its output. Local."""
        return self.residual and 0 < layer < self.num_layers - 1 and self.sizes[layer] == self.sizes[layer + 1]

    def layer_params(self) -> list[int]:
        """Return the number of parameters of each layer, its norm included. Local."""
        counts = [0] * self.num_layers
        for tensor in self.layout().tensors:
            counts[int(tensor.name.split(".")[1])] += tensor.stop - tensor.start
        return counts


class Network:
    """A network that owns its activations and works on one flat vector of parameters and one of gradients.

    Local.

    Parameters
    ----------
    spec : shape of the network.
    ops : the arithmetic; all arrays live where it works.
    max_rows : the greatest number of samples of one forward; may be 0.
    params : (layout.size,) flat vector, or None for a new one of zeros. Only read here. Or a list with one array per
        layer, as long as `spec.layer_spans` says: arrays may share memory, if the caller fills each in time (`enter`).
    grads : (layout.size,) flat vector with zero padding, or None for one made at the first backward. Or a list like
        that of `params`; each is written from `open_grads` to `on_closed`.
    dtype : float32 or float64, for everything.
    piece : elements of a piece of a weight, as in `NetworkSpec.row_cuts`.
    recompute : keep activations at the ends of segments only; see the module.

    Notes
    -----
    `forward` keeps a reference to `x` and hands out views of its own buffers: the caller leaves `x` alone until
    `backward` has returned, or `forget`, and has the logits until the next `forward`. Buffers for backward are made at
    the first backward, so a network that only predicts never pays for them.
    """

    def __init__(self, spec: NetworkSpec, ops: Any, max_rows: int, params: Any = None, grads: Any = None,
                 dtype: Any = np.float32, piece: int | None = None, recompute: bool = False) -> None:
        assert len(spec.sizes) >= 2 and min(spec.sizes) > 0 and max_rows >= 0
        self.spec, self.ops, self.max_rows, self.dtype = spec, ops, max_rows, np.dtype(dtype)
        self.layout = spec.layout()
        self.params = ops.zeros((self.layout.size,), dtype) if params is None else params
        self._grads = grads
        self._bounds = [*spec.layer_starts(), self.layout.size]  # offsets of the layers, and the end
        self._views = self._all_views()
        self._kind = spec.activation
        self._needs_pre = spec.activation in ops.NEEDS_PRE
        self._segments = segments = spec.segments(self._needs_pre) if recompute else [0, spec.num_layers]
        # Last layer of a segment that backward runs again -> its first layer.
        self._again = {stop - 1: first for first, stop in zip(segments, segments[1:-1], strict=False)}
        self._slots = {layer: layer - first for first, stop in zip(segments, segments[1:], strict=False)
                       for layer in range(first, stop)} if len(segments) > 2 else {}
        self._places: dict[tuple[int, str], Any] = {}   # buffers that the layers of one slot take in turn
        self._buffers = [self._layer_buffers(layer) for layer in range(spec.num_layers)]
        self._flow: list[Any] | None = None  # the shared buffers of activation gradients
        self._extra: Any = None  # gradient of one layer of one micro-batch, when accumulating
        self._forward_plans: dict[tuple[int, bool], list[tuple]] = {}
        self._backward_plans: dict[tuple[int, bool, bool], list[tuple]] = {}
        self._x: Any = None
        self._dropped = False  # dropout acted in the last forward: its masks are valid
        self._how: tuple = ()  # what else the last forward was given
        self._cuts = [spec.row_cuts(layer, piece) for layer in range(spec.num_layers)]

    @property
    def grads(self) -> Any:
        """The flat gradient; its padding is zero. Local."""
        if self._grads is None:
            self._grads = self.ops.zeros((self.layout.size,), self.dtype)
        return self._grads

    def _all_views(self) -> dict[str, Any]:
        """Every tensor of the parameters, by name."""
        if not isinstance(self.params, list):
            assert self.params.shape == (self.layout.size,) and self.params.dtype == self.dtype
            return self.layout.views(self.params)
        assert [a.shape[0] for a in self.params] == [b - a for a, b in self.spec.layer_spans()]
        return {t.name: part[t.start - start:t.stop - start].reshape(t.shape)
                for part, (start, stop) in zip(self.params, self.spec.layer_spans(), strict=True)
                for t in self.layout.tensors if start <= t.start < stop}

    def _widest(self) -> Any:
        """A flat buffer for the widest hidden activation."""
        return self.ops.empty((self.max_rows * max(self.spec.sizes[1:-1], default=0),), self.dtype)

    def _cut(self, flat: Any, rows: int, layer: int) -> Any:
        """View a flat buffer as the (rows, width) activations of hidden `layer`."""
        width = self.spec.sizes[layer + 1]
        return flat[:rows * width].reshape(rows, width)

    def _layer_buffers(self, layer: int) -> dict[str, Any]:
        """The arrays that a layer keeps from forward to backward, for `max_rows` rows.

        `f` is the output of the activation function, `out` that of the layer; one array where backward allows it.
        """
        spec, width = self.spec, self.spec.sizes[layer + 1]
        new = dict.fromkeys(("f", "pre", "mask", "z", "mean", "rstd"))
        new["out"] = self._buffer(layer, "out", width)
        if layer == spec.num_layers - 1:
            return new
        overwritten = spec.is_residual(layer) or (spec.dropout and self._kind not in FROM_SIGN)
        new["f"] = self._buffer(layer, "f", width) if overwritten and not self._needs_pre else new["out"]
        if self._needs_pre:
            new["pre"] = self._buffer(layer, "pre", width)
        if spec.dropout:
            new["mask"] = self._buffer(layer, "mask", width, np.bool_)
        if spec.layer_norm:
            new["z"] = self._buffer(layer, "z", width)
            new["mean"], new["rstd"] = (self._buffer(layer, name, 1).reshape(-1) for name in ("mean", "rstd"))
        return new

    def _buffer(self, layer: int, name: str, width: int, dtype: Any = None) -> Any:
        """An array (max_rows, width) for one layer, or the place that layers of several segments take in turn."""
        dtype = self.dtype if dtype is None else dtype
        if not self._slots or name == "out" and layer in self._again:
            return self.ops.empty((self.max_rows, width), dtype)
        slot = self._slots[layer]
        if (slot, name) not in self._places:
            users = [other for other, place in self._slots.items() if place == slot
                     and (other not in self._again if name == "out" else other < self.spec.num_layers - 1)]
            widest = 1 if name in ("mean", "rstd") else max(self.spec.sizes[other + 1] for other in users)
            self._places[slot, name] = self.ops.empty((self.max_rows * widest,), dtype)
        return self._places[slot, name][:self.max_rows * width].reshape(self.max_rows, width)

    def _cut_layer(self, layer: int, rows: int, dropped: bool) -> dict[str, Any]:
        """The buffers of a layer for `rows` rows; without dropout `out` may simply be `f`, and there is no mask."""
        cut = {name: None if a is None else a[:rows] for name, a in self._buffers[layer].items()}
        if not dropped:
            cut["mask"] = None
            if cut["f"] is not None and not self.spec.is_residual(layer):
                cut["out"] = cut["f"]
        return cut

    def _plan_forward(self, rows: int, dropped: bool) -> list[tuple]:
        """Per layer: what it reads and writes."""
        plan = []
        for layer in range(self.spec.num_layers):
            cut = self._cut_layer(layer, rows, dropped)
            norm, product, direct = None, cut["out"], False
            if cut["z"] is not None:
                normed, product = cut["pre"] if self._needs_pre else cut["f"], cut["z"]
                norm = (self._views[f"norms.{layer}.weight"], self._views[f"norms.{layer}.bias"], normed,
                        cut["mean"], cut["rstd"])
            elif cut["f"] is not None:
                product, direct = cut["pre"] if self._needs_pre else cut["f"], True
            plan.append((self._views[f"layers.{layer}.weight"], self._views[f"layers.{layer}.bias"], product, direct,
                         cut["out"], cut["f"], cut["pre"], norm, cut["mask"], self.spec.is_residual(layer), layer))
        _remember(self._forward_plans, (rows, dropped), plan)
        return plan

    def forward(self, x: Any, training: bool = False, seed: int = 0, step: int = 0, first: int = 0,
                on_layer: Callable[[int], None] | None = None,
                need: Callable[[int, int], None] | None = None,
                enter: Callable[[int], None] | None = None) -> Any:
        """Return the logits of `x`.

        Local. Dropout acts only when `training`; its mask comes from (seed, step, layer, first + row) alone, so it does
        not depend on how the global batch is cut over ranks and micro-batches.

        Parameters
        ----------
        x : (n, sizes[0]) of the network's dtype, n <= max_rows, n = 0 included; must stay until `backward` returns.
        first : place of x[0] in the global batch.
        on_layer : called as on_layer(layer) when the output of `layer` stands.
        need : called as need(start, stop) before params[start:stop] are read for the first time, ascending; large
            weights are then read in their pieces.
        enter : called as enter(layer) before a layer's parameters are read, here and in `backward`: in the order of
            `entries`. A layer's parameters must stay until the next call, or the end of backward.

        Returns
        -------
        logits : (n, sizes[-1]) view of a buffer of the network, valid until the next forward.
        """
        rows = x.shape[0]
        assert rows <= self.max_rows, f"{rows} rows; this network was made for {self.max_rows}"
        assert x.dtype == self.dtype and x.shape[1] == self.spec.sizes[0]
        dropped = training and self.spec.dropout > 0.0
        plan = self._forward_plans.get((rows, dropped)) or self._plan_forward(rows, dropped)
        self._x, self._dropped, self._how = x, dropped, (seed, step, first, need, enter)
        return self._through(plan, x, seed, step, first, need, enter, on_layer)

    def _through(self, plan: list[tuple], x: Any, seed: int, step: int, first: int,
                 need: Callable[[int, int], None] | None, enter: Callable[[int], None] | None,
                 on_layer: Callable[[int], None] | None = None) -> Any:
        """Take `x` through the layers of `plan`."""
        ops, kind, rate = self.ops, self._kind, self.spec.dropout
        for w, b, product, direct, out, f, pre, norm, mask, residual, layer in plan:
            if enter is not None:
                enter(layer)
            if need is not None:
                self._multiply(layer, x, w, product, need)
                ops.bias_activation(kind if direct else "identity", product, b, f if direct else product)
            elif direct:
                ops.linear_activation(x, w, b, kind, f, pre)
            else:
                ops.linear(x, w, b, product)
            if norm is not None:
                gamma, beta, normed, mean, rstd = norm
                ops.layer_norm(product, gamma, beta, normed, mean, rstd)
                ops.activation(kind, normed, f)
            if mask is not None:
                ops.dropout_mask(mask, rate, seed, step, layer, first)
                ops.dropout(f, mask, rate, out)
                f = out
            if residual:
                ops.add(f, x, out)
            x = out
            if on_layer is not None:
                on_layer(layer)
        return x

    def forget(self) -> None:
        """Drop the reference to the last input: it need not stay any longer, and no backward follows. Local."""
        self._x = None

    def entries(self) -> list[int]:
        """Return the layers in the order in which a forward and its backward enter them. Local."""
        return self.spec.entries(self._segments, self._needs_pre)

    def _run_again(self, last: int) -> None:
        """Bring back the activations of the segment that ends with layer `last`."""
        first, rows = self._again[last], self._x.shape[0]
        key = (rows, self._dropped)
        plan = self._forward_plans.get(key) or self._plan_forward(*key)
        *draw, need, enter = self._how
        # The parameters stand by now, but must be read in the same pieces for the same bits.
        again = None if need is None else (lambda start, stop: None)
        x, stop = self._x if first == 0 else plan[first - 1][4], self.spec.redone(last, self._needs_pre)
        self._through(plan[first:stop], x, *draw, again, enter)

    def _multiply(self, layer: int, x: Any, w: Any, product: Any, need: Callable[[int, int], None]) -> None:
        """Write x @ w.T, piece by piece as the parameters come."""
        cuts, start, width = self._cuts[layer], self._bounds[layer], self.spec.sizes[layer]
        for first, last in zip(cuts, cuts[1:], strict=False):
            whole = last == cuts[-1]
            need(start + first * width, self._bounds[layer + 1] if whole else start + last * width)
            self.ops.linear(x, w[first:last], None, product[:, first:last])

    def _grad_views(self, layer: int, into: Any) -> dict[str, Any]:
        """Views of `into`, the gradient of one layer, by the last two words of the tensor names: layers.weight, ..."""
        start, stop = self._bounds[layer], self._bounds[layer + 1]
        return {t.name.replace(f".{layer}.", "."): into[t.start - start:t.stop - start].reshape(t.shape)
                for t in self.layout.tensors if start <= t.start < stop}

    def _layer_grads(self, layer: int) -> Any:
        grads = self.grads
        return grads[layer] if isinstance(grads, list) else grads[self._bounds[layer]:self._bounds[layer + 1]]

    def _backward_buffers(self, add: bool) -> None:
        """Make what only backward needs, once."""
        spec, last = self.spec, self.spec.num_layers - 1
        if self._flow is None:
            any_residual = any(spec.is_residual(layer) for layer in range(last))
            self._flow = [self._widest() for _ in range(3 if any_residual else min(last, 2))]
        if add and self._extra is None:
            longest = max(b - a for a, b in zip(self._bounds, self._bounds[1:], strict=False))
            self._extra = self.ops.empty((longest,), self.dtype)

    def _plan_backward(self, rows: int, add: bool, dropped: bool) -> list[tuple]:
        """Per layer, last first: what it reads, where its gradients go, which shared buffers it uses."""
        self._backward_buffers(add)
        spec, last, flow = self.spec, self.spec.num_layers - 1, self._flow
        plan, here = [], -1  # `here`: the shared buffer with the gradient of this layer's output
        for layer in range(last, -1, -1):
            start, stop = self._bounds[layer], self._bounds[layer + 1]
            into = self._extra[:stop - start] if add else self._layer_grads(layer)
            grads = self._grad_views(layer, into)
            hidden = None
            dz_at = here
            if layer < last:
                if spec.is_residual(layer):
                    dz_at = (here + 1) % len(flow)  # the residual sum still needs `dout`
                cut = self._cut_layer(layer, rows, dropped)
                norm = None
                if cut["z"] is not None:
                    norm = (cut["z"], self._views[f"norms.{layer}.weight"], cut["mean"], cut["rstd"],
                            grads["norms.weight"], grads["norms.bias"])
                hidden = (self._cut(flow[here], rows, layer), self._cut(flow[dz_at], rows, layer), cut["f"],
                          cut["pre"], cut["mask"], norm, spec.is_residual(layer))
            x = dx = None
            if layer > 0:
                here = (dz_at + 1) % len(flow)
                x, dx = self._cut_layer(layer - 1, rows, dropped)["out"], self._cut(flow[here], rows, layer - 1)
            plan.append((hidden, x, self._views[f"layers.{layer}.weight"], grads["layers.bias"], dx,
                         self._plan_pieces(layer, grads["layers.weight"], into if add else None), layer))
        _remember(self._backward_plans, (rows, add, dropped), plan)
        return plan

    def _plan_pieces(self, layer: int, dw: Any, extra: Any) -> list[tuple]:
        """Per piece of a layer's gradient, last first: columns of dz, rows of dw, what is added to what, its range."""
        start, stop, width = self._bounds[layer], self._bounds[layer + 1], self.spec.sizes[layer]
        cuts, pieces = self._cuts[layer], []
        for first, last in reversed(list(zip(cuts, cuts[1:], strict=False))):
            here, there = start + first * width, stop if last == cuts[-1] else start + last * width
            sums = []
            if extra is not None:  # tensor by tensor: the gaps between them stay zero
                spans = [(max(t.start, here), min(t.stop, there)) for t in self.layout.tensors]
                sums = [(self.grads[a:b], extra[a - start:b - start]) for a, b in spans if a < b]
            columns = None if len(cuts) == 2 else slice(first, last)
            pieces.append((columns, dw[first:last], sums, here, there))
        return pieces

    def backward(self, dlogits: Any, on_closed: Callable[[int, int], None] | None = None, add: bool = False,
                 on_layer: Callable[[int], None] | None = None,
                 open_grads: Callable[[int], None] | None = None) -> None:
        """Write the gradient of the last forward into `grads`, last layer first.

        Local. `dlogits` is only read.

        Parameters
        ----------
        dlogits : (n, sizes[-1]) gradient of the summed loss by the logits of the last `forward`.
        on_closed : called as on_closed(start, stop) when grads[start:stop] is final: adjacent ranges from the end of
            the vector to 0, padding included, which together cover it once.
        add : add to `grads` instead of overwriting it (micro-batches after the first).
        on_layer : called as on_layer(layer) when nothing is left to do for `layer`.
        open_grads : called as open_grads(layer) before the gradient of `layer` is written.
        """
        assert not (add and isinstance(self._grads, list)), "gradients by layer are added up by the caller"
        enter = self._how[-1]
        ops, kind, rate = self.ops, self._kind, self.spec.dropout
        rows = dlogits.shape[0]
        assert self._x is not None and self._x.shape[0] == rows, "backward follows a forward of the same rows"
        key = (rows, add, self._dropped)
        dout = dz = dlogits
        for hidden, x, w, db, dx, pieces, layer in self._backward_plans.get(key) or self._plan_backward(*key):
            if layer in self._again:
                self._run_again(layer)
            if enter is not None and self.spec.reads_in_backward(layer):
                enter(layer)
            if open_grads is not None:
                open_grads(layer)
            residual = False
            if hidden is None:
                ops.column_sum(dz, db)
            else:
                dout, dz, f, pre, mask, norm, residual = hidden
                da = dout
                if mask is not None:
                    ops.dropout(dout, mask, rate, dz)
                    da = dz
                if norm is None:
                    ops.activation_backward(kind, da, f, pre, dz, db)
                else:
                    z, gamma, mean, rstd, dgamma, dbeta = norm
                    ops.activation_backward(kind, da, f, pre, dz)
                    ops.layer_norm_backward(dz, z, gamma, mean, rstd, dz, dgamma, dbeta)
                    ops.column_sum(dz, db)
            inputs = self._x if x is None else x
            for columns, dw, sums, start, stop in pieces:
                ops.linear_backward(dz if columns is None else dz[:, columns], inputs, None, dw)
                for total, part in sums:
                    ops.add(total, part, total)
                if on_closed is not None:
                    on_closed(start, stop)
            if dx is not None:
                ops.linear_backward(dz, None, w, None, dx)
                if residual:
                    ops.add(dx, dout, dx)
            if on_layer is not None:
                on_layer(layer)


def _remember(plans: dict, key: Any, plan: list) -> None:
    """Keep `plan`, and forget the oldest when there are too many."""
    if len(plans) >= PLANS_KEPT:
        del plans[next(iter(plans))]
    plans[key] = plan
