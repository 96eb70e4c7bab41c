"""The keyed permutation: a bijection on every range, alike for one index and an array, and well mixed."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data.permutation import key_of, permute

KEYS = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 6000), key=KEYS)
@settings(max_examples=150, deadline=None)
def test_is_a_bijection_on_any_range(size, key):
    everything = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(everything), np.arange(size))


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 4095, 4096, 4097, 2**20 - 1, 2**20, 2**20 + 1])
def test_is_a_bijection_beside_powers_of_two(size):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key_of("size", size))), np.arange(size))


@given(size=st.integers(1, 2**62), key=KEYS, data=st.data())
@settings(max_examples=200, deadline=None)
def test_one_index_and_an_array_agree(size, key, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
    array = permute(np.array(indices, np.int64), size, key)
    assert array.dtype == np.int64
    assert array.tolist() == [permute(i, size, key) for i in indices]
    assert all(0 <= number < size for number in array.tolist())


@pytest.mark.parametrize("size", [2**40 - 1, 2**40, 2**40 + 1, 3 * 2**39, 2**62])
def test_huge_ranges_are_hit_once_and_evenly(size):
    indices = np.concatenate([np.arange(100_000), np.arange(size - 100_000, size)])
    numbers = permute(indices, size, key_of("huge"))
    assert np.unique(numbers).size == indices.size
    assert numbers.min() >= 0
    assert numbers.max() < size
    # 16 equal slices of the range: chi-square with 15 degrees of freedom is below 50 but for 1 key in 100,000.
    counts = np.bincount((numbers // -(-size // 16)).astype(int), minlength=16)
    assert ((counts - indices.size / 16) ** 2 / (indices.size / 16)).sum() < 50


def test_an_array_keeps_its_shape():
    square = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert np.array_equal(permute(square, 12, 5).ravel(), permute(square.ravel(), 12, 5))
    assert permute(np.zeros((0, 2), np.int64), 12, 5).shape == (0, 2)


def test_outside_the_range_is_refused():
    for index in (-1, 10, np.array([3, 10]), np.array([-1])):
        with pytest.raises(IndexError):
            permute(index, 10, 1)
    with pytest.raises(IndexError):
        permute(0, 0, 1)


@pytest.mark.parametrize("size", [16, 64, 100, 1000])
def test_neighbours_part_as_often_as_chance_says(size):
    """A random permutation leaves two pairs of neighbours adjacent and one index in place, on average."""
    keys = 200_000 // size
    together = in_place = 0
    for key in range(keys):
        numbers = permute(np.arange(size), size, key_of("mix", key))
        together += int((np.abs(np.diff(numbers)) == 1).sum())
        in_place += int((numbers == np.arange(size)).sum())
    expected = 2 * (size - 1) / size * keys
    assert abs(together - expected) < 4.5 * math.sqrt(expected)  # 4.5 standard deviations: 1 in 150,000
    assert abs(in_place - keys) < 4.5 * math.sqrt(keys)


def test_small_ranges_reach_every_arrangement_alike():
    keys = 12_000
    found = Counter(tuple(permute(np.arange(4), 4, key_of(k)).tolist()) for k in range(keys))
    expected = keys / 24
    assert len(found) == 24
    assert sum((n - expected) ** 2 / expected for n in found.values()) < 60  # 23 degrees of freedom


def test_keys_are_unrelated():
    size = 5000
    permutations = [permute(np.arange(size), size, key_of("seed", epoch)) for epoch in range(40)]
    for a, b in itertools.pairwise(permutations):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(size)
        assert abs(np.corrcoef(a[1:], b[:-1])[0, 1]) < 4.5 / math.sqrt(size)


def test_one_bit_of_the_key_changes_everything():
    size = 5000
    a, b = (permute(np.arange(size), size, key) for key in (8, 9))
    assert (a == b).sum() < 10


def test_the_key_depends_on_every_part_and_never_changes():
    assert key_of("block", 1, "ab", 2) == 18031614768182999585
    keys = {
        key_of(*p) for p in (("block", 1, "ab", 2), ("block", 1, "ab", 3), ("block", 1, "a", "b2"), ("block", "1ab", 2))
    }
    assert len(keys) == 4


def test_the_order_never_changes_between_versions():
    """A checkpoint of an older version must go on in its own order: these numbers are a promise."""
    assert permute(np.arange(10), 10, 1234).tolist() == [3, 8, 4, 2, 6, 9, 7, 1, 0, 5]
    assert permute(10**12, 2 * 10**12, 1234) == 1534637497567
