"""Not a test: a recipe's first steps in torch alone: one process, the whole batch at once, the model's own forward in fp32."""

import math

import torch
from torch import nn

from megatron_steel import preflight
from megatron_steel.data.order import next_batch
from megatron_steel.model import build

# Three layers: between two ranks the cut goes through a matrix of the second.
MUON = ["optim.name=muon", "optim.muon_lr=3e-2", "model.config.num_hidden_layers=3"]
# Loss. Newton and Schulz iterate in bf16: where fp32 sums differ in their last bit, a step may differ in bf16's last.
MUON_NOISE = 2e-3


def plain_loop(recipe, steps, optimizers_of):
    """Losses and gradient norms of `steps` steps with `tiny_recipe`'s schedule (cosine after 2 steps, to a tenth).

    Args:
        optimizers_of: of the model: [(torch optimizer, peak learning rate), ...].
    """
    plan = preflight.plan_run(recipe)
    order = preflight.plan_order(recipe, plan.train, steps, None)
    data = preflight.open_dataset(plan.train, order)
    model = build.build_model(plan.config, recipe.run.seed)
    optimizers = optimizers_of(model)
    losses, norms = [], []
    for step in range(1, steps + 1):
        numbers, order = next_batch(order, recipe.train.global_batch_size)
        blocks = torch.stack([torch.from_numpy(data.tokens(int(n))) for n in numbers])
        logits = model(input_ids=blocks[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        share = step / 2 if step <= 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / (steps - 2))) / 2
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms


def decayed(parameters):
    """AdamW's groups: decay on matrices only."""
    return [
        {"params": [p for p in parameters if (p.ndim >= 2) == two], "weight_decay": 0.1 * two} for two in (True, False)
    ]


def muon_and_adamw(model):
    """torch's Muon for the matrices between embeddings and head, torch's AdamW for the rest, at `MUON`'s rates."""
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(model.lm_head.weight)}
    hidden = [p for p in model.parameters() if p.ndim == 2 and id(p) not in ends]
    rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in ends]
    muon = torch.optim.Muon(hidden, lr=0.0, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [(muon, 3e-2), (torch.optim.AdamW(decayed(rest), lr=0.0, betas=(0.9, 0.95)), 1e-2)]
