"""The DeepSpeed dict has one owner per key; every shipped file of ds_configs/ trains on CPU."""

import json

import pytest

from megatron_steel.errors import SteelError
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


@pytest.fixture(scope="module")
def curves(tiny_recipe, launch_many, metrics, tmp_path_factory):
    """Losses of three bf16 steps on two ranks, by file."""
    folder = tmp_path_factory.mktemp("stages")
    names = engine.shipped_configs()
    launch_many(2, tiny_recipe, *([f"run.dir={folder}/{name}", f"deepspeed.config={name}", "train.precision=bf16",
                                   "train.steps=3"] for name in names))  # fmt: skip
    found = {}
    for name in names:
        rows = metrics(folder / name)
        found[name] = [rows[step]["loss"] for step in (1, 2, 3)] + [rows[3]["validation_loss"]]
    return found


def test_every_shipped_file_trains_and_all_agree(curves):
    assert sorted(curves) == ["zero0.json", "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"]
    for name, losses in curves.items():
        assert losses == pytest.approx(curves["zero3.json"], abs=BF16_NOISE), name
        assert losses[2] < losses[0]
