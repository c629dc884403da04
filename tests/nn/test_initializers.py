"""Tests of nn/initializers.py: variances, bounds, independence of ranks and shapes."""

import numpy as np
import pytest

from hpcmlp.errors import ConfigError
from hpcmlp.nn.initializers import KINDS, initialize
from hpcmlp.nn.network import NetworkSpec

FAN_IN, FAN_OUT = 300, 700
VARIANCE = {"he": 2 / FAN_IN, "glorot": 2 / (FAN_IN + FAN_OUT), "lecun": 1 / FAN_IN, "torch": 1 / (3 * FAN_IN)}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_weights_have_the_variance_and_the_shape_of_their_kind(kind):
    spec = NetworkSpec((FAN_IN, FAN_OUT, 3), layer_norm=True)
    tensors = spec.layout().unpack(initialize(spec, 1, kind))
    w = tensors["layers.0.weight"].astype(float)
    variance = VARIANCE[kind.split("_")[0]]
    assert w.var() == pytest.approx(variance, rel=0.02) and abs(w.mean()) < 0.02 * variance**0.5
    uniform = kind.endswith("uniform") or kind in ("glorot", "torch")
    assert np.abs(w).max() == pytest.approx((3 * variance) ** 0.5, rel=1e-3) if uniform else \
        np.abs(w).max() > 3.5 * variance**0.5
    bias = np.abs(tensors["layers.0.bias"])
    assert 0.9 / FAN_IN**0.5 < bias.max() <= 1.001 / FAN_IN**0.5 if kind == "torch" else not bias.any()
    assert np.all(tensors["norms.0.weight"] == 1.0) and not tensors["norms.0.bias"].any()


@pytest.mark.parametrize(("activation", "same"), [
    ("relu", "torch"), ("leaky_relu", "torch"), ("gelu", "torch"), ("silu", "torch"), ("elu", "torch"),
    ("tanh", "glorot_uniform"), ("sigmoid", "glorot"), ("softplus", "glorot"), ("selu", "lecun_normal")])
def test_auto_follows_the_activation(activation, same):
    spec = NetworkSpec((20, 30, 3), activation)
    assert np.array_equal(initialize(spec, 2), initialize(spec, 2, same))


def test_a_tensor_depends_on_the_seed_and_its_place_alone():
    one, two = NetworkSpec((20, 30, 3)), NetworkSpec((20, 30, 50, 3))
    a, b = (spec.layout().unpack(initialize(spec, 3)) for spec in (one, two))
    assert np.array_equal(a["layers.0.weight"], b["layers.0.weight"])
    other = one.layout().unpack(initialize(one, 4))
    assert not np.any(a["layers.0.weight"] == other["layers.0.weight"])
    assert np.array_equal(initialize(one, 2**63 - 1), initialize(one, 2**63 - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_the_rounded_float64_and_padding_is_zero(kind):
    spec = NetworkSpec((13, 17, 5), layer_norm=True)
    single, double = initialize(spec, 5, kind, np.float32), initialize(spec, 5, kind, np.float64)
    assert single.dtype == np.float32 and np.array_equal(single, double.astype(np.float32))
    layout = spec.layout()
    assert np.array_equal(layout.pack(layout.unpack(single)), single)


def test_an_unknown_kind_is_a_sentence():
    with pytest.raises(ConfigError, match="'xavier' is not known .*glorot"):
        initialize(NetworkSpec(), 0, "xavier")
