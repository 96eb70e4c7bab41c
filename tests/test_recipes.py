"""Every shipped recipe parses, its model can be built, and its size is the published one."""

import dataclasses

import pytest

from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_config
from megatron_steel.model.flops import parameters
from megatron_steel.recipe import Model, accumulation_steps, from_dict, load_recipe, recipe_names
from megatron_steel.scale import scale, scaled_fields

PUBLISHED = {  # exact figures of papers, model cards and released weights, or derived from the formulas of their code
    "baby-llama2-218m": 218_155_008, "baby-llama2-58m": 58_479_616, "chatlm-mini-0.2b": 187_692_288, "ct-llm-2b": 2_134_509_568,
    "microllama-0.3b": 304_636_928, "mini-llm-1.4b": 1_431_996_416, "minicpm-1b": 1_360_246_272,
    "minicpm-2b": 2_724_880_896, "mobilellm-125m": 124_635_456, "mobilellm-350m": 345_355_200,
    "nanogpt-124m": 124_373_760, "olmo-1b": 1_176_764_416, "olmo2-1b": 1_484_916_736, "openelm-1.1b": 1_079_891_456,
    "openelm-270m": 271_527_168, "openelm-3b": 3_036_647_424, "openelm-450m": 457_179_136, "phi-1-small": 356_794_368,
    "phi-1.5": 1_418_270_720, "pythia-14m": 14_067_712, "pythia-31m": 30_494_720, "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320,
    "qwen1.5-0.5b": 463_987_712, "qwen3-0.6b": 596_049_920, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
    "steel-1b": 1_122_922_770, "tinyllama-1.1b": 1_100_048_384,
}  # fmt: skip
COMPUTED = {
    "nanogpt-350m",
    "nanogpt-774m",
    "nanogpt-1558m",
    "pangu-pi-1b",
    "steel-1b-causal",
    "zh-0.2b",
    "zh-1b",
    "tiny",
    "tiny-v3",
}
TENSORS = {"steel-1b": 633, "steel-1b-causal": 579, "tinyllama-1.1b": 201, "zh-1b": 398}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_whole_and_its_model_has_the_parameters_that_it_says(name):
    recipe = load_recipe(name)
    config = build_config(recipe.model)
    counts = parameters(config)
    assert counts.total == recipe.about.parameters == PUBLISHED.get(name, recipe.about.parameters)
    assert counts.tensors == TENSORS.get(name, counts.tensors)
    # T5's positions are relative and have no end.
    assert recipe.model.type == "t5" or config.max_position_embeddings >= recipe.data.sequence_length
    for ranks in (1, 2) if name in ("tiny", "tiny-v3") else (1, 2, 4, 8):  # a node
        assert accumulation_steps(recipe.train, ranks) >= 1
    assert recipe.run.dir == f"runs/{name}"
    assert from_dict(recipe.to_dict()) == recipe
    assert all(
        (recipe.about.summary, recipe.about.tokens, recipe.about.hardware, recipe.about.result, recipe.about.source)
    )


def test_every_recipe_is_published_or_said_to_be_computed():
    assert set(recipe_names()) == set(PUBLISHED) | COMPUTED


@pytest.mark.parametrize(
    ("recipe", "changed", "count"),
    [  # the traps: what other tables count
        ("nanogpt-124m", {"vocab_size": 50257}, 124_337_664),  # 124,439,808 of GPT-2 is this and its 102,144 biases
        ("baby-llama2-58m", {"vocab_size": 21131}, 36_124_672),
        ("baby-llama2-58m", {"tie_word_embeddings": False}, 91_653_632),  # "92M"
        ("qwen1.5-0.5b", {"tie_word_embeddings": False}, 619_570_176),  # "0.62B"
        ("ct-llm-2b", {"tie_word_embeddings": True}, 1_876_822_016),
        ("openelm-270m", {"vocab_size": 32128}, 271_691_008),
    ],
)
def test_where_other_counts_come_from(recipe, changed, count):
    model = load_recipe(recipe).model
    assert parameters(build_config(dataclasses.replace(model, config=model.config | changed))).total == count


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ((12, 768, 12), 124_439_808),
        ((24, 1024, 16), 354_823_168),
        ((36, 1280, 20), 774_030_080),
        ((48, 1600, 25), 1_557_611_200),
    ],
)
def test_gpt2_s_own_sizes_are_nanogpt_s(sizes, count):
    """GPT-2's checkpoints: 50,257 words, and biases, which nanoGPT's models lack (13 h + 1 a layer's worth of them less one)."""
    layers, width, heads = sizes
    fields = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": 50257}
    assert parameters(build_config(Model(type="gpt2", config=fields))).total == count
    biases = layers * (3 * width + width + 4 * width + width + 2 * width) + width
    assert parameters(build_config(Model(type="nanogpt", config=fields))).total == count - biases


@pytest.mark.parametrize(
    "name", ["pythia-160m", "minicpm-1b", "openelm-270m", "qwen3-0.6b", "steel-1b-causal", "chatlm-mini-0.2b"]
)
def test_a_scaled_recipe_keeps_its_family(name, tmp_path):
    text = scale(name, "3m", vocab_size=2048)
    assert "weight: null" not in text
    (tmp_path / "small.yaml").write_text(text)
    big, small = load_recipe(name), load_recipe(str(tmp_path / "small.yaml"))
    config, large = build_config(small.model), build_config(big.model)
    assert parameters(config).total == small.about.parameters == pytest.approx(3e6, rel=0.1)
    assert (config.vocab_size, small.tokenizer.path) == (2048, "data/tokenizer-2048")
    assert config.hidden_size % 32 == 0 or config.hidden_size % getattr(config, "head_dim", 64) == 0
    for r in (big, small):
        assert accumulation_steps(r.train, 8) >= 1
    assert (small.optim.lr, small.optim.betas, small.data, small.schedule.name) == (
        big.optim.lr, big.optim.betas, big.data, big.schedule.name)  # fmt: skip
    assert set(small.model.config) >= set(big.model.config)
    if name == "openelm-270m":
        assert config.ffn_dims == sorted(set(config.ffn_dims))
    else:
        ratios = [(c.num_attention_heads / c.num_key_value_heads if hasattr(c, "num_key_value_heads") else 1,
                   pytest.approx(_inner(c) / c.hidden_size, rel=0.15)) for c in (large, config)]  # fmt: skip
        assert ratios[0][0] == ratios[1][0]
        assert ratios[0][1] == _inner(config) / config.hidden_size
    if name == "minicpm-1b":
        assert config.residual_multiplier == pytest.approx(1.4 / config.num_hidden_layers**0.5, abs=1e-5)
        assert config.logits_scaling == config.hidden_size / 256


def _inner(config):
    return config.d_ff if config.model_type == "t5" else config.intermediate_size


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("pythia-160m", "many", "no number of parameters"), ("pythia-160m", "0m", "no number of parameters"),
        ("pythia-14m", "50m", "scale makes it smaller"), ("qwen1.5-0.5b", "3m", "give --vocab-size 4096, or ask for more"),
        ("pythia161m", "3m", "did you mean pythia-160m"),
    ],
)  # fmt: skip
def test_what_cannot_be_scaled_is_said(name, parameters, says):
    with pytest.raises(SteelError, match=says):
        scale(name, parameters)
    with pytest.raises(SteelError, match="no vocabulary"):
        scale("pythia-160m", "3m", 0)


def test_sizes_that_a_recipe_leaves_to_its_class_cannot_be_scaled():
    recipe = load_recipe("qwen3-0.6b")
    recipe = dataclasses.replace(recipe, model=Model(type="qwen3", config={"num_attention_heads": 4}))
    with pytest.raises(SteelError, match="leaves hidden_size, num_hidden_layers, vocab_size to the class's defaults"):
        scaled_fields(recipe, 3_000_000, None)


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
