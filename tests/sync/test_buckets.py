"""Buckets and slices cover the flat vector exactly once, for any ranks and sizes."""

import numpy as np
import pytest

from hpcmlp.sync.buckets import ALIGN, PACK, cut, cut_evenly, owned_ranges, part_bounds


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 48, 997, 4096])
def test_parts_cover_a_bucket_in_order_with_aligned_starts(length, size):
    bounds = part_bounds(length, size)
    assert bounds.shape == (size + 1,) and bounds[0] == 0 and bounds[-1] == length
    assert (np.diff(bounds) >= 0).all()
    assert all(b % ALIGN == 0 or b == length for b in bounds)
    assert max(np.diff(bounds)) <= -(-length // size) + ALIGN


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("bucket_elements", [1, 100, 640, 10**9])
def test_slices_of_all_ranks_cover_every_element_once(size, bucket_elements):
    total, starts = 1600, [0, 320, 640, 1280]
    buckets = cut(total, starts, bucket_elements, size)
    counts = np.zeros(total, int)
    for rank in range(size):
        for start, stop in owned_ranges(buckets, rank):
            assert stop > start
            counts[start:stop] += 1
    assert (counts == 1).all()


def test_buckets_follow_backward_and_end_at_layers():
    buckets = cut(1600, [0, 320, 640, 1280], 400, 2)
    assert [(b.start, b.stop) for b in buckets] == [(640, 1600), (0, 640)]
    assert [(b.start, b.stop) for b in cut(1600, [0, 320, 640, 1280], 10**9, 2)] == [(0, 1600)]


def test_buckets_of_the_first_layer_are_small_unless_one_holds_it_all():
    starts = [0, 100, 200, 300, 400, 800, 1200]
    assert [b.start for b in cut(1600, starts, 400, 2, 400, 100)] == [1200, 800, 400, 300, 200, 100, 0]
    assert [b.start for b in cut(1600, starts, 500, 2, 400, 150)] == [800, 300, 100, 0]
    assert [b.start for b in cut(1600, starts, 2000, 2, 400, 100)] == [0]


@pytest.mark.parametrize("size_total", (0, 16, 128, 1000, 4096, 10000))
@pytest.mark.parametrize("size", (1, 2, 3))
@pytest.mark.parametrize("bucket_mb", (1e-9, 0.001, 8.0))
def test_even_buckets_cover_the_vector_once_whatever_the_layers(size_total, size, bucket_mb):
    buckets = cut_evenly(size_total, bucket_mb, size)
    covered = [k for bucket in reversed(buckets) for k in range(bucket.start, bucket.stop)]
    assert covered == list(range(size_total))
    elements = max(PACK, int(bucket_mb * 2**20) // 4 // PACK * PACK)
    assert all(bucket.start % PACK == 0 and bucket.stop - bucket.start < 2 * elements for bucket in buckets)
    assert len(buckets) == (max(1, size_total // elements) if size_total else 0)
