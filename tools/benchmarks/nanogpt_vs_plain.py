"""A small-BPE nanoGPT through `pretrain` beside the same run written in plain PyTorch: do they end at the same loss?

    python tools/benchmarks/nanogpt_vs_plain.py --data DIR --runs DIR [--steps 160]

Data as `tools/benchmarks/optimizers/compare.py` makes it. Both begin with the same weights and see the same batches in
the same order; model code, loss, clipping, AdamW and schedule of the second are torch's (and transformers' GPT-2) alone.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "optimizers"))
from compare import BASE, done, prepared

from megatron_steel import preflight
from megatron_steel.data.order import next_batch
from megatron_steel.model import build
from megatron_steel.recipe import load_recipe

GPT2 = ("model={type: gpt2, config: {vocab_size: 2048, n_embd: 64, n_layer: 4, n_head: 4, n_positions: 128, "
        "resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}}")  # fmt: skip
LR, WARMUP, FLOOR = 4e-3, 20, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=160)
    a = parser.parse_args()
    folder = a.runs / "nanogpt"
    shutil.rmtree(folder, ignore_errors=True)
    words = [*prepared(a.data), GPT2, f"train.steps={a.steps}", "train.log_every_steps=1", f"optim.lr={LR}",
             "data.validation=null", f"run.dir={folder}"]  # fmt: skip
    done(["pretrain", str(BASE), *words])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ours = [row["loss"] for row in rows if "loss" in row]
    theirs = plain(words, a.steps)
    apart = [abs(x - y) for x, y in zip(ours, theirs, strict=True)]
    print("largest difference of a step's loss among the first "
          + ", ".join(f"{n}: {max(apart[:n]):.1e}" for n in (1, 5, 10, 20, 40, 80, a.steps) if n <= a.steps))  # fmt: skip
    last = slice(-20, None)
    print(f"mean loss of the last 20 steps {sum(ours[last]) / 20:.5f}, plain {sum(theirs[last]) / 20:.5f}")


def plain(words: list[str], steps: int) -> list[float]:
    recipe = load_recipe(str(BASE), words)
    run = preflight.plan_run(recipe)
    order = preflight.plan_order(recipe, run.train, steps, None)
    data = preflight.open_dataset(run.train, order)
    model = build.build_model(run.config, recipe.run.seed).train()
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    losses = []
    for step in range(1, steps + 1):
        share = step / WARMUP
        if step > WARMUP:
            share = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2
        for group in adamw.param_groups:
            group["lr"] = LR * share
        numbers, order = next_batch(order, recipe.train.global_batch_size)
        blocks = torch.stack([torch.from_numpy(data.tokens(int(n))) for n in numbers])
        logits = model(input_ids=blocks[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    main()
