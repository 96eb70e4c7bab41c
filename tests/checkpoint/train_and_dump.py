"""Train a few steps, save a DeepSpeed checkpoint, and dump the fp32 weights through DeepSpeed's public getter.

train_and_dump.py [--local_rank=N] RECIPE OUT_DIR key.path=value ...
"""

import json
import sys
from pathlib import Path

import torch

from megatron_steel import dist
from megatron_steel.checkpoint.commit import ENGINE
from megatron_steel.checkpoint.zero import CLIENT_STATE
from megatron_steel.model import build
from megatron_steel.recipe import load_recipe
from megatron_steel.train import engine as engines

recipe_path, out, *overrides = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
recipe = load_recipe(recipe_path, overrides)
device = dist.start()
model = build.prepare_for_training(build.build_model(build.build_config(recipe.model), 5))
before = {name: p.detach().clone() for name, p in model.named_parameters()}
groups = build.decay_groups(model, 0.1)
names = {id(p): n for n, p in model.named_parameters()}
group_names = [[names[id(p)] for p in g["params"]] for g in groups]
config = engines.engine_config(recipe, engines.read_config(recipe.deepspeed.config), dist.world_size())
engine = engines.start_engine(model, groups, recipe.optim, config, device)
for group in engine.optimizer.param_groups:
    group["lr"] = 1e-2
generator = torch.Generator().manual_seed(dist.rank())
for _ in range(2 * config["gradient_accumulation_steps"]):
    ids = torch.randint(0, 128, (2, 17), generator=generator)
    engine.backward(engine(input_ids=ids[:, :-1], labels=ids[:, 1:]) / 32)
    engine.step()
engine.save_checkpoint(str(Path(out) / "checkpoint"), tag=ENGINE, save_latest=False,
                       client_state={CLIENT_STATE: {"group_names": group_names}})  # fmt: skip

from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402

trained = {}
for name, p in engine.module.named_parameters():
    master = safe_get_full_fp32_param(p) if engine.zero_optimization() else None
    if master is None and recipe.train.precision == "bf16":  # stage 0: DeepSpeed's getter knows no masters there
        master = next(
            copy
            for group, copies in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
            for q, copy in zip(group, copies, strict=True)
            if q is p
        )
    trained[name] = (p if master is None else master).detach().float().cpu().clone()
if dist.is_main():
    torch.save(trained, Path(out) / "trained.pt")
    moved = max(float((trained[n] - before[n]).abs().max()) for n in trained)
    (Path(out) / "moved.json").write_text(json.dumps(moved))
dist.barrier()
