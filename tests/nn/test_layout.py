"""Tests of nn/layout.py: places, padding, packing and the hash of the logical parameters."""

import hashlib

import numpy as np
import pytest

from hpcmlp.nn.layout import ALIGN, Layout
from hpcmlp.nn.network import NetworkSpec

SHAPES = [("a", (3, 5)), ("b", (16,)), ("c", (1,)), ("d", (0,)), ("e", (17, 2))]


def test_tensors_stand_in_order_on_aligned_starts_without_overlap():
    layout = Layout(SHAPES)
    assert layout.names == ["a", "b", "c", "d", "e"] and layout.shapes == [shape for _, shape in SHAPES]
    assert layout.starts == [0, 16, 32, 48, 48] and layout.size == 48 + 48
    assert layout.num_params == 15 + 16 + 1 + 0 + 34
    for tensor, following in zip(layout.tensors, layout.starts[1:] + [layout.size], strict=True):
        assert tensor.start % ALIGN == 0 and tensor.stop - tensor.start == int(np.prod(tensor.shape))
        assert tensor.stop <= following < tensor.stop + ALIGN


def test_views_share_memory_with_the_vector_and_never_touch_padding():
    layout = Layout(SHAPES)
    flat = np.zeros(layout.size, np.float32)
    for view in layout.views(flat).values():
        view[...] = 1.0
    assert flat.sum() == layout.num_params


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_unpack_is_the_way_back_from_pack(dtype):
    layout, rng = Layout(SHAPES), np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES}
    flat = layout.pack(tensors, dtype)
    assert flat.dtype == dtype
    back = layout.unpack(flat)
    assert list(back) == layout.names
    for name in tensors:
        assert back[name].dtype == dtype and np.array_equal(back[name], tensors[name])
        assert not np.shares_memory(back[name], flat)


def test_pack_names_the_tensor_that_does_not_fit():
    layout = Layout([("a", (2,)), ("b", (3,))])
    with pytest.raises(ValueError, match="tensors b "):
        layout.pack({"a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"tensor b has shape \(2,\).*\(3,\)"):
        layout.pack({"a": np.zeros(2), "b": np.zeros(2)})


def test_sha256_is_that_of_the_logical_float32_bytes_in_order():
    layout, rng = Layout(SHAPES), np.random.default_rng(1)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES}
    raw = b"".join(tensors[name].astype("<f4").tobytes() for name, _ in SHAPES)
    flat = layout.pack(tensors)
    assert layout.sha256(flat) == hashlib.sha256(raw).hexdigest() == layout.sha256(flat.astype(np.float64))
    flat[15] = 7.0  # padding
    assert layout.sha256(flat) == hashlib.sha256(raw).hexdigest()


def test_parts_cover_every_owned_element_of_every_tensor_once():
    layout, rng = Layout(SHAPES), np.random.default_rng(2)
    for _ in range(50):
        cuts = np.sort(rng.integers(0, layout.size + 1, 6))
        ranges = [(int(cuts[i]), int(cuts[i + 1])) for i in (0, 2, 4)]
        owned, counted = np.zeros(layout.size, int), np.zeros(layout.size, int)
        for start, stop in ranges:
            owned[start:stop] = 1
        for index, start, stop in layout.parts(ranges):
            assert layout.tensors[index].start <= start < stop <= layout.tensors[index].stop
            counted[start:stop] += 1
        inside = layout.pack({name: np.ones(shape) for name, shape in SHAPES}, int)
        assert np.array_equal(counted, owned * inside)


def test_network_layout_names_shapes_and_counts():
    spec = NetworkSpec((5, 7, 3), layer_norm=True)
    assert spec.layout().names == ["layers.0.weight", "layers.0.bias", "norms.0.weight", "norms.0.bias",
                                   "layers.1.weight", "layers.1.bias"]
    assert spec.layout().shapes == [(7, 5), (7,), (7,), (7,), (3, 7), (3,)]
    assert spec.layer_params() == [35 + 7 + 7 + 7, 21 + 3] and spec.layout().num_params == sum(spec.layer_params())
    assert NetworkSpec((784, 256, 128, 10)).layout().num_params == 235146
