"""The state on disk is plain numbers, comes back equal, and an edited one is refused."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data.order import next_batch
from megatron_steel.data.order_json import from_json
from megatron_steel.data.segments import Member, plan, skip
from megatron_steel.errors import SteelError

L = 8
BLENDS = [
    [Member("a", "aa", 41 * L)],
    [Member("a", "aa", 41 * L), Member("b", "bb", 26 * L)],
    [Member("a", "aa", 41 * L, 0.1), Member("b", "bb", 26 * L, 1 / 3)],
]


def _long_story():
    state = plan(None, BLENDS[2], L, 4, 100, seed=1)
    state = next_batch(skip(state, 5, 9), 20)[1]
    state = next_batch(plan(state, BLENDS[1], L, 4, 100, seed=1), 20)[1]
    return skip(next_batch(plan(state, BLENDS[0], 11, 4, 200, seed=1), 20)[1], 70, 80)


@given(story=st.lists(st.tuples(st.sampled_from(BLENDS), st.sampled_from([L, 11]), st.integers(1, 30)), min_size=1))
@settings(max_examples=60, deadline=None)
def test_round_trip_goes_on_alike(story):
    state = None
    for members, length, count in story:
        wanted = count + (state.trained_samples if state else 0)
        state = next_batch(plan(state, members, length, 4, wanted, seed=-3), count)[1]
        again = from_json(json.loads(json.dumps(state.to_json())), "here")
        assert again == state
        assert [again.locate(n) for n in range(state.next_sample)] == [
            state.locate(n) for n in range(state.next_sample)
        ]


def test_state_is_a_few_plain_numbers():
    text = json.dumps(_long_story().to_json())
    assert len(text) < 3000
    assert "prefix" not in text
    assert from_json(json.loads(text), "here").skipped == ((5, 9), (70, 80))


def _edit(tree, path, value):
    for part in path[:-1]:
        tree = tree[part]
    if value is KeyError:
        del tree[path[-1]]
    else:
        tree[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["seed"], KeyError),
        (["seed"], "1"),
        (["next_sample"], -1),
        (["next_sample"], 1.5),
        (["next_sample"], True),
        (["segments"], []),
        (["segments"], 3),
        (["segments", 0, "first_sample"], 1),
        (["segments", 1, "first_sample"], 0),
        (["segments", 1, "first_sample"], 1000),
        (["segments", 1, "samples"], 7),
        (["segments", 0, "samples"], 10),  # ends before the next begins
        (["segments", 0, "sequence_length"], 0),
        (["segments", 0, "sequence_length"], 9),
        (["segments", 0, "weights"], {"aa": 1.0}),
        (["segments", 0, "weights", "aa"], 0.2),
        (["segments", 0, "weights", "aa"], float("nan")),
        (["segments", 0, "weights", "aa"], 0),
        (["segments", 0, "tokens", "aa"], 10),
        (["segments", 0, "tokens"], {}),
        (["segments", 1, "drawn", "aa"], [0, 1]),
        (["segments", 1, "drawn", "aa"], [0]),
        (["segments", 2, "drawn"], {}),
        (["skipped"], [[9, 5]]),
        (["skipped"], [[5, 9], [8, 12]]),
        (["skipped"], [5, 9]),
        (["skipped"], [[5, 9], [60, 80]]),  # the next sample, 64, inside
    ],
)
def test_an_edited_state_is_refused(path, value):
    tree = json.loads(json.dumps(_long_story().to_json()))
    assert from_json(copy.deepcopy(tree), "here") == _long_story()
    _edit(tree, path, value)
    with pytest.raises(SteelError, match="the data order is damaged") as caught:
        from_json(tree, "checkpoints/step-00000010")
    assert caught.value.where == "checkpoints/step-00000010"


@pytest.mark.parametrize("tree", [None, [], "x", {"seed": 1}])
def test_what_is_no_state_is_refused(tree):
    with pytest.raises(SteelError, match="damaged"):
        from_json(tree, "here")
