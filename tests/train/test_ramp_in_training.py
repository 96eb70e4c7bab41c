"""A batch ramp in training: equal to plain torch, to an uninterrupted run, and to itself however it is sharded."""

import shutil

import pytest
import torch

from megatron_steel import cli, preflight
from megatron_steel.data.order import next_batch
from megatron_steel.model import build
from megatron_steel.recipe import load_recipe

BATCHES = [2, 2, 2, 4, 4, 4, 8, 8]  # 3 steps; then as many of 4 as reach 15 samples of 32 tokens
RAMP = ("train.batch_ramp=[{until_steps: 3, global_batch_size: 2}, {until_tokens: 480, global_batch_size: 4}]",
        "train.micro_batch_size=1", "schedule.name=constant", "schedule.warmup_steps=0", "train.steps=8",
        "train.save_every_steps=1", "train.keep_last=9", "train.eval_every_steps=4")  # fmt: skip
BF16_NOISE = 2e-3  # as between ZeRO stages


@pytest.fixture(scope="module")
def train(tiny_recipe, metrics, tmp_path_factory):
    root = tmp_path_factory.mktemp("ramp")

    def run(name, *words, expect=0):
        assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={root / name}", *RAMP, *words]) == expect
        return metrics(root / name) if (root / name).exists() else {}

    run.root = root
    return run


@pytest.fixture(scope="module")
def straight(train):
    return train("straight")


def _told(rows):
    return {
        step: {key: row[key] for key in ("loss", "grad_norm", "tokens", "samples", "lr")} for step, row in rows.items()
    }


@pytest.fixture(scope="module")
def plain(tiny_recipe):
    """Losses and norms of torch alone, the batches written out."""
    recipe = load_recipe(str(tiny_recipe), list(RAMP))
    planned = preflight.plan_run(recipe)
    order = preflight.plan_order(recipe, planned.train, len(BATCHES), None)
    data = preflight.open_dataset(planned.train, order)
    model = build.build_model(planned.config, recipe.run.seed)
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    losses, norms = [], []
    for batch in BATCHES:
        numbers, order = next_batch(order, batch)
        blocks = torch.stack([torch.from_numpy(data.tokens(int(n))) for n in numbers])
        logits = model(input_ids=blocks[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        adam.step()
        losses.append(float(loss.detach()))
    return losses, norms


def test_a_ramp_equals_plain_torch(straight, plain):
    assert [row["samples"] for row in straight.values()] == [sum(BATCHES[:n]) for n in range(1, 9)]
    assert [row["tokens"] for row in straight.values()] == [32 * sum(BATCHES[:n]) for n in range(1, 9)]
    for row, loss, norm in zip(straight.values(), *plain, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=2e-6)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("stop", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5))])
def test_a_run_interrupted_in_its_ramp_equals_one_that_was_not(stop, train, straight):
    cut = shutil.copytree(train.root / "straight", train.root / f"cut{stop}")
    for checkpoint in (cut / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > stop:
            shutil.rmtree(checkpoint)
    assert _told(train(f"cut{stop}")) == _told(straight)


def test_lengths_in_tokens_and_epochs_count_the_ramp(train, straight):
    tokens = train("tokens", "train.steps=null", f"train.tokens={32 * sum(BATCHES) - 5}", "schedule.name=constant")
    assert _told(tokens) == _told(straight)


def test_what_cannot_be_is_refused(train, capsys):
    train("odd", "train.micro_batch_size=2", "train.batch_ramp=[{until_steps: 3, global_batch_size: 3}]", expect=78)
    assert "a global batch of 3 samples cannot be cut into micro-batches of 2" in capsys.readouterr().err
    train("both", "train.batch_ramp=[{until_steps: 3, until_tokens: 9, global_batch_size: 4}]", expect=78)
    assert "train.batch_ramp.0: needs a global_batch_size and either until_tokens" in capsys.readouterr().err
    train(
        "over",
        "train.batch_ramp=[{until_steps: 3, global_batch_size: 4}, {until_tokens: 9, global_batch_size: 8}]",
        expect=78,
    )
    assert "stage 2 is over before it begins" in capsys.readouterr().err
    train("name", "train.batch_ramp=[{until_step: 3, global_batch_size: 4}]", expect=78)
    assert "did you mean train.batch_ramp.until_steps?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_stage_ramps_in_fp32(stage, train, plain):
    for row, loss in zip(train(f"fp32-{stage}", f"deepspeed.config=zero{stage}.json").values(), plain[0], strict=True):
        assert row["loss"] == pytest.approx(loss, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_every_stage_ramps_in_bf16(name, train, plain):
    """Against fp32, within the noise of bf16 weights and gradients: a step that ended too early would be far outside."""
    rows = train(f"bf16-{name}", f"deepspeed.config={name}.json", "train.precision=bf16", "optim.lr=1e-3")
    other = train(f"whole-{name}", f"deepspeed.config={name}.json", "train.precision=bf16", "optim.lr=1e-3",
                  "train.micro_batch_size=2")  # fmt: skip
    assert [r["samples"] for r in rows.values()] == [sum(BATCHES[:n]) for n in range(1, 9)]
    assert [r["loss"] for r in rows.values()] == pytest.approx([r["loss"] for r in other.values()], abs=BF16_NOISE)
    assert rows[1]["loss"] == pytest.approx(plain[0][0], abs=BF16_NOISE)


@pytest.mark.slow
def test_two_ranks_ramp_as_one(launch, tiny_recipe, metrics, straight, tmp_path):
    launch(2, tiny_recipe, f"run.dir={tmp_path}/two", *RAMP)
    rows = metrics(tmp_path / "two")
    assert [r["loss"] for r in rows.values()] == pytest.approx([r["loss"] for r in straight.values()], abs=2e-6)
    assert [r["samples"] for r in rows.values()] == [r["samples"] for r in straight.values()]
