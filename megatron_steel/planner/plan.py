"""`megatron-steel plan RECIPE --gpus 8xA100-80G`: will it fit, how fast, how long, what does it cost, before renting.

Needs the recipe alone: no data, no tokenizer, no GPU. Builds one tree of plain values (`--json`) that `show` prints.
"""

import math
from dataclasses import asdict
from typing import Any

from megatron_steel.errors import SteelError
from megatron_steel.planner import asked, calibrate, fits, settings, traffic
from megatron_steel.planner.disk import disk
from megatron_steel.planner.hardware import Cluster
from megatron_steel.planner.settings import Candidate
from megatron_steel.recipe import Recipe
from megatron_steel.stages import Part, parts_of

_SECONDS_A_DAY = 86_400


def plan(recipe: Recipe, name: str, cluster: Cluster, price: float | None = None) -> dict[str, Any]:
    """Everything the plan says, as plain values: bytes, seconds, tokens.

    Args:
        name: of the recipe, for what its authors say.
        price: of one GPU for one hour, in any currency.

    Raises:
        SteelError: a model that cannot be counted, a global batch that the ranks cannot share, or nothing fits (the
            smallest change that would is named).
    """
    cluster = asked.for_precision(cluster, recipe.train.precision)
    model = asked.model_of(recipe)
    batch = recipe.train.global_batch_size
    asked.require_even(recipe, cluster)
    may_checkpoint = _knows_checkpointing(model)
    found = settings.ranked(model, cluster, batch, may_checkpoint)
    if not found:
        raise _nothing_fits(model, recipe, cluster, may_checkpoint)
    tokens, steps = asked.length(recipe)
    own = asked.own_setting(recipe, model, cluster)
    best = found[0]
    parts = parts_of(recipe)
    models = {part.recipe.data.sequence_length: asked.model_of(part.recipe) for part in parts if part.number}
    stage = int(settings.zero_section(best.file)["stage"])
    return {
        "recipe": name,
        "cluster": {"gpus": str(cluster), "ranks": cluster.ranks, "nodes": cluster.nodes,
                    "node_link": cluster.node_link if cluster.nodes > 1 else None, "precision": recipe.train.precision,
                    **asdict(cluster.gpu)},
        "model": {"parameters": model.work.parameters, "gflops_per_token_hw": model.work.hw / 1e9,
                  "gflops_per_token_six_n": model.work.six_n / 1e9, "head_share": model.work.head / model.work.hw,
                  "sequence_length": model.work.sequence_length},
        "run": {"tokens": tokens, "steps": steps, "global_batch_size": batch,
                "tokens_per_step": batch * model.work.sequence_length},
        "memory": _memory_table(model, recipe, cluster, may_checkpoint),
        "settings": [_setting(c, model, cluster, _seconds(c, tokens, parts, models, cluster), price) for c in found],
        "why": settings.why(best, found, cluster),
        "recipe_as_it_is": own and {**_setting(own, model, cluster, _seconds(own, tokens, parts, models, cluster), price),
                                    "fits": fits.fits(own.memory, cluster)},
        "smallest_change": _change_of(recipe, own, model, cluster, may_checkpoint),
        "communication": _communication(model, cluster, best),
        "disk": asdict(disk(recipe, model.work.parameters, model.work.vocab_size, stage, steps, tokens)),
        "claims": _claims(name, recipe, model),
        "stages": [_stage(part, models, best, cluster) for part in parts if part.number],
        "notes": _notes(recipe, cluster, found, model),
    }  # fmt: skip


def _knows_checkpointing(model: fits.Model) -> bool:
    import torch

    from megatron_steel.model.build import construct

    with torch.device("meta"):
        return bool(construct(model.config, torch.float32).supports_gradient_checkpointing)


def _change_of(
    recipe: Recipe, own: Candidate | None, model: fits.Model, cluster: Cluster, may_checkpoint: bool
) -> str | None:
    """What the recipe must change to run here; None where it runs as it is."""
    if own is None or fits.fits(own.memory, cluster):
        return None
    change = settings.smallest_change(
        model, own.file, cluster, own.checkpointing, own.micro_batch, recipe.train.global_batch_size, may_checkpoint
    )
    return change.what if change else None


def _nothing_fits(model: fits.Model, recipe: Recipe, cluster: Cluster, may_checkpoint: bool) -> SteelError:
    last = settings.files_for(model.optimizer)[-1]
    need = settings.evaluate(model, last, cluster, may_checkpoint, 1, recipe.train.global_batch_size).memory
    stage = {"zero3_offload.json": "ZeRO-3 with offload"}.get(
        last, f"ZeRO-{last[4]}, the most that {model.optimizer} takes"
    )
    what = (f"{model.work.parameters / 1e9:.2f}B parameters do not fit {cluster}: even {stage}"
            f"{', checkpointing' if may_checkpoint else ''} and one sample of {model.work.sequence_length} tokens needs "
            f"{need.device / 1e9:.1f} GB of {fits.USABLE:.0%} x {cluster.gpu.memory_bytes / 1e9:.0f} GB")  # fmt: skip
    change = settings.smallest_change(model, last, cluster, True, 1, recipe.train.global_batch_size, may_checkpoint)
    if change:
        return SteelError(what, "--gpus", f"smallest change that fits: {change.what}")
    room = fits.USABLE * cluster.gpu.memory_bytes - need.states.device - need.head
    per_token = need.activations / model.work.sequence_length
    shorter = int(room / per_token) // 64 * 64 if room > 0 else 0
    least = math.ceil(need.device / fits.USABLE / 1e9)
    change_to = f"data.sequence_length={shorter}" if shorter else f"a GPU of {least} GB (or a smaller model)"
    return SteelError(what, "--gpus", f"smallest change that fits: {change_to}")


def _memory_table(model: fits.Model, recipe: Recipe, cluster: Cluster, may_checkpoint: bool) -> list[dict[str, Any]]:
    """A line for each shipped file, states only; activations and head at the recipe's micro-batch beside them."""
    micro = recipe.train.micro_batch_size
    table = []
    for file in ("zero0.json", *settings.FILES):
        zero = settings.zero_section(file)
        plain = fits.memory(model, zero, cluster, micro, False)
        again = fits.memory(model, zero, cluster, micro, True).activations if may_checkpoint else None
        table.append({
            "file": file, "micro_batch": micro, **asdict(plain.states), "states": plain.states.device,
            "head": plain.head, "activations": plain.activations, "activations_checkpointing": again,
            "deepspeed_device": plain.deepspeed and plain.deepspeed.device,
            "deepspeed_host": plain.deepspeed and plain.deepspeed.host,
            "total": plain.device, "fits": fits.fits(plain, cluster),
        })  # fmt: skip
    return table


def _setting(
    c: Candidate, model: fits.Model, cluster: Cluster, seconds: float | None, price: float | None
) -> dict[str, Any]:
    hours = seconds * cluster.ranks / 3600 if seconds else None
    per_gpu = c.tokens_per_second / cluster.ranks
    return {
        "file": c.file, "checkpointing": c.checkpointing, "micro_batch": c.micro_batch,
        "micro_batches": c.micro_batches, "largest_micro_batch": c.largest_micro_batch, "overrides": c.overrides,
        "memory": c.memory.device, "step_seconds": c.time.total, "communication_seconds": c.time.communication,
        "exposed_seconds": c.time.exposed, "optimizer_seconds": c.time.optimizer,
        "tokens_per_second": c.tokens_per_second, "tokens_per_second_per_gpu": per_gpu,
        "mfu_hw": per_gpu * model.work.hw / cluster.gpu.peak,
        "mfu_six_n": per_gpu * model.work.six_n / cluster.gpu.peak,
        "days": seconds / _SECONDS_A_DAY if seconds else None, "gpu_hours": hours,
        "cost": hours * price if hours is not None and price is not None else None,
    }  # fmt: skip


def _seconds(
    c: Candidate, tokens: int | None, parts: list[Part], models: dict[int, fits.Model], cluster: Cluster
) -> float | None:
    """Of the whole run, stage by stage; None where its length is not known or a stage does not fit."""
    if not models:
        return tokens / c.tokens_per_second if tokens else None
    total = 0.0
    for part in parts:
        own = _of_stage(part, models, c, cluster)
        if own is None:
            return None
        total += part.tokens / own.tokens_per_second
    return total


def _of_stage(part: Part, models: dict[int, fits.Model], c: Candidate, cluster: Cluster) -> Candidate | None:
    """The setting `c` with the sequences, the batch and the largest micro-batch of a stage; None where it does not fit."""
    model, batch = models[part.recipe.data.sequence_length], part.recipe.train.global_batch_size
    zero = settings.zero_section(c.file)
    largest = fits.largest_micro_batch(model, zero, cluster, c.checkpointing, batch)
    cuts = [m for m in settings.divisors(batch, cluster.ranks) if m <= largest]
    same = [m for m in cuts if m == c.micro_batch]  # as the setting says, where the stage can
    return settings.evaluate(model, c.file, cluster, c.checkpointing, (same or cuts)[-1], batch) if cuts else None


def _stage(part: Part, models: dict[int, fits.Model], best: Candidate, cluster: Cluster) -> dict[str, Any]:
    """A stage under the best setting."""
    own = _of_stage(part, models, best, cluster)
    return {
        "name": part.name, "steps": part.steps, "tokens": part.tokens, "fits": own is not None,
        "sequence_length": part.recipe.data.sequence_length, "global_batch_size": part.recipe.train.global_batch_size,
        "micro_batch": own and own.micro_batch, "memory": own and own.memory.device,
        "days": own and part.tokens / own.tokens_per_second / _SECONDS_A_DAY,
    }  # fmt: skip


def _communication(model: fits.Model, cluster: Cluster, best: Candidate) -> list[dict[str, Any]]:
    """Bytes that one rank sends in a step of the best setting's cut, for each scheme, and whether they hide."""
    compute = best.time.compute / best.micro_batches
    found = []
    for scheme in (1, 2, 3):
        sent = traffic.traffic(model.work.parameters, scheme, cluster.ranks)  # type: ignore[arg-type]
        each, once = (traffic.seconds(b, cluster) for b in (sent.each_micro_batch, sent.once_a_step))
        found.append({"stage": scheme, "bytes": sent.of_step(best.micro_batches),
                      "seconds": best.micro_batches * each + once,
                      "hides": each <= compute and once <= 2 / 3 * compute})  # fmt: skip
    return found


def _claims(name: str, recipe: Recipe, model: fits.Model) -> dict[str, Any] | None:
    """What the recipe's authors say it took, beside this planner's figure for the recipe as it is on their machines."""
    from megatron_steel.planner.hardware import parse_cluster
    from megatron_steel.recipe import load_recipe

    claims = calibrate.read()["claims"].get(name)
    tokens, _ = asked.length(recipe)
    if claims is None or tokens is None:
        return None
    theirs = load_recipe(name)
    if (theirs.model, asked.length(theirs)) != (recipe.model, asked.length(recipe)):
        return None  # another model, or another length: they have not said anything of it
    rows = []
    for row in claims["rows"]:
        cluster = parse_cluster(row["cluster"])
        own = asked.own_setting(recipe, model, cluster)
        best = next(iter(settings.ranked(model, cluster, recipe.train.global_batch_size)), None)
        days = {"as_it_is": own if own and fits.fits(own.memory, cluster) else None, "best": best}
        rows.append({**row, **{f"planned_days_{key}": c and tokens / c.tokens_per_second / _SECONDS_A_DAY
                               for key, c in days.items()}})  # fmt: skip
    return {"note": claims["note"], "rows": rows}


def _notes(recipe: Recipe, cluster: Cluster, found: list[Candidate], model: fits.Model) -> list[str]:
    """What the figures do not rest on."""
    from megatron_steel.model.text_to_text import is_text_to_text

    best, not_as_it_is = found[0], asked.why_not_as_it_is(recipe, cluster)
    notes = [f"{cluster.gpu.name}: {cluster.gpu.note}"] if cluster.gpu.note else []
    if not_as_it_is:
        notes.append(not_as_it_is)
    if recipe.train.batch_ramp:
        notes.append(
            "the smaller batches of train.batch_ramp are planned at the speed of the last one, which is too fast"
        )
    if best.micro_batch * model.work.sequence_length < 16384:
        notes.append(
            "micro-batches below 16,384 tokens lie outside the published rows: host and launch time is not in it"
        )
    if cluster.nodes > 64:
        notes.append("more than 64 nodes lie outside the published rows")
    if any("offload" in c.file for c in found):
        notes.append("offload: PCIe at 32 GB/s and 200 GB/s of host memory are assumed, no published row has it")
    if model.optimizer != "adamw":
        notes.append(f"{model.optimizer}: its states are counted as AdamW's, which are more")
    if is_text_to_text(model.config):
        notes.append(
            "pairs: tokens are those of responses, every prompt and response at full length; shorter prompts are faster"
        )
    if model.precision == "fp32":
        notes.append("fp32: the time is that of bf16, which is too fast")
    return notes
