"""Quotas are exact, every prefix is near its share, and nothing is walked."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data.blend import DEVIATION_BOUND, Interleave, apportion

QUOTAS = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any)


@given(total=st.integers(0, 10**12), weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=64))
@settings(max_examples=150, deadline=None)
def test_quotas_sum_up_and_stay_within_one_of_their_share(total, weights):
    quotas = apportion(total, weights)
    whole = sum(map(Fraction, weights))
    assert sum(quotas) == total
    assert all(abs(q - Fraction(w) * total / whole) < 1 for q, w in zip(quotas, weights, strict=True))


def test_quotas_of_known_cases():
    assert apportion(10, [0.5, 0.3, 0.2]) == [5, 3, 2]
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]  # a tie: the earlier one
    assert apportion(1, [0.4, 0.6]) == [0, 1]
    assert apportion(2 * 10**15 + 1, [1.0, 1.0]) == [10**15 + 1, 10**15]


@given(quotas=QUOTAS)
@settings(max_examples=200, deadline=None)
def test_every_quota_is_used_up_exactly_and_counts_agree_with_the_draws(quotas):
    blend, counts = Interleave(quotas), [0] * len(quotas)
    for draw in range(sum(quotas)):
        assert blend.counts(draw) == counts
        member, before = blend.locate(draw)
        assert before == counts[member]
        counts[member] += 1
    assert counts == quotas


@given(quotas=QUOTAS, times=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_it_repeats_past_its_end(quotas, times):
    blend, total = Interleave(quotas), sum(quotas)
    for draw in range(0, total, 7):
        member, before = blend.locate(draw)
        assert blend.locate(draw + times * total) == (member, before + times * quotas[member])


def _worst(quotas: list[int]) -> float:
    """The largest distance of any prefix from any data set's share, by walking."""
    blend, total, counts, worst = Interleave(quotas), sum(quotas), [0] * len(quotas), 0.0
    for draw in range(total):
        counts[blend.locate(draw)[0]] += 1
        worst = max(worst, max(abs(c - (draw + 1) * q / total) for c, q in zip(counts, quotas, strict=True)))
    return worst


def test_prefixes_stay_within_the_stated_bound():
    rng, worst = random.Random(0), 0.0
    for _ in range(150):
        spread = rng.choice([0, 1, 5, 20])
        weights = [rng.random() ** spread + 1e-9 for _ in range(rng.randint(1, 64))]
        worst = max(worst, _worst(apportion(rng.randint(1, 1500), weights)))
    assert 1.0 < worst < DEVIATION_BOUND  # near enough to the bound that the test could fail


def test_the_deepest_trees_hold_the_bound():
    """Huffman's tree is deepest, and the proof tightest, for quotas that grow like Fibonacci numbers."""
    assert _worst([1, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144]) < DEVIATION_BOUND
    assert _worst([2**k for k in range(11)]) < DEVIATION_BOUND
    assert _worst([1000, 1]) <= 0.5


@pytest.mark.parametrize("members", [2, 16, 64])
def test_far_draws_cost_no_walk(members):
    """10**15 draws by hand would never end; prefix counts there are still exact."""
    rng = random.Random(members)
    quotas = apportion(10**15, [rng.random() for _ in range(members)])
    blend = Interleave(quotas)
    assert blend.counts(10**15) == quotas
    for draw in [rng.randrange(10**15) for _ in range(200)]:
        member, before = blend.locate(draw)
        after = blend.counts(draw + 1)
        assert sum(after) == draw + 1
        assert blend.counts(draw)[member] == before == after[member] - 1
