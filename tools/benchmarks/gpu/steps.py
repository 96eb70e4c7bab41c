"""Whole training steps against plain torch in fp32: every ZeRO stage, and every fused piece inside a model.

Losses, gradient norms and what the steps did to the weights are compared. Knows nothing of speed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from gpu import runs, sizes, ways
from gpu.checks import Check, compare, failed, relative
from megatron_steel.errors import SteelError
from megatron_steel.model import build
from megatron_steel.recipe import Recipe

STEPS = 6
STAGES = {"fp32": ("zero0", "zero1", "zero2", "zero3"), "bf16": ("zero1", "zero3")}
TOY_STAGES = {"fp32": ("zero3",), "bf16": ("zero3",)}
# Loss: absolute. Norm: relative. Update: Frobenius of the difference of (weights - first weights), relative.
STEP_TOLERANCE = {
    "fp32": {"loss": 1e-5, "gradient norm": 1e-4, "update": 1e-3},
    "bf16": {"loss": 5e-3, "gradient norm": 2e-2, "update": 0.2},
}


def steps(device: torch.device, name: str, toy: bool) -> Iterator[Check]:
    """`STEPS` optimizer steps at every stage against plain torch in fp32: losses, gradient norms, what weights did."""
    fp32 = sizes.parity_recipe(name, toy, settings("fp32", "zero0.json"))
    batches = [runs.synthetic(fp32, 2, 2, seed) for seed in range(STEPS)]
    twin = trace(runs.Twin(fp32, same_start(fp32).to(device), device), fp32, batches)
    for precision, files in (TOY_STAGES if toy else STAGES).items():
        for file in files:
            label = f"step {name} {file} {precision} against plain fp32"
            recipe = sizes.parity_recipe(name, toy, settings(precision, f"{file}.json"))
            try:
                got = trace(runs.Ours(recipe, same_start(recipe), device), recipe, batches)
            except Exception as error:
                yield failed(label, error)
                continue
            yield from step_checks(label, STEP_TOLERANCE[precision], got, twin)


@dataclass(frozen=True)
class Trace:
    losses: list[float]
    norms: list[float]
    update: torch.Tensor
    """All weights after the last step minus before the first, flat, in fp32 on the CPU."""


def trace(run: Any, recipe: Recipe, batches: list[list[runs.Batch]]) -> Trace:
    losses, norms = [], []
    for batch in batches:
        done = run.step(batch)
        losses.append(float(done.loss))
        norms.append(run.grad_norm(done))
    first = torch.cat([p.detach().flatten() for p in same_start(recipe).parameters()])
    return Trace(losses, norms, _weights(run) - first)


def step_checks(label: str, tolerance: dict[str, float], got: Trace, plain: Trace) -> Iterator[Check]:
    loss = max(abs(a - b) for a, b in zip(got.losses, plain.losses, strict=True))
    norm = max(abs(a / b - 1) for a, b in zip(got.norms, plain.norms, strict=True))
    yield compare(f"{label}: loss", loss, tolerance["loss"])
    yield compare(f"{label}: gradient norm", norm, tolerance["gradient norm"])
    yield compare(f"{label}: update", relative(got.update, plain.update), tolerance["update"])


def same_start(recipe: Recipe) -> Any:
    return build.build_model(build.build_config(recipe.model), recipe.run.seed)


def settings(precision: str, file: str) -> list[str]:
    """Overrides of a run that parity is measured of: two micro-batches of two samples a step."""
    batch = ["train.global_batch_size=4", "train.micro_batch_size=2"]
    return [*batch, f"train.precision={precision}", f"deepspeed.config={file}"]


def _weights(run: Any) -> torch.Tensor:
    if isinstance(run, runs.Twin) or not run.engine.zero_optimization():
        model = run.model if isinstance(run, runs.Twin) else run.engine.module
        return torch.cat([p.detach().float().flatten().cpu() for p in model.parameters()])
    from deepspeed.utils import safe_get_full_fp32_param

    return torch.cat([safe_get_full_fp32_param(p).float().flatten().cpu() for p in run.engine.module.parameters()])


def pieces(device: torch.device, toy: bool) -> Iterator[Check]:
    """Every value of `kernels.*` inside a model, bf16 at stage 1, against plain torch in fp32, within bf16's tolerance.

    One piece is as asked for, the others are plain, so that a difference is that piece's.
    """
    if "kernels" not in {f.name for f in fields(Recipe)}:
        yield Check("kernels", "not run", None, None, "the recipes of this tree have no section kernels")
        return
    name, plain = "zh-1b", dict(_PLAIN_PIECES)
    fp32 = sizes.parity_recipe(name, toy, settings("fp32", "zero0.json"))
    batches = [runs.synthetic(fp32, 2, 2, seed) for seed in range(STEPS)]
    twin = trace(runs.Twin(fp32, same_start(fp32).to(device), device), fp32, batches)
    for key, values in (ways.TOY_PIECES if toy else ways.PIECES).items():
        for value in values:
            label = f"{key}={value} {name} bf16 against plain fp32"
            chosen = [f"{k}={v}" for k, v in (plain | {key: value}).items()]
            yield from _piece(label, name, toy, chosen, device, batches, twin)


_PLAIN_PIECES = (("kernels.head", "plain"), ("kernels.attention", "math"), ("kernels.fused", "torch"),
                 ("kernels.compile", "false"))  # fmt: skip


def _piece(
    label: str, name: str, toy: bool, chosen: list[str], device: torch.device, batches: Any, twin: Trace
) -> Iterator[Check]:
    try:
        recipe = sizes.parity_recipe(name, toy, [*settings("bf16", "zero1.json"), *chosen])
        got = trace(runs.Ours(recipe, same_start(recipe), device), recipe, batches)
    except SteelError as error:  # asked for by name, and it cannot run here: it says what is missing
        yield Check(label, "not run", None, None, " ".join(str(error).split()))
    except Exception as error:
        yield failed(label, error)
    else:
        yield from step_checks(label, STEP_TOLERANCE["bf16"], got, twin)


def documents(device: torch.device, toy: bool) -> Iterator[Check]:
    """Packed documents that do not see each other, in the way that `auto` takes here, against a dense mask in fp32."""
    name = "zh-1b"
    fp32 = sizes.parity_recipe(name, toy, [*settings("fp32", "zero0.json"), "data.document_mask=true"])
    batches = [[_cut(b) for b in runs.synthetic(fp32, 2, 2, seed)] for seed in range(STEPS)]
    twin = trace(runs.Twin(fp32, same_start(fp32).to(device), device), fp32, batches)
    for precision, file in (("fp32", "zero0.json"), ("bf16", "zero1.json")):
        recipe = sizes.parity_recipe(name, toy, [*settings(precision, file), "data.document_mask=true"])
        got = trace(runs.Ours(recipe, same_start(recipe), device), recipe, batches)
        label = f"packed documents {name} {precision} against a dense mask in fp32"
        yield from step_checks(label, STEP_TOLERANCE[precision], got, twin)


def _cut(batch: runs.Batch) -> runs.Batch:
    """The batch with a document's end after every 13th token of the first row, every 29th of the second, and so on."""
    rows, length = batch["input_ids"].shape
    places = torch.arange(length)
    return batch | {"document_ids": torch.stack([places // (13 + 16 * row) for row in range(rows)])}
