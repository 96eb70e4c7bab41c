"""Tokens per second of one implementation of one recipe, in a process that measures nothing else.

`measure` times whole optimizer steps at one micro-batch after the other, each twice the one before, until memory runs out
or a larger one is no faster; all take the same samples a step. One `speed` line a size, so that nothing is lost by a crash.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu import lines, peers, runs, sizes, ways
from megatron_steel import device as device_facts
from megatron_steel.errors import TrainingError
from megatron_steel.model import build
from megatron_steel.model.flops import flops_per_token, parameters, peak_flops
from megatron_steel.recipe import Recipe
from megatron_steel.train.loop import memory_gib

WARM_UP, STEPS = 2, 8
SECONDS = 8.0
"""No further step is begun after this time, once three are timed."""
NO_FASTER = 1.01
"""Doubling ends where the larger micro-batch is not faster by so much."""


def measure(task: dict[str, Any], device: torch.device) -> None:
    """Say a `speed` line for each micro-batch of the task, and `out of memory` for the one that does not fit.

    The process must end afterwards: what a step leaves behind that ran out of memory is unknown.

    Args:
        task: recipe, way, overrides, toy, micro_batch (the first), limit (the last).
    """
    way, toy, size = ways.WAYS[task["way"]], task["toy"], task["micro_batch"]
    samples = sizes.samples_per_step(task["recipe"], toy)
    recipe = resolved(task["recipe"], [*way.overrides, *task["overrides"]], toy, size, samples, device)
    best = 0.0
    try:
        if way is ways.TRAINER:
            return _trainer(recipe, device, toy)
        run = start(way, recipe, device)
        while size <= min(task["limit"], samples):
            run.resize(size, samples // size)
            rate = _one_size(recipe, run, size, samples, device, toy)
            if rate < NO_FASTER * best:
                return
            best, size = rate, 2 * size
    except (torch.OutOfMemoryError, TrainingError) as error:
        if "out of memory" not in str(error).lower():
            raise
        lines.say("out of memory", micro_batch=size, reason=str(error)[:200])


def start(way: ways.Way, recipe: Recipe, device: torch.device) -> Any:
    """The implementation, with the recipe's model and initial weights."""
    model = runs.initial_model(recipe, device)
    kind = {ways.HAND: peers.HandWritten, ways.PLAIN: peers.PlainLoop}.get(way, runs.Ours)
    return kind(recipe, model, device)


def resolved(
    name: str, overrides: list[str], toy: bool, micro_batch: int, samples: int, device: torch.device
) -> Recipe:
    """The recipe at one size, its sharding a file: what `deepspeed.config: auto` chooses here where none is named."""
    batch = [f"train.micro_batch_size={micro_batch}", f"train.global_batch_size={samples}"]
    # What a recipe shards for eight GPUs says nothing about one.
    auto = sizes.speed_recipe(name, toy, [*batch, "deepspeed.config=auto", *overrides])
    if auto.deepspeed.config != "auto":
        return auto
    return sizes.speed_recipe(name, toy, [*batch, *overrides, f"deepspeed.config={chosen_by_auto(auto, device)}"])


def chosen_by_auto(recipe: Recipe, device: torch.device) -> str:
    return device_facts.sharding(recipe, runs.plan_of(recipe), device)


def _one_size(recipe: Recipe, run: Any, size: int, samples: int, device: torch.device, toy: bool) -> float:
    batches = runs.synthetic(recipe, size, samples // size)
    losses = [float(run.step(batches).loss) for _ in range(WARM_UP)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # building the model is not training it
    begin, seconds = time.perf_counter(), []
    while len(seconds) < (3 if toy else STEPS) and (len(seconds) < 3 or time.perf_counter() - begin < SECONDS):
        seconds.append(timed(lambda: run.step(batches), device))
    sharding = None if isinstance(run, peers.HandWritten) else recipe.deepspeed.config
    return _say(recipe, size, seconds, device, kernel=run.kernel, sharding=sharding, warm_up_loss=losses[0])


def _trainer(recipe: Recipe, device: torch.device, toy: bool) -> None:
    size, samples = recipe.train.micro_batch_size, recipe.train.global_batch_size
    model, batches = runs.initial_model(recipe, device), runs.synthetic(recipe, size, samples // size)
    limits = (3, 0.0) if toy else (STEPS, SECONDS)
    seconds, loss = peers.trainer_steps(recipe, model, device, batches, WARM_UP, *limits)
    _say(recipe, size, seconds, device, kernel="torch", sharding=recipe.deepspeed.config, warm_up_loss=loss)


def _say(recipe: Recipe, size: int, seconds: list[float], device: torch.device, **more: Any) -> float:
    samples, length = recipe.train.global_batch_size, recipe.data.sequence_length
    rate = samples * length / statistics.median(seconds)
    lines.say(
        "speed",
        micro_batch=size,
        accumulation=samples // size,
        sequence_length=length,
        tokens_per_step=samples * length,
        step_seconds=seconds,
        tokens_per_second=rate,
        memory_gib=memory_gib(device),
        reserved_gib=torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None,
        **more,
        **costs(recipe, device),
    )
    return rate


def costs(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Parameters, FLOPs per token in each convention, and the device's nominal peak."""
    config = build.build_config(recipe.model)
    flops = flops_per_token(config, recipe.data.sequence_length)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "parameters": parameters(config).total,
        "flops_per_token_hw": flops.hw if flops else None,
        "flops_per_token_causal": flops.causal if flops else None,
        "flops_per_token_6n": flops.six_n if flops else None,
        "peak_flops": peak,
    }


def profile(task: dict[str, Any], device: torch.device) -> None:
    """Say where one of our micro-batches' time goes: torch's profiler, the 25 dearest rows."""
    size = task["micro_batch"]
    recipe = resolved(task["recipe"], [], task["toy"], size, size, device)
    run, batches = start(ways.AUTO, recipe, device), runs.synthetic(recipe, size, 1)
    for _ in range(2):
        run.step(batches)
    with torch.profiler.profile() as watched:
        timed(lambda: run.step(batches), device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = watched.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)
    lines.say("profile", micro_batch=size, table=table)


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds, with everything on the device done."""
    _wait(device)
    begin = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
