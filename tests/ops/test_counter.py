"""The counter-based bits: one definition for integers, arrays and C, uniform, and independent of the split of rows."""

import numpy as np
import pytest

from hpcmlp.ops import counter
from hpcmlp.ops.plain import PlainOps


def test_mix64_is_splitmix64():
    # first outputs of the reference generator (Vigna, splitmix64.c) from the states 0 and 1234567
    assert counter.mix64(0) == 0xE220A8397B1DCDAF
    assert counter.mix64(1234567) == 6457827717110365317


def test_arrays_and_integers_give_the_same_keys():
    words = np.array([0, 1, 5, 2**32, 2**63, 2**64 - 1], np.uint64)
    keys = counter.mix64(3, words, 9)
    assert keys.dtype == np.uint64
    assert keys.tolist() == [counter.mix64(3, int(word), 9) for word in words]
    assert counter.mix64(np.int64(7), np.uint64(8)) == counter.mix64(7, 8)
    assert counter.mix64(-1) == counter.mix64(2**64 - 1)
    assert counter.mix64_array(counter.mix64(3), words).tolist() == counter.mix64(3, words).tolist()


def test_the_order_of_the_words_matters():
    assert len({counter.mix64(a, b) for a in range(50) for b in range(50)}) == 2500


def test_signed_arrays_are_refused():
    with pytest.raises(TypeError, match="uint64"):
        counter.mix64(1, np.arange(3))


def test_row_keys_do_not_depend_on_where_the_rows_begin():
    whole = counter.row_keys(1, 2, 3, 0, 100)
    assert counter.row_keys(1, 2, 3, 40, 7).tolist() == whole[40:47].tolist()
    assert counter.row_keys(1, 2, 3, 40, 0).size == 0
    assert counter.row_keys(1, 2, 3, 5, 1)[0] == counter.mix64(1, 2, 3, 5)


def test_bits_are_uniform_over_rows_columns_and_bit_positions():
    bits = counter.uniform_bits(counter.row_keys(1, 0, 0, 0, 1000), 1000)
    assert bits.dtype == np.uint32
    sigma = 0.5 / 1000**0.5
    for axis in (0, 1):
        share = (bits >> np.uint32(31)).mean(axis=axis)
        assert abs(share.mean() - 0.5) < 0.005 and 0.8 * sigma < share.std() < 1.2 * sigma
    for position in range(32):
        assert abs(((bits >> np.uint32(position)) & np.uint32(1)).mean() - 0.5) < 0.0025
    high = bits.astype(np.float64) / 2**32 - 0.5
    for one, other in ((high[:, :-1], high[:, 1:]), (high[:-1], high[1:])):
        assert abs((one * other).mean() * 12) < 0.005  # neighbours are not correlated


@pytest.mark.parametrize("rate, wanted", [(0.0, 0), (0.5, 2**31), (1.0, 2**32 - 1)])
def test_threshold(rate, wanted):
    assert counter.threshold(rate) == wanted


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (13, 7), (70, 300), (3, 9001)])
def test_masks_are_the_same_on_every_side_and_for_every_split_of_the_rows(host_ops, shape):
    n, d = shape
    wanted = np.empty(shape, np.bool_)
    PlainOps().dropout_mask(wanted, 0.3, 12, 2**33, 1, 1000)
    for dtype in (np.bool_, np.uint8):
        whole, parts = np.full(shape, 1, dtype), np.full(shape, 1, dtype)
        host_ops.dropout_mask(whole, 0.3, 12, 2**33, 1, 1000)
        for start, stop in ((0, n // 3), (n // 3, n // 2), (n // 2, n)):
            host_ops.dropout_mask(parts[start:stop], 0.3, 12, 2**33, 1, 1000 + start)
        assert (whole == wanted).all() and (parts == wanted).all()


def test_masks_differ_between_seeds_steps_and_layers_and_keep_the_right_share(host_ops):
    masks = []
    for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)):
        masks.append(np.empty((200, 300), np.bool_))
        host_ops.dropout_mask(masks[-1], 0.2, *key, 0)
        assert abs(masks[-1].mean() - 0.8) < 0.01
    for other in masks[1:]:
        assert abs((masks[0] == other).mean() - 0.68) < 0.01  # 0.8^2 + 0.2^2: independent
