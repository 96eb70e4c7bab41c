"""Every recipe, scaled to at most three million parameters, trains on real text with two ranks, exports, and reloads as it was."""

import pytest

from megatron_steel import cli
from megatron_steel.data.tokenize import tokenize
from megatron_steel.data.train_tokenizer import train_tokenizer
from megatron_steel.model.build import build_config
from megatron_steel.model.flops import parameters
from megatron_steel.recipe import Model, load_recipe, recipe_names
from megatron_steel.scale import scale

pytestmark = [pytest.mark.slow, pytest.mark.shared]
VOCABULARY, MOST = 4096, 3_000_000
STEPS = 20
GROUPS = [recipe_names()[i : i + 6] for i in range(0, len(recipe_names()), 6)]


@pytest.fixture(scope="module")
def real_text(shared_data, tmp_path_factory):
    """A tokenizer just large enough for the SkyPile sample, and the sample tokenized with it."""
    folder = tmp_path_factory.mktemp("real")
    text = shared_data / "steel_samples/sky/2021-31_zh_head_0000_sample.jsonl"
    train_tokenizer([text], folder / "tokenizer", VOCABULARY)
    tokenize([text], tokenizer_path=folder / "tokenizer", output_prefix=folder / "sky", workers=1)
    belle = shared_data / "steel_samples/BELLE/train_2M_CN_sample.json"
    tokenize(
        [belle], folder / "tokenizer", folder / "pairs", workers=1, prompt_key="instruction", response_key="output"
    )
    return folder


def _small(name, folder):
    """The recipe's family in at most three million parameters, as a file."""
    model = load_recipe(name).model
    largest = parameters(build_config(Model(model.type, model.config | {"vocab_size": VOCABULARY}))).total
    path = folder / f"{name}.yaml"
    path.write_text(scale(name, str(min(largest, MOST * 9 // 10)), VOCABULARY), encoding="utf-8")
    assert load_recipe(str(path)).about.parameters <= MOST
    return path


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_recipes_train_and_ship(names, real_text, launch_many, metrics, tmp_path):
    runs = []
    for name in names:
        kind = load_recipe(name).model.type
        data, stage = ("pairs", 0) if kind == "t5" else ("sky", 3 if kind in ("steel", "nanogpt", "openelm") else 1)
        runs.append([
            str(_small(name, tmp_path)), f"run.dir={tmp_path}/run-{name}", f"tokenizer.path={real_text}/tokenizer",
            f"data.train={real_text}/{data}", "data.validation=null", "data.sequence_length=64", f"train.steps={STEPS}",
            "train.global_batch_size=16", "train.micro_batch_size=4", "train.precision=fp32", "train.log_every_steps=1",
            f"train.save_every_steps={STEPS}", "schedule.warmup_steps=2",
            f"deepspeed.config=zero{stage}.json",
            *(f"stages.{later.name}.{key}" for later in load_recipe(name).stages[1:]
              for key in (f"data.train={real_text}/sky", "ratio=0.2")),
        ])  # fmt: skip
    launch_many(2, runs[0][0], *runs)
    for name in names:
        losses = [row["loss"] for _, row in sorted(metrics(tmp_path / f"run-{name}").items())]
        assert len(losses) == STEPS
        print(f"{name}: {losses[0]:.3f} -> {losses[-1]:.3f}")
        assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.02, name
        # --verify: a process without this package loads the folder, and its logits are the trained model's to 1e-5.
        export = [
            "export",
            str(tmp_path / f"run-{name}"),
            str(tmp_path / f"hf-{name}"),
            "--dtype",
            "float32",
            "--verify",
        ]
        assert cli.main(export) == 0, name
