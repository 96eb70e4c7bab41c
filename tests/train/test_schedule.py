"""Schedules equal torch's and transformers' own where there is one, and hold at their corners where there is none."""

import itertools

import pytest
import torch
import transformers

from megatron_steel.errors import SteelError
from megatron_steel.recipe import Schedule, from_dict, load_recipe
from megatron_steel.train.schedule import learning_rate, warmup_is_cut


def _rates(total, **schedule):
    return [learning_rate(Schedule(**schedule), 1.0, s, total) for s in range(1, total + 1)]


def _theirs(make, total, first=1):
    """What another library's scheduler sets at its steps `first`, `first` + 1, ... (their step 0 is before the first)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(first + total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step() if len(rates) < first + total else None
    return rates[first:]


HF = {
    "constant": transformers.get_constant_schedule_with_warmup,
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_with_min_lr_schedule_with_warmup,
    "wsd": transformers.get_wsd_schedule,
}


@pytest.mark.parametrize(
    ("ours", "name", "theirs"),
    [
        ({"name": "constant"}, "constant", {}),
        ({"name": "linear"}, "linear", {"num_training_steps": 200}),
        ({"name": "cosine", "min_lr_ratio": 0.1}, "cosine", {"num_training_steps": 200, "min_lr_rate": 0.1}),
        ({"name": "cosine", "horizon_ratio": 1.25}, "cosine", {"num_training_steps": 250, "min_lr_rate": 0.0}),
        ({"name": "wsd", "decay_ratio": 0.2, "min_lr_ratio": 0.1}, "wsd",
         {"num_training_steps": 200, "num_decay_steps": 40, "decay_type": "linear", "min_lr_ratio": 0.1}),
        ({"name": "wsd", "decay_ratio": 0.2, "decay_shape": "sqrt"}, "wsd",
         {"num_training_steps": 200, "num_decay_steps": 40, "decay_type": "1-sqrt"}),
    ],
)  # fmt: skip
def test_equals_transformers(ours, name, theirs):
    """One step later: transformers trains its first step with the rate of step 0, which is 0."""
    if name == "wsd":  # its warm-up begins at the floor
        ours = {**ours, "initial_lr_ratio": ours.get("min_lr_ratio", 0.0)}
    rates = _theirs(lambda o: HF[name](o, num_warmup_steps=20, **theirs), 200)
    assert _rates(200, warmup_steps=20, **ours) == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize(("total", "ratio", "div"), [(100, 0.3, 50), (33, 0.25, 25), (64, 0.5, 10)])
def test_one_cycle_equals_torch(total, ratio, div):
    def make(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=total, pct_start=ratio, div_factor=div,
                                                   cycle_momentum=False)  # fmt: skip

    ours = _rates(total, name="one_cycle", warmup_ratio=ratio, initial_lr_ratio=1 / div, min_lr_ratio=1 / div / 1e4)
    assert ours == pytest.approx(_theirs(make, total, first=0), abs=1e-12)


def test_exponential_decay_is_minicpm_s():
    """0.5^((s - S) / T) from step S on: here S = 160, D = 40 and T = 10."""
    rates = _rates(200, name="wsd", decay_ratio=0.2, decay_shape="exponential", min_lr_ratio=0.5**4)
    assert rates == pytest.approx([min(1.0, 0.5 ** ((s - 160) / 10)) for s in range(1, 201)], abs=1e-12)


def test_warm_up_is_linear_and_reaches_the_peak():
    assert _rates(20, name="constant", warmup_steps=4)[:6] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert _rates(20, name="constant", warmup_ratio=0.2)[:6] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert _rates(20, name="constant", warmup_steps=4, initial_lr_ratio=0.2)[:4] == pytest.approx([0.4, 0.6, 0.8, 1])


@pytest.mark.parametrize("shape", ["linear", "exponential", "sqrt"])
@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_the_last_step_has_the_floor(name, shape):
    rates = _rates(100, name=name, warmup_steps=10, min_lr_ratio=0.1, decay_ratio=0.2, decay_shape=shape)
    assert rates[9] == 1
    assert rates[-1] == pytest.approx(0.1, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_counted_in_tokens_equals_counted_in_steps_where_every_batch_is_alike(name):
    in_tokens = Schedule(name=name, warmup_tokens=10 * 512, min_lr_ratio=0.1)
    rates = [learning_rate(in_tokens, 1.0, s, 100, 512 * s, 512 * 100) for s in range(1, 101)]
    assert rates == pytest.approx(_rates(100, name=name, warmup_steps=10, min_lr_ratio=0.1), abs=1e-12)


def test_a_growing_batch_reaches_the_peak_at_the_same_token():
    schedule = Schedule(name="cosine", warmup_tokens=1000)
    small, large = (learning_rate(schedule, 1.0, step, 100, 500, 9000) for step in (50, 5))
    assert small == large == 0.5


def test_a_run_shorter_than_its_warm_up_is_valid():
    assert _rates(3, name="cosine", warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])
    assert _rates(1, name="one_cycle", warmup_ratio=0.3, initial_lr_ratio=0.1) == pytest.approx([0.0])


def test_a_warm_up_that_never_comes_to_its_peak_is_noticed():
    wsd = Schedule(name="wsd", warmup_steps=9, decay_ratio=0.5)
    assert warmup_is_cut(wsd, 10)
    assert not warmup_is_cut(wsd, 18)
    assert warmup_is_cut(Schedule(warmup_steps=11), 10)
    assert not warmup_is_cut(Schedule(warmup_steps=10), 10)
    assert warmup_is_cut(Schedule(warmup_steps=6, span=(100, 105)), 1000)


def test_what_cannot_be_is_named():
    tree = load_recipe("tiny").to_dict()
    tree["schedule"] |= {"name": "wsd", "decay_shape": "exponential", "min_lr_ratio": 0.0, "warmup_ratio": 0.1}
    with pytest.raises(SteelError) as caught:
        from_dict(tree)
    assert "schedule.min_lr_ratio: an exponential decay never comes to 0" in str(caught.value)
    assert "schedule.warmup_steps, schedule.warmup_ratio set: give one of them" in str(caught.value)


def test_an_override_of_one_warm_up_replaces_the_other():
    schedule = load_recipe("tiny", ["schedule.warmup_tokens=1000"]).schedule
    assert (schedule.warmup_steps, schedule.warmup_tokens) == (0, 1000)
