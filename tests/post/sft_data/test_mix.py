"""The mixture: exact counts, every row once, the same rows whatever else is drawn."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.errors import SteelError
from megatron_steel.post.sft_data.mix import mix


@dataclass(frozen=True)
class Want:
    ratio: float | None = None
    rows: int | None = None
    weight: float | None = None
    type: str = "set"


def _keys(*counts):
    every = np.random.default_rng(3).permutation(np.arange(sum(counts), dtype=np.uint64) * 7919)
    return np.split(every, np.cumsum(counts)[:-1])


@pytest.mark.parametrize(
    ("wanted", "drawn"),
    [
        ([Want(), Want()], [100, 40]),
        ([Want(ratio=0.2), Want()], [20, 40]),
        ([Want(ratio=70 / 340), Want(rows=13)], [21, 13]),
        ([Want(weight=4), Want(weight=1)], [100, 25]),
        ([Want(weight=0.8), Want(weight=0.8)], [40, 40]),
        ([Want(weight=1), Want(weight=3)], [13, 40]),
    ],
)
def test_counts(wanted, drawn):
    keys = _keys(100, 40)
    mixture = mix(keys, keys, wanted)
    assert (mixture.usable, mixture.drawn) == ([100, 40], drawn)
    assert len(mixture.order) == len(set(mixture.order.tolist())) == sum(drawn)
    assert [int((mixture.order < 100).sum()), int((mixture.order >= 100).sum())] == drawn


def test_more_rows_than_there_are():
    with pytest.raises(SteelError, match="41 rows of set are wanted and 40 different ones are usable"):
        mix(_keys(40), _keys(40), [Want(rows=41)])


def test_weights_that_leave_a_set_without_a_row():
    with pytest.raises(SteelError, match="none of the 40 usable rows of small is drawn"):
        mix(_keys(100, 40), _keys(100, 40), [Want(weight=1000), Want(weight=1, type="small")])


def test_equal_rows_count_once_and_for_the_first_set():
    first, second = np.array([5, 9, 5], np.uint64), np.array([9, 1], np.uint64)
    mixture = mix([first, second], [first, second], [Want(), Want()])
    assert (mixture.duplicates, mixture.usable, sorted(mixture.order)) == ([1, 1], [2, 1], [0, 1, 4])


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60, unique=True), st.floats(0.01, 1), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_draw_depends_on_content_alone(values, ratio, random):
    """Another order of rows gives the same rows in the same order, and a larger draw holds a smaller one."""
    keys = np.array(values, np.uint64)
    places = keys * np.uint64(0x9E3779B97F4A7C15)  # odd, so a bijection: no two places are equal
    shuffle = list(range(len(values)))
    random.shuffle(shuffle)
    plain = mix([keys], [places], [Want(ratio=ratio)])
    other = mix([keys[shuffle]], [places[shuffle]], [Want(ratio=ratio)])
    assert keys[plain.order].tolist() == keys[shuffle][other.order].tolist()
    assert set(plain.order.tolist()) <= set(mix([keys], [places], [Want()]).order.tolist())
    assert plain.drawn == [int(ratio * len(values) + 0.5)]
    assert places[plain.order].tolist() == sorted(places[plain.order].tolist())
