"""Narrow formats: rounding within their bound, ties to even, NaN and infinities, exactly the promised bytes.

Each test runs on the NumPy form and on the C kernels, and the two are compared bit by bit.
"""

import tracemalloc

import numpy as np
import pytest

from hpcmlp import config
from hpcmlp.comm import wire
from hpcmlp.comm.wire import BLOCK, FORMATS, WIRES, make_format

LENGTHS = (0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 1009, 100_003)


@pytest.fixture(params=[False, True], ids=["numpy", "fused"], autouse=True)
def form_of(request, monkeypatch):
    """Every format of a test takes the path of the parameter, as HPCMLP_FUSED and a missing compiler decide it."""
    if request.param and wire._fused is None:
        pytest.skip("the C extension is not built")
    monkeypatch.setenv("HPCMLP_FUSED", str(int(request.param)))
    return request.param


def there_and_back(name, values):
    form = make_format(name, max(1, values.size))
    data = np.full(form.num_bytes(values.size), 0xAA, np.uint8)
    before = values.copy()
    out = np.full(values.size, 7, np.float32)
    with np.errstate(invalid="ignore"):
        form.encode(values, data)
        form.decode(data, out)
    np.testing.assert_array_equal(values, before)       # encode leaves its input
    assert out.dtype == np.float32
    return out


def bound(name, values):
    """The largest rounding error of each value, as the module states it."""
    size = np.abs(values.astype(np.float64))
    if name == "bf16":
        return size * 2.0**-8
    if name == "float16":
        return size * 2.0**-11 + 2.0**-25
    padded = np.zeros(-(-size.size // BLOCK) * BLOCK)
    padded[:size.size] = size
    blocks = padded.reshape(-1, BLOCK).max(axis=1, initial=0)
    return np.repeat(blocks, BLOCK)[:size.size] / 254 * (1 + 1e-6)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_stays_within_the_stated_bound(name, n):
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    error = np.abs(there_and_back(name, values).astype(np.float64) - values)
    assert (error <= bound(name, values)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_of_mixed_magnitudes_nothing_finite_becomes_infinite(name):
    random = np.random.default_rng(5)
    values = random.standard_normal(4000) * 10.0 ** random.integers(-44, 38, 4000)
    values = np.concatenate([values, [0.0, -0.0, 1e-45, -1e-45, 3.38e38, -3.38e38]]).astype(np.float32)
    if name == "int8":
        values[-1] = np.finfo(np.float32).max
    got = there_and_back(name, values)
    assert np.isfinite(got).all()
    if name == "float16":
        values = np.clip(values, -65504, 65504)
    if name != "bf16":  # whose error below 2**-126 is absolute
        assert (np.abs(got.astype(np.float64) - values) <= bound(name, values) + 1.2e-38).all()
    assert not there_and_back(name, np.zeros(300, np.float32)).any()


def test_bf16_rounds_to_nearest_with_ties_to_even():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000, 0x7F7FFFFF, 0x00008000, 0x00018000],
                    np.uint32)
    expected = np.array([0x3F800000, 0x3F820000, 0x3F810000, 0x3F800000, 0xBF800000, 0x7F800000, 0x00000000,
                         0x00020000], np.uint32)
    np.testing.assert_array_equal(there_and_back("bf16", bits.view(np.float32)).view(np.uint32), expected)


@pytest.mark.parametrize("name", ["bf16", "float16"])
def test_every_number_of_the_format_comes_back_unchanged(name):
    halves = np.arange(2**16, dtype=np.uint16)
    if name == "bf16":
        values = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        values = halves.view(np.float16).astype(np.float32)
    got = there_and_back(name, values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), values[~nan].view(np.uint32))
    assert np.isnan(got[nan]).all()


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x7FC00000])
@pytest.mark.parametrize("name", FORMATS)
def test_every_nan_stays_a_nan(name, bits):
    values = np.ones(2 * BLOCK, np.float32)
    values.view(np.uint32)[3] = bits
    got = there_and_back(name, values)
    assert np.isnan(got[3]) and (got[BLOCK:] == 1).all()
    assert np.isnan(got[:BLOCK]).all() if name == "int8" else (got[4:] == 1).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_an_infinity_is_seen_behind_the_wire(name, bad):
    values = np.ones(2 * BLOCK, np.float32)
    values[7], values[8] = bad, 1e30
    got = there_and_back(name, values)
    assert np.isnan(got[7]) if name == "int8" else got[7] == bad
    assert (got[BLOCK:] == 1).all()


def test_bytes_are_half_or_a_quarter_and_the_scales():
    for n in LENGTHS:
        assert make_format("bf16", 1).num_bytes(n) == make_format("float16", 1).num_bytes(n) == 2 * n
        assert make_format("int8", 1).num_bytes(n) == n + 4 * -(-n // BLOCK)


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_that_grows_with_the_array_is_allocated(name):
    values = np.random.default_rng(1).standard_normal(200_001).astype(np.float32)
    form = make_format(name, values.size)
    data, out = np.empty(form.num_bytes(values.size), np.uint8), np.empty_like(values)
    form.encode(values, data)
    tracemalloc.start()
    form.encode(values, data)
    form.decode(data, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Casts go through NumPy's own buffers of 8192 elements.
    assert peak < 150_000


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", FORMATS)
def test_adding_is_decoding_and_adding(name, n):
    random = np.random.default_rng(n)
    form, values = make_format(name, max(1, n)), random.standard_normal(n).astype(np.float32)
    data, decoded = np.empty(form.num_bytes(n), np.uint8), np.empty(n, np.float32)
    form.encode(random.standard_normal(n).astype(np.float32), data)
    form.decode(data, decoded)
    expected = values + decoded
    form.add(data, values)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_with_a_rest_loses_nothing(name, n):
    random = np.random.default_rng([n, 1])
    form, values = make_format(name, max(1, n)), random.standard_normal(n).astype(np.float32)
    rest, data = (1e-3 * random.standard_normal(n)).astype(np.float32), np.empty(form.num_bytes(n), np.uint8)
    expected = values + rest
    form.round(values, rest, data)
    np.testing.assert_array_equal(values, expected)
    decoded = np.empty(n, np.float32)
    form.decode(data, decoded)
    assert (np.abs(rest.astype(np.float64)) <= bound(name, expected) + 2.0**-23 * np.abs(expected)).all()
    np.testing.assert_allclose(decoded.astype(np.float64) + rest, expected, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e-41])
@pytest.mark.parametrize("name", FORMATS)
def test_a_rest_that_is_not_finite_or_below_the_normal_numbers_becomes_zero(name, bad):
    form, values, rest = make_format(name, 300), np.zeros(300, np.float32), np.zeros(300, np.float32)
    values[5], rest[6] = bad, bad
    with np.errstate(invalid="ignore"):
        form.round(values, rest, np.empty(form.num_bytes(300), np.uint8))
    assert not rest.any() and values.view(np.uint32)[5] == np.float32(bad).view(np.uint32)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", FORMATS)
def test_going_towards_a_target_is_one_rounding_of_the_way(name, n):
    random = np.random.default_rng([n, 2])
    form, replica = make_format(name, max(1, n)), random.standard_normal(n).astype(np.float32)
    target, data = random.standard_normal(n).astype(np.float32), np.empty(form.num_bytes(n), np.uint8)
    follower = replica.copy()
    for _ in range(4):
        way = target - replica
        values = target.copy()
        form.towards(values, replica, data)
        np.testing.assert_array_equal(replica, target)      # the two have changed places
        replica, values = values, replica
        form.add(data, follower)
        np.testing.assert_array_equal(follower, replica)    # who hears the message has the bits of who sent it
        error = np.abs(replica.astype(np.float64) - target)
        assert (error <= bound(name, way) * (1 + 1e-6) + 2.5e-7 * np.abs(target) + 1e-9).all()
    assert n == 0 or error.max() < 1e-6     # what was lost is sent in the next call


@pytest.mark.parametrize("values", ["normal", "every magnitude", "every bit"])
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_and_numpy_give_the_same_bits(form_of, name, values):
    if not form_of:
        return  # one comparison is enough
    for n in LENGTHS:
        random = np.random.default_rng([n, 3])
        if values == "every bit":
            own = random.integers(0, 2**32, n, np.uint32).view(np.float32)
        else:
            own = (random.standard_normal(n) * 10.0 ** random.integers(-44, 37, n)).astype(np.float32)
            own = random.standard_normal(n).astype(np.float32) if values == "normal" else own
        other = (1e-2 * random.standard_normal(n)).astype(np.float32)
        found = []
        for fused in (False, True):
            form = make_format(name, max(1, n), fused)
            a, b, c, rest, replica = own.copy(), own.copy(), other.copy(), other.copy(), other.copy()
            messages = [np.zeros(form.num_bytes(n), np.uint8) for _ in range(3)]
            decoded = [np.empty(n, np.float32) for _ in messages]
            with np.errstate(all="ignore"):
                form.encode(own, messages[0])
                form.round(a, rest, messages[1])
                form.towards(b, replica, messages[2])
                form.add(messages[0], c)
                for message, into in zip(messages, decoded, strict=True):
                    form.decode(message, into)
            found.append([a, b, c, rest, replica, *decoded])
        for plain, kernel in zip(*found, strict=True):
            nan = np.isnan(plain)
            np.testing.assert_array_equal(np.isnan(kernel), nan)
            np.testing.assert_array_equal(kernel.view(np.uint32)[~nan], plain.view(np.uint32)[~nan])


def test_kernels_refuse_what_does_not_fit(form_of):
    if not form_of:
        return
    form, values = make_format("int8", 300), np.zeros(300, np.float32)
    right = np.zeros(form.num_bytes(300), np.uint8)
    for data, arrays in ((right[:-1], (values,)), (right, (values.astype(np.float64),)), (right, (values[::2],)),
                         (np.zeros(right.size + 1, np.uint8)[1:], (values,)), (right.view(np.int8), (values,))):
        with pytest.raises(ValueError):
            form.encode(*arrays, data)
    with pytest.raises(ValueError):
        form.round(values, values[:-1], right)
    right.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        form.encode(values, right)


def test_the_options_are_the_formats():
    assert config.WIRES == WIRES
