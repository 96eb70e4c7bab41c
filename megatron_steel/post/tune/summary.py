"""What a run is about to do, and what it has done, on one screen each. Must not know how."""

import json
from pathlib import Path
from typing import Any

from megatron_steel.post.tune.plan import Plan

_NAMES = {"sft": "Supervised fine-tuning", "dpo": "DPO"}


def before(plan: Plan, output: Path) -> str:
    counts, values = plan.counts, plan.settings
    lines = [f"{_NAMES[plan.kind]} of {plan.model} -> {output}"]
    lines += [_data(side, counts[side], plan) for side in ("train", "heldout") if side in counts]
    if counts["forged"]:
        lines.append(f"  control strings   {counts['forged']:,} in texts, broken up with a space")
    micro = values["per_device_train_batch_size"]
    cut = plan.global_batch // (micro * plan.ranks)
    beta = f", beta {values['beta']:g}" if plan.kind == "dpo" else ""
    lines += [
        f"  steps             {counts['steps']:,} of {plan.global_batch} rows = {micro} x {plan.ranks} rank{'s' * (plan.ranks > 1)} x "
        f"{cut} micro-batches; {counts['warm_up']:,} warm up",
        f"  learning rate     {values['learning_rate']:g} {values['lr_scheduler_type']}, {values['num_train_epochs']:g} epochs{beta}",
        f"  trained           {_trained(plan)}",
        f"  memory            about {_gigabytes(plan):.1f} GB a rank for weights, gradients and Adam; activations come on top",
    ]
    return "\n".join(lines)


def after(plan: Plan, output: Path) -> str:
    log = json.loads((output / "result.json").read_text(encoding="utf-8"))["log"]
    lines = [f"{_NAMES[plan.kind]} complete: {output}"]
    for label, key in (("loss", "loss"), ("held-out loss", "eval_loss"), ("reward margin", "rewards/margins"), ("accuracy", "rewards/accuracies")):  # fmt: skip
        found = [(line["step"], line[key]) for line in log if key in line]
        if found:
            (first, was), (last, now) = found[0], found[-1]
            lines.append(f"  {label:17} {was:.4f} (step {first}) -> {now:.4f} (step {last})")
    seconds = next((line["train_runtime"] for line in reversed(log) if "train_runtime" in line), None)
    if seconds is not None:
        lines.append(f"  time              {seconds:,.0f} s since the last start")
    lines += [
        f"  talk with it      megatron-steel generate {output} --chat",
        f"  curves            tensorboard --logdir {output}/tensorboard",
    ]
    return "\n".join(lines)


def _data(side: str, counts: dict[str, int], plan: Plan) -> str:
    text = f"  {'data' if side == 'train' else 'held out':17} {counts['rows']:,} rows, {counts['tokens']:,} tokens, {counts['supervised']:,} learned"
    if plan.packing:
        text += f", in {counts['sequences']:,} packed rows"
    if counts["cut"]:
        text += f"; {counts['cut']:,} longer than {plan.settings['max_length']} tokens lost their end"
    if counts["left_out"]:
        text += f"; {counts['left_out']:,} left out, nothing to learn was left"
    return text


def _trained(plan: Plan) -> str:
    total = plan.counts["parameters"]
    if not plan.lora:
        return f"all {total:,} weights"
    text = (
        f"{plan.counts['trained']:,} weights of {plan.counts['adapters']} adapters (rank {plan.lora['r']}) on {total:,}"
    )
    left = plan.counts["left_out"]
    return text + (f"; {left} layers of experts have none: the model reads their weights directly" if left else "")


def _gigabytes(plan: Plan) -> float:
    """An estimate of what does not depend on the batch. fp32: weight, gradient and two moments, 4 bytes each."""
    total, ranks = plan.counts["parameters"], plan.ranks
    stage = int((plan.deepspeed or {}).get("zero_optimization", {}).get("stage", 0))
    whole, cut = {0: (16, 0), 1: (8, 8), 2: (4, 12), 3: (0, 16)}[stage]
    if plan.lora:
        size: Any = 4 * total / (ranks if stage == 3 else 1) + 16 * plan.counts["trained"]
    else:
        size = total * (whole + cut / ranks)
        if plan.kind == "dpo":
            size += 4 * total / (ranks if stage == 3 else 1)  # the reference
    return size / 1e9
