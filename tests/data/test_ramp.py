"""A batch ramp: counting agrees with walking, samples stay in their places, and a state says it all."""

import itertools
import json
import math

import pytest

from megatron_steel.data.order import next_batch
from megatron_steel.data.order_json import from_json
from megatron_steel.data.ramp import Stage, endless, plan_ramp, samples_of, steps_of
from megatron_steel.data.segments import Member, plan, skip
from megatron_steel.errors import SteelError

L = 8
RAMP = plan_ramp([Stage(2, until_steps=3), Stage(4, until_tokens=15 * L), Stage(6, until_steps=8)], L)


def test_stages_end_after_so_many_steps_or_with_the_step_that_reaches_so_many_tokens():
    assert RAMP == ((6, 2), (18, 4), (30, 6))  # 3 x 2; 3 x 4 reach 15 samples; steps 7 and 8
    assert plan_ramp([], L) == ()
    assert plan_ramp([Stage(4, until_tokens=4 * L + 1)], L) == ((8, 4),)  # one token more is one more step


@pytest.mark.parametrize("stages", [[Stage(2, until_steps=3), Stage(4, until_steps=3)],
                                    [Stage(8, until_steps=2), Stage(4, until_tokens=16 * L)]])  # fmt: skip
def test_a_stage_that_is_over_before_it_begins_is_refused(stages):
    with pytest.raises(ValueError, match="stage 2 is over before it begins"):
        plan_ramp(stages, L)


def _walk(ramp, trained):
    while True:
        yield next(batch for until, batch in ramp if trained < until)
        trained += next(batch for until, batch in ramp if trained < until)


@pytest.mark.parametrize("trained", [0, 2, 6, 10, 7, 29, 30, 99])
def test_counting_agrees_with_walking(trained):
    ramp, walked, total = endless(RAMP, 10), _walk(endless(RAMP, 10), trained), 0
    for steps in range(20):
        assert samples_of(ramp, trained, steps) == total
        batch = next(walked)
        assert steps_of(ramp, trained, total) == (steps, 0)
        assert steps_of(ramp, trained, total + batch - 1) == (steps, batch - 1)
        total += batch


@pytest.fixture(params=[None, 1.0])
def members(request):
    return [Member("a", "aa", 900, request.param), Member("b", "bb", 500, request.param and 2.0)]


def _steps(state, count):
    """(numbers of each step, the state after them)."""
    steps = []
    for _ in range(count):
        numbers, state = next_batch(state, state.batch)
        steps.append(numbers.tolist())
    return steps, state


def test_a_ramp_cuts_the_same_samples_into_other_steps(members):
    plain, ramped = (plan(None, members, L, 10, 200, 5, ramp) for ramp in ((), RAMP))
    assert [plain.locate(n) for n in range(150)] == [ramped.locate(n) for n in range(150)]
    steps, _ = _steps(ramped, 12)
    assert [len(s) for s in steps] == [2, 2, 2, 4, 4, 4, 6, 6, 10, 10, 10, 10]
    assert list(itertools.chain(*steps)) == list(range(70))


@pytest.mark.parametrize("stop", range(1, 10))
def test_a_state_from_within_a_ramp_goes_on_as_if_never_saved(members, stop):
    straight, end = _steps(plan(None, members, L, 10, 160, 5, RAMP), 12)
    done, state = _steps(plan(None, members, L, 10, 160, 5, RAMP), stop)
    again = plan(from_json(json.loads(json.dumps(state.to_json())), "here"), members, L, 10, 160, 5, RAMP)
    rest, at = _steps(again, 12 - stop)
    assert done + rest == straight
    assert at == end


def test_samples_passed_over_move_no_stage_and_each_step_is_found(members):
    """Also over a run that goes on with another ramp, and one that goes on without."""
    state = plan(None, members, L, 10, 160, 5, RAMP)
    steps, state = _steps(state, 4)
    state = skip(state, 14, 25)
    for ramp, batch in ((RAMP, 10), ((*RAMP[:2], (40, 8)), 10), ((), 12)):
        state = plan(state, members, L, batch, 160, 5, ramp)
        more, state = _steps(state, 4)
        steps += more
    assert [len(s) for s in steps] == [2, 2, 2, 4, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 12, 12]
    assert not set(range(14, 25)) & set(itertools.chain(*steps))
    for number, numbers in enumerate(steps, start=1):
        before, batch = state.before_step(number)
        assert next_batch(before, batch)[0].tolist() == numbers


def test_a_state_of_before_there_were_ramps_is_read_and_a_damaged_ramp_refused(members):
    state = plan(None, members, L, 10, 160, 5)
    tree = json.loads(json.dumps(state.to_json()))
    for segment in tree["segments"]:
        assert segment.pop("ramp") == []
    assert from_json(tree, "here") == state
    for ramp in ([[6, 2], [6, 4]], [[0, 2]], [[6.5, 2]], [[6, 0]], [[math.inf, 2]], [6]):
        tree["segments"][0]["ramp"] = ramp
        with pytest.raises(SteelError, match="the data order is damaged"):
            from_json(tree, "here")
