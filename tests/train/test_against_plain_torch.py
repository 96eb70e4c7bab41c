"""The whole road (order, ZeRO-3, two ranks, accumulation, two decay groups) equals a plain fp32 AdamW loop."""

import math

import torch

from megatron_steel import preflight
from megatron_steel.data.order import next_batch
from megatron_steel.model import build
from megatron_steel.recipe import load_recipe

STEPS = 20
TOLERANCE = 2e-6  # loss, absolute; the norm relative


def _plain_loop(recipe):
    """torch alone: one process, the whole batch at once, decay on matrices only, HF's own forward."""
    plan = preflight.plan_run(recipe)
    order = preflight.plan_order(recipe, plan.train, STEPS, None)
    data = preflight.open_dataset(plan.train, order)
    model = build.build_model(plan.config, recipe.run.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.0, betas=(0.9, 0.95)
    )
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        numbers, order = next_batch(order, recipe.train.global_batch_size)
        blocks = torch.stack([torch.from_numpy(data.tokens(int(n))) for n in numbers])
        logits = model(input_ids=blocks[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        share = step / 2 if step <= 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))) / 2
        for group in adam.param_groups:
            group["lr"] = 1e-2 * share
        adam.step()
        losses.append(float(loss))
    return losses, norms


def test_two_ranks_with_accumulation_equal_plain_torch(tiny_recipe, launch, metrics, tmp_path):
    overrides = [f"run.dir={tmp_path}/run", f"train.steps={STEPS}", "train.save_every_steps=20"]
    launch(2, tiny_recipe, *overrides)
    losses, norms = _plain_loop(load_recipe(str(tiny_recipe), overrides))
    rows = metrics(tmp_path / "run")
    assert max(abs(rows[s]["loss"] - losses[s - 1]) for s in rows) <= TOLERANCE
    assert max(abs(rows[s]["grad_norm"] / norms[s - 1] - 1) for s in rows) <= 1e-5
    assert losses[-1] < losses[0] - 0.5  # it learned something, so the comparison means something
