"""Not a test: run by `checkpoint_runs` under the launcher. Trains small models for two steps by the real engine, commits a
checkpoint of each, and writes beside it the logits that the training engine itself gives, and its weights; then what others
would make (`make_foreign`).

    deepspeed --num_gpus RANKS make_checkpoints.py CASES.json TOKENIZER OUTPUT
"""

import json
import sys
from pathlib import Path

import make_foreign
import torch

from megatron_steel import dist
from megatron_steel.convert.verify import fixed_tokens
from megatron_steel.model import build
from megatron_steel.recipe import from_dict
from megatron_steel.train import engine as engines
from megatron_steel.train import state


def make(name: str, tree: dict, output: Path, device: torch.device) -> None:
    recipe = from_dict(tree)
    config = engines.engine_config(recipe, engines.read_config(recipe.deepspeed.config), dist.world_size())
    model = build.build_model(build.build_config(recipe.model), recipe.run.seed)
    build.prepare_for_training(model)
    groups = build.decay_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    group_names = [[names[id(p)] for p in group["params"]] for group in groups]
    engine = engines.start_engine(model, groups, recipe.optim, config, device)
    generator = torch.Generator().manual_seed(dist.rank())
    for step in range(1, 3):
        ids = torch.randint(0, model.config.vocab_size, (recipe.train.micro_batch_size, 17), generator=generator)
        engine.backward(engine(input_ids=ids[:, :-1], labels=ids[:, 1:]) / ids[:, 1:].numel())
        for group in engine.optimizer.param_groups:
            group["lr"] = recipe.optim.lr
        engine.step()
        if step % recipe.train.save_every_steps:
            continue
        facts = {"recipe": recipe.to_dict(), "parameters": 1, "data": [{"name": "made-up", "tokens": 4321}]}
        progress = state.Progress(step, 64 * step, {})
        state.save(engine, output / name / "checkpoints", progress, facts, group_names, keep_last=2)
    engine.eval()
    weights = {name: weight_of(p, engine).detach().float().clone() for name, p in engine.module.named_parameters()}
    with torch.no_grad():
        logits = engine(input_ids=fixed_tokens(model.config.vocab_size))
    if dist.is_main():
        torch.save(logits, output / name / "logits.pt")
        torch.save(weights, output / name / "weights.pt")


def weight_of(parameter: torch.nn.Parameter, engine) -> torch.Tensor:
    """In fp32 where the engine gives it (in stage 0 it knows no such weights), and as it is where not."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter) if engine.zero_optimization() else None
    return parameter if full is None else full


def main(cases: str, tokenizer: str, output: str) -> None:
    device = dist.start()
    wanted = json.loads(Path(cases).read_text())
    for name, tree in wanted["ours"].items():
        make(name, tree, Path(output), device)
    make_foreign.make(wanted["foreign"], tokenizer, Path(output) / "foreign")
    dist.barrier()


if __name__ == "__main__":
    main(*[a for a in sys.argv[1:] if not a.startswith("--local_rank")])
