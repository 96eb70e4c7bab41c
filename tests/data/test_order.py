"""A sample number's place: every block once per epoch, exact blends, no table, and the same for ever."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data.blend import DEVIATION_BOUND, apportion
from megatron_steel.data.order import Place, blocks, next_batch
from megatron_steel.data.segments import Member, plan, samples_per_epoch, skip
from megatron_steel.errors import SteelError

L = 8


def _members(*tokens, weights=None):
    weights = weights or [None] * len(tokens)
    return [Member(f"data/{i}", f"digest{i}", t, w) for i, (t, w) in enumerate(zip(tokens, weights, strict=True))]


@given(length=st.integers(1, 40), data=st.data())
@settings(max_examples=150, deadline=None)
def test_an_epoch_uses_every_block_once_and_stays_inside_the_data(length, data):
    tokens = data.draw(st.integers(2 * length, 2 * length + 400))
    state = plan(None, _members(tokens), length, 1, 1, seed=data.draw(st.integers(0, 99)))
    n = (tokens - length) // length
    for epoch in range(3):
        places = [state.locate(epoch * n + i) for i in range(n)]
        offset = min(p.start for p in places)
        assert 0 <= offset < length
        assert sorted(p.start for p in places) == [offset + k * length for k in range(n)]
        assert {p.epoch for p in places} == {epoch}
        assert max(p.start for p in places) + length + 1 <= tokens


def test_epochs_differ_in_order_and_in_cuts():
    state = plan(None, _members(1000 * L), L, 1, 1, seed=1)
    n = 999
    epochs = [[state.locate(e * n + i).start for i in range(n)] for e in range(6)]
    assert len({min(starts) for starts in epochs}) > 2  # offsets
    for a, b in itertools.pairwise(epochs):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    other = plan(None, _members(1000 * L), L, 1, 1, seed=2)
    assert [other.locate(i).start for i in range(n)] != epochs[0]


def test_one_token_short_is_no_block_and_says_so():
    assert blocks(2 * L, L) == 1
    with pytest.raises(SteelError, match=r"sequence longer than the data: 15 tokens.*of 8 need at least 16") as caught:
        plan(None, _members(100, 2 * L - 1), L, 1, 1, seed=0)
    assert caught.value.where == "data/1"
    assert "data.sequence_length=7" in caught.value.remedy
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "there is no data"),
        ([Member("a", "same", 100), Member("b", "same", 100)], "the same data twice: a and b"),
        (_members(100, 100, weights=[1.0, None]), "weights that make no blend"),
        (_members(100, 100, weights=[1.0, 0.0]), "weights that make no blend"),
        (_members(100, weights=[float("nan")]), "weights that make no blend"),
        (_members(0), "sequence longer than the data: 0 tokens"),
    ],
)
def test_impossible_blends_are_refused(members, message):
    with pytest.raises(SteelError, match=message):
        plan(None, members, L, 1, 10, seed=0)


def test_a_run_without_samples_is_refused():
    with pytest.raises(SteelError, match="no sample at all"):
        plan(None, _members(100), L, 1, 0, seed=0)


def test_no_weights_uses_everything_once_and_then_whole_epochs_by_size():
    members = _members(100 * L, 37 * L, 5 * L)
    total = samples_per_epoch(members, L)
    assert total == 99 + 36 + 4
    state = plan(None, members, L, 1, 10, seed=3)
    assert state == plan(None, members, L, 1, 10_000, seed=3)  # the length of the run decides nothing
    for epoch in range(3):
        places = [state.locate(epoch * total + i) for i in range(total)]
        assert len(set(places)) == total
        assert {p.epoch for p in places} == {epoch}
        assert Counter(p.digest for p in places) == {"digest0": 99, "digest1": 36, "digest2": 4}


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8), wanted=st.integers(1, 400), seed=st.integers(0, 9)
)
@settings(max_examples=80, deadline=None)
def test_blend_counts_are_the_exact_apportionment(weights, wanted, seed):
    members = _members(*[(20 + 7 * i) * L for i in range(len(weights))], weights=weights)
    state = plan(None, members, L, 1, wanted, seed=seed)
    quotas, seen = apportion(wanted, weights), Counter()
    for sample in range(wanted):
        seen[state.locate(sample).digest] += 1
        for member, weight in zip(members, quotas, strict=True):
            assert abs(seen[member.digest] - (sample + 1) * weight / wanted) < DEVIATION_BOUND
    assert [seen[m.digest] for m in members] == quotas
    with pytest.raises(IndexError):
        state.locate(wanted)


def test_a_small_set_with_a_large_weight_goes_through_its_epochs_in_turn():
    state = plan(None, _members(11 * L, 1000 * L, weights=[1, 1]), L, 1, 100, seed=0)
    small = [p for p in map(state.locate, range(100)) if p.digest == "digest0"]
    for epoch in range(5):
        part = small[epoch * 10 : (epoch + 1) * 10]
        assert {p.epoch for p in part} == {epoch}
        assert len({p.start for p in part}) == 10


def test_how_the_user_lists_and_scales_decides_nothing():
    members = _members(100 * L, 50 * L, 70 * L, weights=[1, 2, 3])
    state = plan(None, members, L, 4, 90, seed=5)
    moved = [m._replace(prefix="elsewhere/" + m.prefix, weight=m.weight * 2) for m in reversed(members)]
    other = plan(None, moved, L, 4, 90, seed=5)
    assert [state.locate(i) for i in range(90)] == [other.locate(i) for i in range(90)]
    assert plan(state, moved, L, 4, 90, seed=5) is state


@given(
    ranges=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)), max_size=5),
    count=st.integers(1, 20),
    weighted=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_batches_are_the_unskipped_numbers_in_turn(ranges, count, weighted):
    state = plan(None, _members(50 * L, 20 * L, weights=[2, 1] if weighted else None), L, count, 100, seed=0)
    for start, size in ranges:
        state = skip(state, start, start + size)
    spent = {n for start, size in ranges for n in range(start, start + size)}
    unskipped = [n for n in range(400) if n not in spent]
    at = 0
    while at < 100:
        take = min(count, 100 - at)
        numbers, state = next_batch(state, take)
        assert numbers.dtype == np.int64
        assert numbers.tolist() == unskipped[at : at + take]
        at += take
        assert state.trained_samples == at
        assert state.next_sample == numbers[-1] + 1
        assert all(isinstance(state.locate(int(n)), Place) for n in numbers)  # a weighted run still has them all


def test_resume_at_any_step_equals_a_straight_run():
    members = _members(60 * L, 25 * L, weights=[1, 3])
    state = skip(plan(None, members, L, 4, 120, seed=9), 30, 41)
    straight, states = [], [state]
    for _ in range(30):
        numbers, state = next_batch(state, 4)
        straight.append([state.locate(int(n)) for n in numbers])
        states.append(state)
    for step in range(30):
        again = plan(states[step], members, L, 4, 120, seed=9)
        assert again is states[step]
        numbers, after = next_batch(again, 4)
        assert [again.locate(int(n)) for n in numbers] == straight[step]
        assert after == states[step + 1]


def test_a_corpus_of_a_trillion_tokens_needs_no_table():
    tracemalloc.start()
    members = _members(*[10**12 // 16 + 977 * i for i in range(16)], weights=[1 + i % 5 for i in range(16)])
    state = plan(None, members, 2048, 1024, 10**9, seed=1)
    places = [state.locate(10**8 + i) for i in range(2000)]
    numbers, _ = next_batch(plan(None, members[:1], 2048, 1024, 10**9, seed=1), 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    assert len(set(places)) == 2000
    assert all(p.start >= 0 and p.start + 2049 <= 10**12 // 16 + 977 * 15 for p in places)
    assert len(numbers) == 1024
    state.locate(10**9 - 1)


def test_the_order_never_changes_between_versions():
    """A checkpoint of an older version must go on in its own order: these places are a promise."""
    state = plan(None, _members(100 * L, 40 * L, weights=[0.7, 0.3]), L, 4, 200, seed=1234)
    places = [(p.digest[-1], p.epoch, p.start) for p in map(state.locate, (0, 1, 2, 3, 150, 199))]
    assert places == [("0", 0, 93), ("1", 0, 9), ("0", 0, 389), ("0", 0, 237), ("0", 1, 649), ("0", 1, 481)]


def test_counters_say_where_each_data_set_stands():
    state = plan(None, _members(11 * L, 21 * L), L, 1, 300, seed=0)
    for sample in range(0, 70):
        drawn = {"digest0": 0, "digest1": 0}
        for n in range(sample):
            drawn[state.locate(n).digest] += 1
        assert state.drawn_before(sample) == {
            "digest0": divmod(drawn["digest0"], 10),
            "digest1": divmod(drawn["digest1"], 20),
        }
