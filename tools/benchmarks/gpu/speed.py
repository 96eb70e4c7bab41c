"""Tokens per second of one implementation of one recipe, in a process that measures nothing else.

1. `probe` doubles the micro-batch until memory runs out and times a step at each size.
2. `measure` times whole optimizer steps at one size, after warm-up, and reports every one of them.
3. `head` times the language-model head alone: ours, whole logits, and Liger's where it is installed.
"""

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gpu import lines, runs, sizes
from megatron_steel.errors import TrainingError
from megatron_steel.model import build
from megatron_steel.model.flops import flops_per_token, parameters, peak_flops
from megatron_steel.model.memory import activation_bytes_per_sample
from megatron_steel.recipe import Recipe
from megatron_steel.train.engine import smallest_stage_that_fits
from megatron_steel.train.loop import memory_gib

WARM_UP, STEPS = 2, 8
SECONDS = 14.0
"""No further step is begun after this time, once three are timed."""
IMPLEMENTATIONS = {
    "ours auto": "our engine, sharding chosen by deepspeed.config: auto",
    "ours zero3": "our engine, zero3.json",
    "plain": "plain PyTorch: transformers model with its own loss, bf16 autocast over fp32 weights, torch fused AdamW",
}


def probe(name: str, implementation: str, device: torch.device, toy: bool, first: int, limit: int) -> None:
    """Say one `probe` line a micro-batch from `first` to `limit`; the last one may be out of memory.

    The process must end afterwards: what a step leaves behind that ran out of memory is unknown.
    """
    recipe, run = _start(name, implementation, device, toy, first, first)
    size = first
    while size <= limit:
        try:
            batches = runs.synthetic(recipe, size, 1)
            run.step(batches)
            seconds = _timed(lambda b=batches: run.step(b), device)
        except (torch.OutOfMemoryError, TrainingError) as error:
            lines.say("probe", micro_batch=size, fits=False, tokens_per_second=None, reason=str(error)[:200])
            return
        rate = size * recipe.data.sequence_length / seconds
        lines.say("probe", micro_batch=size, fits=True, tokens_per_second=rate, memory_gib=memory_gib(device))
        size *= 2


def measure(name: str, implementation: str, device: torch.device, toy: bool, micro_batch: int) -> None:
    """Say one `speed` line: every step's seconds, memory, losses, and the recipe's FLOPs per token."""
    samples = sizes.samples_per_step(toy)
    recipe, run = _start(name, implementation, device, toy, micro_batch, samples)
    batches = runs.synthetic(recipe, micro_batch, samples // micro_batch)
    losses = []
    try:
        for _ in range(WARM_UP):
            losses.append(float(run.step(batches).loss))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # building the model is not training it
        begin, seconds = time.perf_counter(), []
        while len(seconds) < STEPS and (len(seconds) < 3 or time.perf_counter() - begin < SECONDS):
            seconds.append(_timed(lambda: run.step(batches), device))
    except (torch.OutOfMemoryError, TrainingError) as error:
        lines.say("out of memory", micro_batch=micro_batch, reason=str(error)[:200])
        return
    tokens = samples * recipe.data.sequence_length
    lines.say(
        "speed",
        sharding=recipe.deepspeed.config if implementation != "plain" else None,
        micro_batch=micro_batch,
        accumulation=samples // micro_batch,
        sequence_length=recipe.data.sequence_length,
        tokens_per_step=tokens,
        step_seconds=seconds,
        tokens_per_second=tokens / statistics.median(seconds),
        memory_gib=memory_gib(device),
        reserved_gib=torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None,
        kernel=run.kernel,
        first_loss=losses[0],
        **_costs(recipe, device),
    )


def profile(name: str, device: torch.device, toy: bool, micro_batch: int) -> None:
    """Say where one of our micro-batches' time goes: torch's profiler, the 25 dearest rows."""
    recipe, run = _start(name, "ours auto", device, toy, micro_batch, micro_batch)
    batches = runs.synthetic(recipe, micro_batch, 1)
    for _ in range(WARM_UP):
        run.step(batches)
    with torch.profiler.profile() as watched:
        _timed(lambda: run.step(batches), device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = watched.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)
    lines.say("profile", micro_batch=micro_batch, table=table)


def head(device: torch.device, toy: bool) -> None:
    """Say one `head` line an implementation: milliseconds forward and backward, and memory above the inputs."""
    from gpu.parity import head_inputs
    from megatron_steel.model.head import ChunkedHead

    tokens, width, words = (64, 16, 257) if toy else (16_384, 1792, 151_936)  # steel-1b's micro-batch of 8
    hidden, weight, labels = head_inputs(device, "bf16", tokens, width, words)
    hidden.requires_grad_()
    linear = torch.nn.Linear(width, words, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight)
    chunked = ChunkedHead(linear)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: chunked(hidden, labels),
        "plain": lambda: F.cross_entropy(F.linear(hidden, linear.weight).float(), labels, reduction="sum"),
    }
    if importlib.util.find_spec("liger_kernel") and device.type == "cuda":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

        ways["liger"] = lambda: fused(hidden, linear.weight, labels, reduction="sum")
    else:
        lines.say("note", text="liger: not installed" if device.type == "cuda" else "liger: needs a GPU")
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for _ in range(5):  # alternating, so that a clock that slows down slows all of them
        for way, loss in ways.items():
            try:
                seconds, peaks[way] = _forward_and_backward(loss, [hidden, linear.weight], device)
                times[way].append(seconds)
            except torch.OutOfMemoryError as error:
                lines.say("note", text=f"head {way}: {str(error)[:200]}")
    sizes_used = {"tokens": tokens, "width": width, "words": words}
    for way, seconds in times.items():
        later = seconds[1:]  # the first run of a kernel picks and compiles it
        if later:
            median = 1000 * statistics.median(later)
            gib = peaks[way] if device.type == "cuda" else None
            lines.say("head", way=way, milliseconds=median, raw_seconds=seconds, extra_gib=gib, **sizes_used)


def _forward_and_backward(
    loss: Callable[[], torch.Tensor], wanted: list[torch.Tensor], device: torch.device
) -> tuple[float, float]:
    before = 0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = _timed(lambda: torch.autograd.grad(loss(), wanted), device)
    after = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return seconds, (after - before) / 2**30


def _start(
    name: str, implementation: str, device: torch.device, toy: bool, micro_batch: int, samples: int
) -> tuple[Recipe, Any]:
    file = "zero3.json" if implementation == "ours zero3" else "zero1.json"
    recipe = _recipe(name, file, toy, micro_batch, samples)
    if implementation == "ours auto":
        recipe = _recipe(name, _chosen_by_auto(recipe, device), toy, micro_batch, samples)
    model = runs.initial_model(recipe, device)
    run = runs.Plain(recipe, model, device) if implementation == "plain" else runs.Ours(recipe, model, device)
    return recipe, run


def _recipe(name: str, file: str, toy: bool, micro_batch: int, samples: int) -> Recipe:
    batch = [f"train.micro_batch_size={micro_batch}", f"train.global_batch_size={samples}"]
    return sizes.speed_recipe(name, toy, [*batch, f"deepspeed.config={file}"])


def _chosen_by_auto(recipe: Recipe, device: torch.device) -> str:
    config = build.build_config(recipe.model)
    length, train = recipe.data.sequence_length, recipe.train
    sample = activation_bytes_per_sample(config, length, train.precision, train.activation_checkpointing)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return smallest_stage_that_fits(parameters(config).total, sample * train.micro_batch_size, memory, 1)


def _costs(recipe: Recipe, device: torch.device) -> dict[str, Any]:
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


def _timed(action: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
