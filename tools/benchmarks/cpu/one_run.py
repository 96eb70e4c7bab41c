"""One training run of one way, in a process (or ranks) of its own; every step's wall and CPU time goes to a file.

    one_run.py WAY RECIPE.yaml OUT.json BEGAN STEPS

`ours` is `pretrain` itself. `raw` is the loop that one writes around DeepSpeed: the same model and engine, a torch DataLoader
over the memory-mapped tokens, the loss looked at every ten steps. `trainer` is transformers' Trainer with DeepSpeed, given the
same model and loss, so that what differs is the loop. BEGAN is when the parent started this process (seconds since 1970).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]
MARKS: list[tuple[float, float, float]] = []


def mark() -> None:
    """A step has ended."""
    MARKS.append((time.time(), time.perf_counter(), time.process_time()))


def ours(recipe: str, folder: Path, steps: int) -> None:
    from megatron_steel.pretrain import run
    from megatron_steel.train import loop

    train_step = loop.train_step

    def marked(job: Any) -> Any:
        done = train_step(job)
        mark()
        return done

    loop.train_step = marked  # type: ignore[assignment]
    run(recipe, [f"run.dir={folder}", f"train.steps={steps}"])


def raw(recipe: str, folder: Path, steps: int) -> None:
    from gpu import runs

    from megatron_steel import dist
    from megatron_steel.model import build
    from megatron_steel.recipe import accumulation_steps, load_recipe
    from megatron_steel.train import engine as engines

    settings = load_recipe(recipe)
    device = dist.start()
    model = build.build_model(build.build_config(settings.model), settings.run.seed)
    runs.prepare(model, settings, device)
    groups = build.decay_groups(model, settings.optim.weight_decay, settings.optim.weight_decay_on)
    config = engines.engine_config(settings, engines.read_config(settings.deepspeed.config), dist.world_size())
    engine = engines.start_engine(model, groups, settings.optim, config, device)
    batches = _batches(settings, dist.rank(), dist.world_size())
    accumulation = accumulation_steps(settings.train, dist.world_size())
    tokens = settings.train.micro_batch_size * settings.data.sequence_length
    for group in engine.optimizer.param_groups:
        group["lr"] = settings.optim.lr
    for step in range(steps):
        for _ in range(accumulation):
            loss = engine(**next(batches)) / tokens
            engine.backward(loss)
            engine.step()
        if step % settings.train.log_every_steps == 0:
            print(step, float(loss))
        mark()


def trainer(recipe: str, folder: Path, steps: int) -> None:
    from gpu import peers, runs
    from transformers import Trainer, TrainerCallback

    from megatron_steel import dist
    from megatron_steel.model import build
    from megatron_steel.recipe import load_recipe
    from megatron_steel.train import engine as engines

    settings = load_recipe(recipe)
    device = dist.start()
    engines.quiet_deepspeed(device)
    model = build.build_model(build.build_config(settings.model), settings.run.seed)
    runs.prepare(model, settings, device)
    tokens = settings.train.micro_batch_size * settings.data.sequence_length

    class Same(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(**inputs) / tokens

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            mark()

    arguments = peers.trainer_arguments(settings, device, str(folder), steps, fast=False)
    Same(model=model, args=arguments, train_dataset=Blocks(settings), callbacks=[Marks()]).train()


class Blocks:
    """The samples of one memory-mapped file of tokens, for a torch DataLoader."""

    def __init__(self, settings: Any):
        import numpy as np

        self._length = settings.data.sequence_length
        self._tokens = np.memmap(f"{settings.data.train}.bin", np.uint16, "r")

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, number: int) -> dict[str, Any]:
        import numpy as np
        import torch

        begin = number * self._length
        row = torch.from_numpy(self._tokens[begin : begin + self._length + 1].astype(np.int64))
        return {"input_ids": row[:-1], "labels": row[1:]}


def _batches(settings: Any, rank: int, world: int) -> Any:
    import torch

    data = Blocks(settings)
    sampler = torch.utils.data.DistributedSampler(data, world, rank, shuffle=True)  # type: ignore[arg-type]
    while True:
        yield from torch.utils.data.DataLoader(data, settings.train.micro_batch_size, sampler=sampler)  # type: ignore[arg-type]


def main() -> None:
    way, recipe, out, began, steps = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    file = Path(out)
    {"ours": ours, "raw": raw, "trainer": trainer}[way](recipe, file.with_suffix(".run"), int(steps))
    from megatron_steel import dist

    if dist.is_main():
        file.write_text(json.dumps({"began": float(began), "marks": MARKS}), encoding="utf-8")


if __name__ == "__main__":
    main()
