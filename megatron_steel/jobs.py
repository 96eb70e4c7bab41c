"""A stage of a run as the loop takes it: its data, its save and its way back where the loss spikes. And the way to the next.

A run without stages is one of these. The engine, the monitor and the run's folder stay from stage to stage (`Running`).
Knows nothing of how an engine is started.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import device as device_facts
from megatron_steel import dist, preflight, run_folder, stages
from megatron_steel.errors import Stopped
from megatron_steel.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from megatron_steel.checkpoint.commit import Checkpoint
    from megatron_steel.data.loader import Loader
    from megatron_steel.data.order import OrderState
    from megatron_steel.train.loop import Job
    from megatron_steel.train.monitor import Monitor
    from megatron_steel.train.spikes import Spikes
    from megatron_steel.train.state import Progress
    from megatron_steel.train.watch import Watch


@dataclass(frozen=True)
class Running:
    """What stays as it is from stage to stage."""

    engine: "DeepSpeedEngine"
    group_names: list[list[str]]
    monitor: "Monitor"
    watch: "Watch"
    device: "torch.device"
    folder: Path
    run_steps: int
    """Of the whole run."""
    parts: list[stages.Part]


def next_stage(
    running: Running, part: stages.Part, plan: preflight.RunPlan, step: int
) -> "tuple[Checkpoint, OrderState]":
    """Between two stages: the checkpoint that the one before has left at `step`, and the order of data from there on.

    A run that was stopped here goes on in the same way. Raises Stopped where somebody wants that.
    """
    from megatron_steel.checkpoint.commit import name_of, read_manifest

    watch = running.watch
    if watch.agreed_stop():
        raise Stopped(f"stopped at step {step} of {running.run_steps} on request, before {stages.described(part)}")
    checkpoint = dist.together(lambda: read_manifest(running.folder / "checkpoints" / name_of(step)))
    assert checkpoint is not None
    order = preflight.plan_order(part.recipe, plan.train, part.first_step + part.steps, checkpoint)
    dist.log.info("%s", stages.described(part))
    watch.new_shapes()
    return checkpoint, order


@contextlib.contextmanager
def job_of(
    running: Running,
    part: stages.Part,
    plan: preflight.RunPlan,
    config: dict[str, Any],
    order: "OrderState",
    checkpoint: "Checkpoint | None",
    progress: "Progress",
) -> "Iterator[Job]":
    """A stage of the run, or all of one without stages, as the loop takes it: from `progress` on, over its own data."""
    from megatron_steel.data.loader import Loader
    from megatron_steel.train import loop, replicas, state

    recipe, engine, monitor, watch, device = part.recipe, running.engine, running.monitor, running.watch, running.device
    steps = preflight.total_steps(recipe, plan.train, checkpoint)
    spikes = _spikes(recipe, progress, order)
    facts = run_folder.facts_of(recipe, plan, config, checkpoint) | stages.facts_of(part, running.parts)
    dataset = preflight.open_dataset(plan.train, order, recipe.data.sequence_length)
    cut = recipe.train.global_batch_size, recipe.train.micro_batch_size, dist.rank(), dist.world_size()
    pin = device.type == "cuda"
    stage = {"stage": part.number} if part.number else {}
    with Loader(dataset, order, *cut, document_mask=recipe.data.document_mask, pin=pin) as loader:

        def save(step: int, tokens: int) -> Path:
            replicas.compare(engine, step)
            seen = spikes.to_json() if spikes else None
            now = state.Progress(step, tokens, loader.state.to_json(), watch.skipped_steps, seen)
            kept = recipe.train.keep_last, recipe.train.keep_every_steps
            with watch.saving():
                return state.save(engine, running.folder / "checkpoints", now, facts, running.group_names, *kept)

        yield loop.Job(
            engine=engine,
            recipe=recipe,
            monitor=monitor,
            watch=watch,
            next_batches=loader.step,
            labels_ahead=loader.labels_ahead,
            validation=preflight.validation_batches_of(recipe, plan),
            prompts=plan.prompts,
            save=state.Saves(save),
            position=lambda: {**preflight.position(loader.state, plan.train), **stage},
            out_of_memory=device_facts.out_of_memory(recipe, plan, device),
            spikes=spikes,
            roll_back=lambda: spikes and _roll_back(recipe, plan, engine, loader, monitor, watch, spikes),
            steps=steps,
            run_steps=running.run_steps,
            total_tokens=total_tokens(recipe, steps, checkpoint),
            step=progress.step,
            tokens=progress.tokens,
            flops_per_token=plan.flops_per_token,
            peak_flops=device_facts.peak_flops_of(device),
        )


def _spikes(recipe: Recipe, progress: "Progress", order: "OrderState") -> "Spikes | None":
    """What a checkpoint has seen of the losses, if they can be compared with those to come."""
    from megatron_steel.data.order_json import from_json
    from megatron_steel.train.spikes import Spikes

    if recipe.train.spike_score is None:
        return None
    if progress.spikes is None or from_json(progress.order, "checkpoint").segments != order.segments:
        return Spikes(recipe.train.spike_score, since=progress.step)
    return Spikes(recipe.train.spike_score, **progress.spikes)


def _roll_back(
    recipe: Recipe,
    plan: preflight.RunPlan,
    engine: "DeepSpeedEngine",
    loader: "Loader",
    monitor: "Monitor",
    watch: "Watch",
    spikes: "Spikes",
) -> tuple[int, int] | None:
    """Put everything back to before a confirmed spike. Returns (step, tokens) there; None: there is no way back."""
    from megatron_steel.checkpoint.commit import discard_after
    from megatron_steel.data.order_json import from_json
    from megatron_steel.train import state
    from megatron_steel.train.spikes import plan_roll_back

    folder, at = Path(recipe.run.dir).expanduser() / "checkpoints", spikes.suspects[-1]
    with watch.saving():  # whole checkpoints are hashed
        back = plan_roll_back(
            spikes,
            folder,
            loader.state,
            lambda c: from_json(c.manifest["order"], c.path),
        )
    if back is None:
        if dist.is_main():
            dist.log.warning("step %d: the loss has spiked and no checkpoint is older: the run goes on as it is", at)
        spikes.forget(at)
        return None
    with watch.saving():  # it reads and deletes as much as a save writes
        progress = state.restore(engine, back.checkpoint)
        dist.together(lambda: discard_after(folder, progress.step), only=dist.is_main())
        dataset = preflight.open_dataset(plan.train, back.order, recipe.data.sequence_length)
        loader.reopen(dataset, back.order)
    monitor.go_back(progress.step)
    watch.skipped_steps = progress.skipped_steps
    spikes.back_to(progress.step, progress.spikes, back.done)
    monitor.scalars(progress.step, {"tokens": progress.tokens, "spike_at_step": back.done["step"],
                    "skipped_from_sample": back.done["start"], "skipped_to_sample": back.done["stop"]})  # fmt: skip
    if dist.is_main():
        dist.log.warning("the loss has spiked at step %d: back to %s, and on without samples %d to %d", back.done["step"],
                         back.checkpoint.path, back.done["start"], back.done["stop"] - 1)  # fmt: skip
    return progress.step, progress.tokens


def total_tokens(recipe: Recipe, steps: int, checkpoint: "Checkpoint | None") -> int:
    """Tokens that the run will have trained on when it is complete; of pairs the most that there can be."""
    done = checkpoint.manifest["tokens"] if checkpoint else 0
    return done + preflight.samples_to_come(recipe, steps, checkpoint) * recipe.data.sequence_length
