"""The whole road (order, ZeRO-3, two ranks, accumulation, two decay groups) equals a plain fp32 AdamW loop."""

import torch
from plain_loop import plain_loop

from megatron_steel.recipe import load_recipe

STEPS = 20
TOLERANCE = 2e-6  # loss, absolute; the norm relative


def _adamw(model):
    """Decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return [(torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95)), 1e-2)]


def test_two_ranks_with_accumulation_equal_plain_torch(tiny_recipe, launch, metrics, tmp_path):
    overrides = [f"run.dir={tmp_path}/run", f"train.steps={STEPS}", "train.save_every_steps=20"]
    launch(2, tiny_recipe, *overrides)
    losses, norms = plain_loop(load_recipe(str(tiny_recipe), overrides), STEPS, _adamw)
    rows = metrics(tmp_path / "run")
    assert max(abs(rows[s]["loss"] - losses[s - 1]) for s in rows) <= TOLERANCE
    assert max(abs(rows[s]["grad_norm"] / norms[s - 1] - 1) for s in rows) <= 1e-5
    assert losses[-1] < losses[0] - 0.5  # it learned something, so the comparison means something
