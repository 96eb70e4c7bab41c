"""Stages become plain recipes: lengths, what holds on, spans of schedules, and what cannot be."""

import pytest

from megatron_steel.errors import SteelError
from megatron_steel.planner.hardware import parse_cluster
from megatron_steel.planner.plan import plan
from megatron_steel.recipe import from_dict, load_recipe
from megatron_steel.scale import scale
from megatron_steel.stages import described, parts_of, refuse_tokens, to_come
from megatron_steel.train.schedule import learning_rate


def _recipe(stages, **changes):
    tree = {
        "tokenizer": {"path": "t"}, "model": {"type": "llama"}, "data": {"train": "a", "sequence_length": 10},
        "optim": {"lr": 1.0}, "train": {"steps": 100, "global_batch_size": 4, "micro_batch_size": 2}, "stages": stages,
    }  # fmt: skip
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys} if section in tree else keys
    return from_dict(tree)


def test_a_recipe_without_stages_is_its_own_only_part():
    recipe = _recipe([])
    assert [(p.recipe, p.number) for p in parts_of(recipe)] == [(recipe, 0)]


@pytest.mark.parametrize(
    ("stages", "train", "steps"),
    [
        ([{"name": "one"}], {}, [100]),
        ([{"name": "one"}, {"name": "two", "steps": 30}], {}, [70, 30]),
        ([{"name": "one", "ratio": 0.125}, {"name": "two"}], {}, [12, 88]),
        ([{"name": "one", "tokens": 401}, {"name": "two"}], {}, [11, 89]),  # 40 tokens a step
        ([{"name": "one"}, {"name": "two", "tokens": 400}], {"steps": None, "tokens": 4000}, [90, 10]),
        ([{"name": "one"}, {"name": "two", "ratio": 0.5}], {"steps": None, "tokens": 4001}, [50, 51]),
        ([{"name": "one"}, {"name": "two", "tokens": 800, "data": {"sequence_length": 20}}], {}, [90, 10]),
        ([{"name": "one", "steps": 20}, {"name": "two"}],
         {"steps": None, "tokens": 4000, "batch_ramp": [{"global_batch_size": 2, "until_steps": 10}]}, [20, 85]),
    ],
)  # fmt: skip
def test_lengths_become_steps(stages, train, steps):
    parts = parts_of(_recipe(stages, train=train))
    assert [p.steps for p in parts] == steps
    assert [p.recipe.train.steps for p in parts] == [sum(steps[: i + 1]) for i in range(len(steps))]
    assert [p.first_tokens for p in parts] == [sum(q.tokens for q in parts[:i]) for i in range(len(parts))]
    assert all(not p.recipe.stages and p.recipe.train.tokens is None for p in parts)
    assert all(f"stage {p.number} ({p.name}): steps {p.first_step + 1} to" in described(p) for p in parts)


def test_what_a_stage_says_holds_on_and_a_schedule_counts_to_the_next():
    parts = parts_of(_recipe(
        [{"name": "one", "steps": 10},
         {"name": "two", "steps": 20, "data": {"train": "b", "sequence_length": 20}, "train": {"global_batch_size": 2}},
         {"name": "three", "schedule": {"name": "linear", "warmup_tokens": 40}, "optim": {"lr": 0.5}},
         {"name": "four", "steps": 5, "data": {"train": "c"}}],
        optim={"name": "muon", "muon_lr": 4.0},
    ))  # fmt: skip
    assert [p.recipe.data.train for p in parts] == ["a", "b", "b", "c"]
    assert [p.recipe.data.sequence_length for p in parts] == [10, 20, 20, 20]
    assert [p.recipe.train.global_batch_size for p in parts] == [4, 2, 2, 2]
    assert [(p.recipe.optim.lr, p.recipe.optim.muon_lr) for p in parts] == [(1.0, 4.0)] * 2 + [(0.5, 2.0)] * 2
    assert [p.recipe.schedule.span for p in parts] == [(0, 30), (0, 30), (1200, 4000), (1200, 4000)]
    assert [p.number for p in to_come(parts, 0)] == [1, 2, 3, 4]
    assert [p.number for p in to_come(parts, 10)] == [2, 3, 4]
    assert [p.number for p in to_come(parts, 99)] == [p.number for p in to_come(parts, 100)] == [4]


def test_a_schedule_in_its_span_is_the_schedule_of_a_run_of_that_length():
    one, two = parts_of(_recipe([{"name": "one", "steps": 40}, {"name": "two", "schedule": {"warmup_steps": 7}}]))
    alone = _recipe([], train={"steps": 60}, schedule={"warmup_steps": 7})
    assert [learning_rate(two.recipe.schedule, 1.0, s, 100) for s in range(41, 101)] == [
        learning_rate(alone.schedule, 1.0, s, 60) for s in range(1, 61)
    ]
    assert learning_rate(one.recipe.schedule, 1.0, 40, 40) == learning_rate(one.recipe.schedule, 1.0, 41, 100) == 0.0


@pytest.mark.parametrize(
    ("stages", "changes", "says"),
    [
        ([{"name": "a"}, {"name": "b"}], {}, "these have none: a, b"),
        ([{"name": "a", "steps": 50}, {"name": "b", "steps": 50}], {}, "here all have one"),
        ([{"name": "a"}, {"name": "a", "steps": 5}], {}, "the name 'a' comes twice"),
        ([{"name": "a"}, {"name": "b", "steps": 5, "tokens": 5}], {}, r"stages.1: steps, tokens set: give one"),
        ([{"name": "a"}, {"name": "b", "ratio": 1.5}], {}, r"stages.1.ratio: 1.5 is not below 1"),
        ([{"name": "a"}, {"name": "b", "steps": 0}], {}, r"stages.1.steps: 0 must be above 0"),
        ([{"name": "a"}], {"train": {"steps": None, "epochs": 1}}, "with stages the run's length is"),
        ([{"name": "a"}], {"schedule": {"span": [0, 5]}}, "schedule.span: the stages decide it"),
        ([{"name": "a", "data": {"sequence_lenght": 5}}], {}, "did you mean stages.data.sequence_length"),
        ([{"name": "a", "schedule": {"warmup_steps": 1, "warmup_ratio": 0.5}}], {},
         "stages.0.schedule.warmup_steps, stages.0.schedule.warmup_ratio set: give one"),
        ([{"name": "a"}, {"name": "b", "steps": 100}], {}, "leave nothing of train.steps=100 for 'a'"),
        ([{"name": "a"}, {"name": "b", "steps": 1, "schedule": {"min_lr_ratio": 2}}], {}, "min_lr_ratio: 2.0 is not between"),
        ([{"name": "a", "steps": 5}, {"name": "b"}],
         {"train": {"batch_ramp": [{"global_batch_size": 2, "until_steps": 6}]}}, "ramp is not over when the first stage ends"),
    ],
)  # fmt: skip
def test_contradictions_are_named(stages, changes, says):
    with pytest.raises(SteelError, match=says):
        parts_of(_recipe(stages, **changes))


@pytest.mark.parametrize(
    ("stage", "says"), [({"tokens": 40}, "stages: b"), ({"ratio": 0.5}, "train.tokens"), ({"steps": 5}, None)]
)
def test_pairs_are_not_counted_in_tokens(stage, says):
    train = {"steps": None, "tokens": 4000} if says == "train.tokens" else {}
    recipe = _recipe([{"name": "a"}, {"name": "b", **stage}], train=train)
    if says is None:
        refuse_tokens(recipe)
        return
    with pytest.raises(SteelError, match=says):
        refuse_tokens(recipe)


def test_an_override_reaches_into_a_stage():
    recipe = load_recipe("olmo2-1b", ["stages.stage2.data.train=x", "stages.stage2.optim.lr=1e-5"])
    assert (recipe.stages[1].data.train, recipe.stages[1].optim.lr) == ("x", 1e-5)
    assert not load_recipe("olmo2-1b", ["stages=[]"]).stages
    with pytest.raises(SteelError, match=r"(?s)no stage 'stage3'.*stage1, stage2"):
        load_recipe("olmo2-1b", ["stages.stage3.optim.lr=1"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minicpm-1b", "minicpm-2b", "olmo2-1b"])
def test_shipped_stages(name, tmp_path):
    parts = parts_of(load_recipe(name))
    small = tmp_path / "small.yaml"
    small.write_text(scale(name, "3m", 4096), encoding="utf-8")
    scaled = parts_of(load_recipe(str(small)))
    assert [p.name for p in scaled] == [p.name for p in parts]
    shares = [[p.tokens / sum(q.tokens for q in each) for p in each] for each in (scaled, parts)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)


def test_a_plan_adds_up_its_stages():
    longer = ["stages.stage2.data.sequence_length=16384", "stages.stage2.train.global_batch_size=128"]
    recipe = load_recipe("olmo2-1b", [*longer, "model.config.max_position_embeddings=16384"])
    found = plan(recipe, "olmo2-1b", parse_cluster("8xA100-80G"))
    one, two = found["stages"]
    best = found["settings"][0]
    assert best["days"] == pytest.approx(one["days"] + two["days"])
    assert two["micro_batch"] < one["micro_batch"] == best["micro_batch"]
    assert two["days"] / two["tokens"] > one["days"] / one["tokens"]  # attention over four times as many tokens
    assert found["run"]["tokens"] == one["tokens"] + two["tokens"]


def test_olmo2_leaves_its_cosine_where_its_second_stage_begins():
    one, two = parts_of(load_recipe("olmo2-1b"))
    end = learning_rate(one.recipe.schedule, one.recipe.optim.lr, one.steps, one.steps, one.tokens)
    assert end == pytest.approx(two.recipe.optim.lr, rel=1e-4)  # 7.4487e-5 is published
