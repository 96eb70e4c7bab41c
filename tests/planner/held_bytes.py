"""What the real engine holds while it trains: one JSON line from rank 0.

held_bytes.py RECIPE DS.json ...: for each DeepSpeed file two optimizer steps in bf16. Bytes are those
of all live tensors' storages, the greatest of: after the forward
pass, late in the backward pass, after it, when gradients
are laid out flat, when Adam begins.
"""

import gc
import json
import sys
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_steel import dist
from megatron_steel.model.build import build_config, build_model, decay_groups, prepare_for_training
from megatron_steel.recipe import Recipe, load_recipe
from megatron_steel.train import engine


class Watch:
    """The most bytes seen at one time, without the tensors that were there before."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # what exists now is looked at no more, which also makes a look cheap
        self.peak = 0

    def look(self, *_: Any) -> None:
        gc.collect()
        found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
        kept = {s.data_ptr(): s.nbytes() for t in found if t.device.type != "meta" and (s := t.untyped_storage())}
        self.peak = max(self.peak, sum(kept.values()))


def held(recipe: Recipe, file: str) -> int:
    """Greatest bytes held on this rank by the engine of one DeepSpeed file."""
    watch = Watch()
    model = prepare_for_training(build_model(build_config(recipe.model), seed=1))
    groups = decay_groups(model, 0.1)
    config = engine.engine_config(recipe, engine.read_config(file), dist.world_size())
    started = engine.start_engine(model, groups, recipe.optim, config, torch.device("cpu"))
    inputs = model.get_input_embeddings()
    late = inputs.register_forward_hook(lambda _module, _args, output: output.register_hook(watch.look) and None)
    adam = register_optimizer_step_pre_hook(watch.look)
    _look_after_flattening(started.optimizer, watch)
    ids = torch.zeros((1, 8), dtype=torch.int64)
    for _ in range(2):
        for _ in range(config["gradient_accumulation_steps"]):
            loss = started(input_ids=ids, labels=ids) / 8
            watch.look()
            started.backward(loss)
            del loss
            watch.look()
            started.step()
    late.remove()
    adam.remove()
    return watch.peak


def _look_after_flattening(optimizer: Any, watch: Watch) -> None:
    """Stages 1 and 2 lay a rank's gradients out flat before Adam begins and only then let the pieces go."""
    flatten = getattr(optimizer, "flatten", None)
    if flatten is None:
        return

    def observed(tensors: list[torch.Tensor]) -> torch.Tensor:
        flat: torch.Tensor = flatten(tensors)
        watch.look()
        return flat

    optimizer.flatten = observed


def main(recipe_path: str, files: list[str]) -> None:
    recipe = load_recipe(recipe_path)
    dist.start()
    peaks = {file: held(recipe, file) for file in files}
    if dist.is_main():
        print(json.dumps(peaks), flush=True)


if __name__ == "__main__":
    words = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
    main(words[0], words[1:])
