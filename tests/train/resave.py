"""Not a test: run by `test_elastic`, under the launcher or in its own process. Trains, restores and saves engines of many layouts.

    deepspeed --num_gpus RANKS resave.py JOBS.json

A job is {"recipe": tree, "to": folder} to train three steps and save; with "from": checkpoint to restore and save at once.
Unless "plain", the model has a frozen weight and a buffer beside its own, drawn from the recipe's seed: they are state too.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_steel import dist
from megatron_steel.checkpoint import commit
from megatron_steel.model import build
from megatron_steel.recipe import from_dict
from megatron_steel.train import engine as engines
from megatron_steel.train import state

STEPS = 3


def start(tree: dict[str, Any], device: torch.device, plain: bool = False) -> tuple[Any, Any, list[list[str]]]:
    """A fresh engine of a recipe, its initial weights drawn from another seed than any other engine's."""
    recipe = from_dict(tree)
    model = build.build_model(build.build_config(recipe.model), recipe.run.seed)
    if not plain:
        generator = torch.Generator().manual_seed(recipe.run.seed)
        model.frozen = torch.nn.Parameter(torch.randn(5, 3, generator=generator), requires_grad=False)
        model.register_buffer("counts", torch.randint(0, 1000, (4,), generator=generator))
    build.prepare_for_training(model)
    groups = build.decay_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    group_names = [[names[id(p)] for p in group["params"]] for group in groups]
    config = engines.engine_config(recipe, engines.read_config(recipe.deepspeed.config), dist.world_size())
    engine = engines.start_engine(model, groups, recipe.optim, config, device)
    return engine, recipe, group_names


def train(engine: Any, recipe: Any) -> None:
    generator = torch.Generator().manual_seed(100 + dist.rank())
    for group in engine.optimizer.param_groups:
        group["lr"] = recipe.optim.lr
    for _ in range(STEPS * engine.gradient_accumulation_steps()):
        ids = torch.randint(0, 128, (recipe.train.micro_batch_size, 17), generator=generator)
        engine.backward(engine(input_ids=ids[:, :-1], labels=ids[:, 1:]) / ids[:, 1:].numel())
        engine.step()


def run(job: dict[str, Any], device: torch.device) -> None:
    engine, recipe, group_names = start(job["recipe"], device, job.get("plain", False))
    progress = state.Progress(STEPS, 64 * STEPS, {})
    if "from" in job:
        progress = state.restore(engine, commit.verify(Path(job["from"])))
    else:
        train(engine, recipe)
    state.save(
        engine, Path(job["to"]), progress, {"recipe": recipe.to_dict(), "parameters": 1}, group_names, keep_last=2
    )


def main(jobs: str) -> None:
    dist.set_up_logging()
    device = dist.start()
    for job in json.loads(Path(jobs).read_text()):
        run(job, device)
    dist.barrier()


if __name__ == "__main__":
    main(*[a for a in sys.argv[1:] if not a.startswith("--local_rank")])
