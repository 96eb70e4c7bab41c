"""When a loss is a spike, and what a roll-back does to the order of data: arithmetic, without an engine."""

import json
import math
import random

import pytest

from megatron_steel.checkpoint import commit
from megatron_steel.data.order import next_batch
from megatron_steel.data.segments import Member, plan, skip
from megatron_steel.errors import TrainingError
from megatron_steel.train import spikes as s

BATCH = 8


def _watched(steps: int = 40, noise: float = 0.02) -> s.Spikes:
    """After `steps` steps of a loss that falls slowly from 3, with Gaussian noise."""
    watch, generator = s.Spikes(6.0), random.Random(3)
    for step in range(1, steps + 1):
        assert not watch.seen(step, 3 - 0.001 * step + generator.gauss(0, noise))
    return watch


def test_noise_is_no_spike_over_a_long_run():
    _watched(steps=3000)


def test_three_high_losses_in_a_row_are_one_and_two_are_not():
    watch = _watched()
    assert [watch.seen(41, 3.5), watch.seen(42, 3.5)] == [False, False]
    assert not watch.seen(43, 2.96)
    assert [watch.seen(step, 3.5) for step in (44, 45, 46)] == [False, False, True]
    assert watch.suspects == [44, 45, 46]


def test_one_loss_a_hundredfold_is_one_at_once():
    assert _watched().seen(41, 300.0)


def test_a_falling_loss_and_no_number_are_none():
    watch = _watched()
    before = watch.to_json()
    assert not any(watch.seen(41, x) for x in (math.nan, math.inf, -math.inf))
    assert watch.to_json() == before
    assert not watch.seen(42, 0.1)


def test_nothing_is_judged_before_there_is_enough_to_compare():
    watch = _watched(steps=s.LEAST - 1)
    assert not any(watch.seen(step, 99.0) for step in range(s.LEAST, s.LEAST + 1))


def test_what_was_seen_survives_json_and_judges_alike():
    watch = _watched(steps=200)
    watch.seen(201, 3.5)
    watch.seen(202, 3.5)
    again = s.Spikes(6.0, **json.loads(json.dumps(watch.to_json())))
    assert again == watch
    assert len(again.losses) == s.WINDOW
    assert again.seen(203, 3.5)


def _checkpoints(folder, steps, order):
    """Whole checkpoints with nothing inside but where the data stood."""
    for step in steps:
        facts = {"tokens": 0, "order": next_batch(order, step * BATCH)[1].to_json()}
        commit.write(folder, step, lambda aside: (aside / "engine").mkdir(), facts)


def _order(weight=None):
    return plan(None, [Member("a", "a" * 64, 4000, weight)], 32, BATCH, 60 * BATCH, seed=1)


def _read(order):
    return lambda checkpoint: next_batch(order, checkpoint.step * BATCH)[1]


def _spike(watch, steps):
    for step in steps:
        confirmed = watch.seen(step, 3.5)
    assert confirmed


@pytest.mark.parametrize("weight", [None, 1.0])
def test_the_window_its_target_and_what_comes_after(tmp_path, weight):
    order, watch = _order(weight), _watched()
    _checkpoints(tmp_path, (20, 40, 43), order)
    _spike(watch, (44, 45, 46))
    now = next_batch(order, 46 * BATCH)[1]
    back = s.plan_roll_back(watch, tmp_path, now, _read(order))
    assert back.checkpoint.step == 40  # the update of 43 may be what broke the weights
    assert back.done == {"step": 44, "attempt": 1, "start": 42 * BATCH, "stop": 46 * BATCH}
    assert back.order.skipped == ((42 * BATCH, 46 * BATCH),)
    numbers, end = next_batch(back.order, 20 * BATCH)
    assert numbers.tolist() == [*range(40 * BATCH, 42 * BATCH), *range(46 * BATCH, 64 * BATCH)]
    assert end.locate(numbers[-1])  # what was spent is made up for
    assert [back.order.locate(n) for n in range(60 * BATCH)] == [order.locate(n) for n in range(60 * BATCH)]


def test_again_at_the_same_place_more_goes_and_the_fourth_time_ends_the_run(tmp_path):
    order, watch = _order(), _watched()
    _checkpoints(tmp_path, (20, 40), order)
    windows, now = [], order
    for attempt in (1, 2, 3):
        _spike(watch, (44, 45, 46))
        back = s.plan_roll_back(watch, tmp_path, now, _read(order))
        assert back.done["attempt"] == attempt
        windows.append((back.checkpoint.step, (back.done["stop"] - back.done["start"]) // BATCH))
        watch.back_to(back.checkpoint.step, {**watch.to_json(), "suspects": []}, back.done)
        now = back.order
    # The first window lies in the second, and both in the third: 4 batches, then 10 more, then 34 more.
    assert windows == [(40, 4), (20, 4 + 10), (20, 4 + 10 + 34)]
    _spike(watch, (44, 45, 46))
    with pytest.raises(TrainingError, match="risen again after 3 roll-backs") as caught:
        s.plan_roll_back(watch, tmp_path, now, _read(order))
    assert caught.value.exit_code == 70
    assert caught.value.shared


def test_far_away_is_another_place(tmp_path):
    watch = _watched(steps=200)
    watch.rollbacks.append({"step": 201 - s.SAME_PLACE - 1, "attempt": 3, "start": 0, "stop": 1})
    _spike(watch, (201, 202, 203))
    assert watch.attempt() == 1


def test_no_way_back_before_the_first_checkpoint_or_a_change_of_data(tmp_path):
    order, watch = _order(), _watched()
    _spike(watch, (44, 45, 46))
    now = next_batch(order, 46 * BATCH)[1]
    assert s.plan_roll_back(watch, tmp_path, now, _read(order)) is None
    _checkpoints(tmp_path, (20, 40), order)
    watch.since = 41
    assert s.plan_roll_back(watch, tmp_path, now, _read(order)) is None
    watch.since = 40
    assert s.plan_roll_back(watch, tmp_path, now, _read(order)).checkpoint.step == 40


def test_a_damaged_target_is_passed_over(tmp_path):
    order, watch = _order(), _watched()
    _checkpoints(tmp_path, (20, 40), order)
    (tmp_path / "step-00000040" / "manifest.json").write_text("{")
    _spike(watch, (44, 45, 46))
    back = s.plan_roll_back(watch, tmp_path, next_batch(order, 46 * BATCH)[1], _read(order))
    assert back.checkpoint.step == 20
    assert back.done["start"] == 42 * BATCH


def test_earlier_windows_stay_out_when_the_run_goes_back_behind_them(tmp_path):
    order, watch = _order(), _watched()
    _checkpoints(tmp_path, (20,), order)
    now = skip(next_batch(order, 20 * BATCH)[1], 25 * BATCH, 27 * BATCH)
    now = next_batch(now, 26 * BATCH)[1]  # step 46
    _spike(watch, (44, 45, 46))
    back = s.plan_roll_back(watch, tmp_path, now, _read(order))
    assert back.order.skipped == ((25 * BATCH, 27 * BATCH), (44 * BATCH, 48 * BATCH))


def test_what_was_seen_before_the_data_changed_is_not_taken_back():
    """A run that resumed with other data at step 100 goes back to that checkpoint, whose manifest holds the old losses."""
    watch = s.Spikes(6.0, since=100)
    done = {"step": 105, "attempt": 1, "start": 0, "stop": 8}
    watch.back_to(100, {"losses": [9.0] * 40, "suspects": [], "since": 0}, done)
    assert (watch.since, watch.losses, watch.rollbacks) == (100, [], [done])
    watch.back_to(110, {"losses": [2.0], "suspects": [], "since": 100}, done)
    assert (watch.since, watch.losses) == (100, [2.0])
