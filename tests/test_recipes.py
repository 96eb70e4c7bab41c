"""Every shipped recipe parses, its model can be built, and its size is the published one."""

import pytest

from megatron_steel.model.build import build_config
from megatron_steel.model.flops import parameters
from megatron_steel.recipe import accumulation_steps, from_dict, load_recipe, recipe_names

PUBLISHED = {  # name: (parameters, tensors)
    "steel-1b": (1_122_922_770, 633),
    "steel-1b-causal": (1_122_987_282, 579),
    "tinyllama-1.1b": (1_100_048_384, 201),
    "zh-1b": (1_004_395_008, 398),
}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_parses_and_its_model_can_be_built(name):
    recipe = load_recipe(name)
    config = build_config(recipe.model)
    assert parameters(config).total > 0
    assert recipe.run.dir == f"runs/{name}"
    assert from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_size_is_the_published_one(name):
    counts = parameters(build_config(load_recipe(name).model))
    assert (counts.total, counts.tensors) == PUBLISHED[name]


@pytest.mark.parametrize("name", recipe_names())
def test_the_global_batch_can_be_cut_on_a_node(name):
    """tiny and tiny-v3 are for one or two ranks, all others for a node."""
    for ranks in (1, 2) if name in ("tiny", "tiny-v3") else (1, 2, 4, 8):
        assert accumulation_steps(load_recipe(name).train, ranks) >= 1


@pytest.mark.parametrize("name", recipe_names())
def test_positions_reach_to_the_end_of_a_sample(name):
    recipe = load_recipe(name)
    assert build_config(recipe.model).max_position_embeddings >= recipe.data.sequence_length


def test_steel_1b_has_the_hyper_parameters_of_the_original_code():
    r = load_recipe("steel-1b")
    assert (r.optim.lr, r.optim.betas, r.optim.weight_decay, r.optim.weight_decay_on) == (
        3e-4,
        (0.9, 0.95),
        0.05,
        "all",
    )
    assert (r.schedule.name, r.schedule.warmup_steps, r.schedule.min_lr_ratio) == ("cosine", 1000, 0.0)
    assert r.train.steps == 1_080_000
    assert r.train.global_batch_size * r.data.sequence_length == 1_048_576
    assert r.deepspeed.config == "zero3.json"


def test_zh_1b_is_small_in_words_and_shares_heads():
    config = build_config(load_recipe("zh-1b").model)
    assert config.model_type == "qwen3"
    assert config.tie_word_embeddings
    assert 48_000 <= config.vocab_size <= 64_000
    assert config.head_dim == 128
    assert config.num_key_value_heads < config.num_attention_heads
    assert load_recipe("zh-1b").schedule.name == "wsd"


def test_rope_bases_reach_the_configuration():
    """transformers 5 keeps them in rope_parameters; recipes use the older, shorter name."""
    for name, theta in (("zh-1b", 1e4), ("tinyllama-1.1b", 1e4), ("steel-1b", 1e6)):
        config = build_config(load_recipe(name).model)
        assert (getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta})["rope_theta"] == theta
