"""What changes in mid-run moves no past sample, repeats none and loses none."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data.blend import apportion
from megatron_steel.data.order import next_batch
from megatron_steel.data.segments import Member, plan, skip
from megatron_steel.errors import SteelError

L, B = 8, 5
A, NEW, OTHER = Member("a", "aa", 41 * L), Member("n", "nn", 26 * L), Member("o", "oo", 18 * L)  # 40, 25, 17 blocks


def _weighted(**weights):
    by_name = {"a": A, "n": NEW, "o": OTHER}
    return [by_name[name]._replace(weight=weight) for name, weight in weights.items()]


def _train(state, steps):
    """Every place trained, and the state after."""
    places = []
    for _ in range(steps):
        numbers, state = next_batch(state, B)
        places += [state.locate(int(n)) for n in numbers]
    return places, state


CHANGES = {
    "append": ([A, NEW], L, B, 500),
    "append, weighted": (_weighted(a=1, n=2), L, B, 500),
    "replace": ([OTHER], L, B, 500),
    "longer sequences": ([A], 11, B, 500),
    "another batch": ([A], L, 2, 500),
    "longer run": ([A], L, B, 5000),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 7, 8, 19])
def test_past_samples_keep_their_place(change, weighted, steps):
    before = _weighted(a=3, o=1) if weighted else [A]
    start = plan(None, before, L, B, 400, seed=4)
    places, state = _train(start, steps)
    changed = plan(state, *change, seed=4)
    assert changed.next_sample == steps * B
    assert [changed.locate(n) for n in range(steps * B)] == places
    changed.locate(change[3] - 1)  # all that is wanted is planned
    again = plan(dataclasses.replace(changed, next_sample=steps * B + 2), CHANGES["append"][0], L, B, 900, seed=4)
    assert [again.locate(n) for n in range(steps * B + 2)] == [changed.locate(n) for n in range(steps * B + 2)]


@given(steps=st.integers(0, 30), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_appended_data_mixes_with_exactly_what_was_left(steps, seed):
    old, state = _train(plan(None, [A, OTHER], L, B, 1000, seed=seed), steps)
    state = plan(state, [A, OTHER, NEW], L, B, 1000, seed=seed)
    left = state.segments[-2].samples if len(state.segments) > 1 else state.segments[-1].samples
    new = [state.locate(steps * B + i) for i in range(left)]
    for member, n in ((A, 40), (OTHER, 17), (NEW, 25)):
        drawn = [p for p in old + new if p.digest == member.digest]
        assert len(drawn) == len(set(drawn))  # nothing twice
        assert all(c == n for c in Counter(p.epoch for p in drawn).values())  # nothing lost: whole epochs only
    # Old data goes on in its own order, as if nothing had been appended.
    alone = plan(None, [A, OTHER], L, B, 1000, seed=seed)
    for digest in ("aa", "oo"):
        mixed = [p for p in old + new if p.digest == digest]
        unmixed = [p for p in map(alone.locate, range(400)) if p.digest == digest]
        assert mixed == unmixed[: len(mixed)]
    whole = [state.locate(steps * B + left + i) for i in range(82)]
    assert Counter(p.digest for p in whole) == {"aa": 40, "oo": 17, "nn": 25}


def test_new_weights_give_exact_counts_from_where_they_begin():
    old, state = _train(plan(None, _weighted(a=3, n=1), L, B, 200, seed=0), 13)
    state = plan(state, _weighted(a=1, n=1, o=2), L, B, 300, seed=0)
    rest = [state.locate(n) for n in range(65, 300)]
    counts = Counter(p.digest for p in rest)
    assert [counts[d] for d in ("aa", "nn", "oo")] == apportion(235, [1, 1, 2])
    for digest, n in (("aa", 40), ("nn", 25), ("oo", 17)):
        drawn = [p for p in old + rest if p.digest == digest]
        assert [p.epoch for p in drawn] == [i // n for i in range(len(drawn))]  # one epoch after the other
        assert len(set(drawn)) == len(drawn)


def test_a_longer_weighted_run_goes_on_from_the_counters():
    old, state = _train(plan(None, _weighted(a=2, n=1), L, B, 100, seed=0), 20)
    with pytest.raises(IndexError):
        state.locate(100)
    state = plan(state, _weighted(a=2, n=1), L, B, 250, seed=0)
    assert [(s.first_sample, s.samples) for s in state.segments] == [(0, 100), (100, 150)]
    places = old + [state.locate(n) for n in range(100, 250)]
    assert len(set(places)) == 250
    assert Counter(p.digest for p in places) == {"aa": 167, "nn": 83}


def test_what_is_unchanged_or_done_opens_nothing():
    _, state = _train(plan(None, _weighted(a=2, n=1), L, B, 100, seed=0), 20)
    assert plan(state, _weighted(a=2, n=1), L, B, 50, seed=0) is state  # shorter than what is done
    assert plan(state, _weighted(a=2, o=1), L, B, 100, seed=0) is state  # done: other data comes too late
    _, state = _train(plan(None, [A], L, B, 10, seed=0), 30)
    assert plan(state, [A], L, B, 10**9, seed=0) is state


def test_another_seed_is_refused():
    state = plan(None, [A], L, B, 100, seed=1)
    with pytest.raises(SteelError, match=r"began with seed 1.*now says 2") as caught:
        plan(state, [A], L, B, 100, seed=2)
    assert "run.seed=1" in caught.value.remedy


def test_a_data_set_taken_out_and_put_back_goes_on_where_it_was():
    first, state = _train(plan(None, [A, NEW], L, B, 1000, seed=2), 5)
    between, state = _train(plan(state, [NEW, OTHER], L, B, 1000, seed=2), 9)
    state = plan(state, [A], L, B, 1000, seed=2)
    seen = sum(p.digest == "aa" for p in first + between)
    assert 0 < seen < 25
    rest = [state.locate(state.next_sample + i) for i in range(40 - seen)]
    epoch = [p for p in first + between + rest if p.digest == "aa"]
    assert len(set(epoch)) == 40
    assert {p.epoch for p in epoch} == {0}


def _times_predicted(places, tokens):
    counts = [0] * tokens
    for p in places:
        for t in range(p.start + 1, p.start + p.sequence_length + 1):
            counts[t] += 1
    return counts


@given(steps=st.integers(0, 20), other=st.integers(1, 20), seed=st.integers(0, 20))
@settings(max_examples=80, deadline=None)
def test_another_sequence_length_repeats_at_most_one_epoch(steps, other, seed):
    """A token is predicted at most once per epoch begun; the change begins at most one more; nothing is lost."""
    old, state = _train(plan(None, [A], L, B, 10_000, seed=seed), steps)
    state = plan(state, [A], other, B, 10_000, seed=seed)
    epochs_before = -(-len(old) // 40)
    n = (A.tokens - other) // other
    new = [state.locate(state.next_sample + i) for i in range(2 * n)]
    if other == L:
        assert len(set(old + new)) == len(old + new)
        return
    assert [p.epoch for p in new] == [epochs_before] * n + [epochs_before + 1] * n
    assert max(_times_predicted(old, A.tokens)) <= epochs_before
    assert max(_times_predicted(old + new[:n], A.tokens)) <= epochs_before + 1
    starts = sorted(p.start for p in new[:n])
    assert starts == list(range(starts[0], starts[0] + n * other, other))  # the new epoch is whole


def test_an_absent_data_set_begins_a_new_epoch_too_when_the_length_changes():
    first, state = _train(plan(None, [A, NEW], L, B, 1000, seed=2), 5)
    _, state = _train(plan(state, [NEW], 11, B, 1000, seed=2), 1)
    state = plan(state, [A], 11, B, 1000, seed=2)
    assert {p.epoch for p in first} == {0}
    assert state.locate(state.next_sample).epoch == 1


def test_skipped_samples_are_spent_and_a_weighted_blend_goes_on():
    members = _weighted(a=2, n=1)
    plain = plan(None, members, L, B, 60, seed=0)
    state = skip(_train(plain, 4)[1], 25, 32)
    assert [(s.first_sample, s.samples) for s in state.segments] == [(0, 60), (60, 7)]
    assert plan(state, members, L, B, 60, seed=0) is state
    places, state = _train(state, 8)
    assert state.trained_samples == 60
    assert places[:5] + places[5:33] == [plain.locate(n) for n in [*range(20, 25), *range(32, 60)]]
    skipped = {state.locate(n) for n in range(25, 32)}
    assert not skipped & set(places)  # not replaced: they are gone, and their draws count
    assert len({state.locate(n) for n in range(67)}) == 67
    assert plan(state, members, L, B, 60, seed=0) is state  # done


def test_after_a_skip_a_longer_run_still_trains_all_it_wants():
    state = skip(plan(None, _weighted(a=2, n=1), L, B, 60, seed=0), 5, 12)
    _, state = _train(state, 4)
    state = plan(state, _weighted(a=2, n=1), L, B, 100, seed=0)
    places, state = _train(state, 16)
    assert len(set(places)) == 80
    assert state.trained_samples == 100
    assert state.next_sample == state.segments[-1].end == 107


def test_skips_join_and_are_checked():
    state = _train(plan(None, _weighted(a=1), L, B, 100, seed=0), 2)[1]
    state = skip(skip(skip(state, 20, 30), 30, 35), 15, 22)
    assert state.skipped == ((15, 35),)
    assert sum(s.samples for s in state.segments) == 120
    assert skip(state, 16, 20) == state
    for start, stop in ((9, 12), (40, 40), (50, 45), (120, 130)):
        with pytest.raises(SteelError, match="cannot be skipped"):
            skip(state, start, stop)


def test_a_new_segment_replaces_skips_that_were_still_to_come():
    state = skip(plan(None, [A], L, B, 100, seed=0), 3, 6)
    state = skip(state, 20, 30)
    places, state = _train(state, 2)
    state = plan(state, [A, NEW], L, B, 100, seed=0)
    assert state.skipped == ((3, 6),)
    assert state.trained_samples == 10
    assert state.locate(12) == places[-1]
    left = [state.locate(13 + i) for i in range(27 + 25)]
    assert len({p for p in left if p.digest == "aa"}) == 27


HAPPENS = st.one_of(
    st.tuples(st.just("train"), st.integers(1, 9), st.just(0)),
    st.tuples(st.just("skip"), st.integers(0, 30), st.integers(1, 12)),
    st.tuples(st.just("batch"), st.integers(1, 7), st.just(0)),
    st.tuples(st.just("data"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("length"), st.sampled_from([5, 8, 11]), st.just(0)),
)


@given(history=st.lists(HAPPENS, max_size=12), weighted=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_final_order_knows_the_samples_of_every_step(history, weighted):
    """Through appends, other batches, weights and lengths, and samples passed over: also without walking there."""
    mixes = [_weighted(a=3), _weighted(a=1, n=2), _weighted(o=2, n=1)] if weighted else [[A], [A, NEW], [NEW, OTHER]]
    batch, length, members, steps = 4, L, mixes[0], []
    state = plan(None, members, length, batch, 2000, seed=1)
    for what, first, second in [*history, ("train", 5, 0)]:
        if what == "skip":
            start = state.next_sample + first
            state = skip(state, start, start + second)
            continue
        batch = first if what == "batch" else batch
        length = first if what == "length" else length
        members = mixes[first] if what == "data" else members
        state = plan(state, members, length, batch, 2000, seed=1)
        for _ in range(first if what == "train" else 1):
            numbers, after = next_batch(state, batch)
            assert state.after(batch) == after
            state = after
            steps.append(numbers.tolist())
    for number, numbers in enumerate(steps, start=1):
        before, count = state.before_step(number)
        assert next_batch(before, count)[0].tolist() == numbers
    assert state.before_step(len(steps) + 1) == (state, batch)
    with pytest.raises(IndexError, match="the first is 1"):
        state.before_step(0)


def test_shares_are_of_the_newest_segment():
    state = plan(None, _weighted(a=3, n=1), L, 4, 100, seed=0)
    assert state.shares() == {"aa": 0.75, "nn": 0.25}
    _, state = next_batch(state, 8)
    state = plan(state, _weighted(a=1, n=1, o=2), L, 4, 100, seed=0)
    assert state.shares() == {"aa": 0.75, "nn": 0.25}  # nothing has been drawn since
    assert state.after(12).shares() == {"aa": 0.25, "nn": 0.25, "oo": 0.5}
