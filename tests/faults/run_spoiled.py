"""Several runs in the same ranks, as run_many.py, with spoilt numbers: run_spoiled.py RECIPE WORD... + WORD... + ...

A word is an override of the recipe, or
- STEP:RANK:WHAT, which spoils one step of one rank: `nan-loss`, `inf-loss` (the gradients stay finite), `nan-gradient`,
  `-inf-gradient` (the loss stays finite), `flip` (a bit of the first weight flips after the step);
- cursed:FILE, a JSON list of samples (`name_of`): where a batch holds one, its loss and gradients are a hundredfold;
- ids:FILE, which gets a line {"step", "rows"} for each step: the samples rank 0 was handed.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import torch

from megatron_steel import dist
from megatron_steel.model import build
from megatron_steel.pretrain import run
from megatron_steel.train import loop

FAULT = re.compile(r"(\d+):(\d+):(.+)")
_prepare, _step = build.prepare_for_training, loop.train_step


class _SpoilGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, factor):
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def name_of(row) -> str:
    """A sample by its input tokens."""
    return hashlib.sha256(str([int(token) for token in row]).encode()).hexdigest()[:16]


def spoilt(loss, what: str):
    if what.endswith("-loss"):
        return loss + float(what.removesuffix("-loss"))
    if what.endswith("-gradient"):
        return _SpoilGradient.apply(loss, float(what.removesuffix("-gradient")))
    return loss


def install(words: list[str]) -> list[str]:
    """Arrange for the faults among the words; returns the overrides."""
    found = {word: FAULT.fullmatch(word) for word in words}
    faults = {(int(f[1]), int(f[2])): f[3] for f in found.values() if f}
    files = dict(word.split(":", 1) for word in words if word.startswith(("cursed:", "ids:")))
    cursed = set(json.loads(Path(files["cursed"]).read_text())) if "cursed" in files else set()
    now = {"step": 0, "fresh": False}

    def hook(model, arguments, batch, loss):
        if not model.training:
            return loss
        fault = faults.get((now["step"], dist.rank())) if now["fresh"] else None
        now["fresh"] = False
        if cursed and any(name_of(row) in cursed for row in batch["input_ids"]):
            loss = loss * 100
        return spoilt(loss, fault) if fault else loss

    def prepare(*arguments):
        model = _prepare(*arguments)
        model.register_forward_hook(hook, with_kwargs=True)
        return model

    def step(job):
        now.update(step=job.step, fresh=True)
        fetch, fetched = job.next_batches, []
        job.next_batches = lambda: fetched.extend(fetch()) or fetched
        done = _step(job)
        job.next_batches = fetch
        if "ids" in files and dist.is_main():
            with open(files["ids"], "a") as file:
                rows = [name_of(row) for batch in fetched for row in batch["input_ids"]]
                file.write(json.dumps({"step": job.step, "rows": rows}) + "\n")
        if faults.get((job.step, dist.rank())) == "flip":
            weight = next(job.engine.module.parameters()).data.view(-1)
            weight.view({4: torch.int32, 2: torch.int16}[weight.element_size()])[0] ^= 1 << 3
        return done

    build.prepare_for_training, loop.train_step = prepare, step
    return [word for word in words if not found[word] and word.partition(":")[0] not in files]


if __name__ == "__main__":
    recipe, *words = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
    dist.set_up_logging()
    while words:
        cut = words.index("+") if "+" in words else len(words)
        overrides = install(words[:cut])
        code = dist.exit_code(lambda overrides=overrides: run(recipe, overrides))
        words = words[cut + 1 :]
        if code:
            sys.exit(code)
