"""The DeepSpeed dict has one owner per key; every shipped file of ds_configs/ trains on CPU."""

import json

import pytest
from deepspeed.utils.config import get_timers_config
from plain_loop import MUON, MUON_NOISE, muon_and_adamw, plain_loop

from megatron_steel.device import smallest_sharding
from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_config
from megatron_steel.model.flops import parameters
from megatron_steel.recipe import load_recipe
from megatron_steel.train import engine

BF16_NOISE = 2e-3  # loss, between ZeRO stages that add gradients up in another order and precision


def _file(tmp_path, tree):
    path = tmp_path / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return str(path)


@pytest.mark.parametrize("key", sorted(engine.RECIPE_OWNS))
def test_a_key_that_the_recipe_owns_is_refused(key, tmp_path):
    with pytest.raises(SteelError, match=f"sets '{key}', which the recipe decides") as caught:
        engine.read_config(_file(tmp_path, {"zero_optimization": {"stage": 1}, key: 1}))
    assert engine.RECIPE_OWNS[key] in caught.value.remedy


def test_auto_values_are_refused_where_they_stand(tmp_path):
    with pytest.raises(SteelError, match=r"zero_optimization\.reduce_bucket_size.*only the Hugging Face Trainer"):
        engine.read_config(_file(tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}))


def test_unknown_and_broken_files_are_named(tmp_path):
    with pytest.raises(SteelError, match=r"no DeepSpeed file 'zero4\.json'") as caught:
        engine.read_config("zero4.json")
    assert "zero3_offload.json" in caught.value.remedy
    with pytest.raises(SteelError, match="not JSON"):
        engine.read_config(_file(tmp_path, "{"))


def test_the_recipe_decides_batch_precision_and_clipping():
    recipe = load_recipe("tiny", ["train.global_batch_size=32", "train.micro_batch_size=4", "optim.clip_grad_norm=0.5"])
    config = engine.engine_config(recipe, engine.read_config("ds_configs/zero2.json"), world_size=2)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not get_timers_config(config).enabled  # it would wait for the device twice a micro-batch


@pytest.mark.parametrize(
    ("gib", "ranks", "stage"),
    [
        (80, 1, "zero1.json"),
        (24, 8, "zero1.json"),
        (8, 8, "zero2.json"),
        (7.1, 8, "zero3.json"),
        (2, 8, "zero3_offload.json"),
    ],
)
def test_auto_takes_the_smallest_stage_that_fits_a_billion_parameters(gib, ranks, stage):
    assert engine.smallest_stage_that_fits(10**9, 2 * 2**30, gib * 2**30, ranks) == stage


@pytest.mark.parametrize("name", ["steel-1b", "zh-1b", "tinyllama-1.1b"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_a_billion_parameters_on_80_gb_cards_need_no_stage_3(name, ranks):
    recipe = load_recipe(name)
    config = build_config(recipe.model)
    chosen = smallest_sharding(recipe, config, parameters(config).total, 80 * 10**9, ranks)
    assert chosen == "zero1.json"


@pytest.fixture(scope="module")
def two_ranks(tiny_recipe, launch_many, tmp_path_factory):
    """Runs under one launcher: three bf16 steps with each file, and six steps of Muon in fp32."""
    folder = tmp_path_factory.mktemp("stages")
    runs = [[f"run.dir={folder}/{name}", f"deepspeed.config={name}", "train.precision=bf16", "train.steps=3"]
            for name in engine.shipped_configs()]  # fmt: skip
    launch_many(2, tiny_recipe, *runs, [f"run.dir={folder}/muon", *MUON, "deepspeed.config=zero1.json"])
    return folder


@pytest.fixture(scope="module")
def curves(two_ranks, metrics):
    """Losses of three bf16 steps on two ranks, by file."""
    found = {}
    for name in engine.shipped_configs():
        rows = metrics(two_ranks / name)
        found[name] = [rows[step]["loss"] for step in (1, 2, 3)] + [rows[3]["validation_loss"]]
    return found


def test_every_shipped_file_trains_and_all_agree(curves):
    assert sorted(curves) == ["zero0.json", "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"]
    for name, losses in curves.items():
        assert losses == pytest.approx(curves["zero3.json"], abs=BF16_NOISE), name
        assert losses[2] < losses[0]


def test_muon_over_a_matrix_that_two_ranks_share_equals_plain_torch(two_ranks, tiny_recipe, metrics):
    losses, norms = plain_loop(load_recipe(str(tiny_recipe), MUON), 6, muon_and_adamw)
    rows = metrics(two_ranks / "muon")
    assert [rows[step]["loss"] for step in sorted(rows)] == pytest.approx(losses, abs=MUON_NOISE)
    assert rows[1]["grad_norm"] == pytest.approx(norms[0], rel=1e-5)  # of the gradient, not of Muon's step
