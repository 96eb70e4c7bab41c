"""`pretrain --dry-run`: the run as it would start, two timed steps on its own data, and what they say of the rest.

Everything is real but the folder: the run's own is read and never written, and what a start writes goes to a scratch
folder that is deleted. Estimates before anything is built are the planner's; here are only measured figures.
"""

import contextlib
import dataclasses
import datetime
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_steel import device as device_facts
from megatron_steel import dist
from megatron_steel.checkpoint.commit import published
from megatron_steel.planner.disk import checkpoints_at_most, disk

if TYPE_CHECKING:
    from megatron_steel.train.loop import Job

_STEPS = 2  # the first also connects, allocates and compiles; the second is the measure


@contextlib.contextmanager
def scratch(wanted: bool) -> Iterator[Path | None]:
    """A folder for what a start writes, deleted on leaving; None where it is not wanted."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="megatron-steel-dry-run-") as folder:
        yield Path(folder)


def rehearse(job: "Job", parameters: int, causal: bool | None) -> None:
    """Make the next two steps of a run that nobody will save, and print the plan for the rest; a collective call."""
    from megatron_steel.train import loop

    # Each of its steps is one that would be logged: its loss is wanted.
    job.recipe = dataclasses.replace(job.recipe, train=dataclasses.replace(job.recipe.train, log_every_steps=1))
    first, seconds, tokens = job.step, [0.0], 0
    while job.step < min(first + _STEPS, job.steps):
        job.step += 1
        begin = time.perf_counter()
        done = loop.train_step(job)
        _wait_for(job)
        seconds.append(dist.max_over_ranks([time.perf_counter() - begin])[0])
        tokens = done.tokens
        dist.log.info("dry run: step %d | loss %.4f | %.3f s", job.step, done.loss, seconds[-1])
    memory = dist.max_over_ranks([loop.memory_gib(job.engine.device)])[0]
    device = device_facts.device_bytes(job.engine.device) / 2**30
    verdict = {True: "causal", False: "SEES THE FUTURE", None: "could not be found out"}[causal]
    lines = [
        f"audit:     {verdict}",
        *_speed(
            job,
            seconds[-1],
            tokens,
            job.run_steps - first,
            " at this stage's speed" if job.run_steps > job.steps else "",
        ),
        f"memory:    {memory:.2f} GiB at most on a rank, of {device:.1f} GiB",
        _disk(job, parameters),
    ]
    dist.log.info("dry run: everything checks; nothing is kept\n  %s", "\n  ".join(lines))


def _speed(job: "Job", seconds: float, tokens: int, steps: int, so: str) -> list[str]:
    """Of the last step made, and what that means for all steps that are left."""
    per_second = tokens / seconds
    share = ""
    if job.peak_flops:
        share = f", {per_second * job.flops_per_token / (job.peak_flops * dist.world_size()):.1%} of peak"
    return [
        f"speed:     {seconds:.3f} s a step, {per_second:,.0f} tokens/s{share}",
        f"left:      {steps:,} steps, {steps * tokens:,} tokens{so}: {duration(seconds * steps)}; "
        "evaluations, saves and stops come on top",
    ]


def duration(seconds: float) -> str:
    """With the date of its end, where the calendar has that."""
    days = seconds / 86400
    try:
        left = datetime.timedelta(seconds=round(seconds))
        end = datetime.datetime.now() + left
    except OverflowError:  # beyond the year 9999
        return f"{days:,.0f} days ({days / 365.25:,.0f} years)"
    return f"{left} ({days:.1f} days), until {end:%Y-%m-%d %H:%M}"


def _disk(job: "Job", parameters: int) -> str:
    """The most that the run's checkpoints will take, and what is free for those that are not there yet."""
    folder = Path(job.recipe.run.dir).expanduser().absolute()
    each = disk(job.recipe, parameters, 0, job.engine.zero_optimization_stage(), job.run_steps, None).checkpoint
    most = checkpoints_at_most(job.recipe.train, job.run_steps)
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    if each * (most - len(published(folder / "checkpoints"))) > free and dist.is_main():
        dist.log.warning("the disk has no room for the checkpoints of this run: see below")
    return (
        f"disk:      {each * most / 2**30:.2f} GiB for checkpoints of about {each / 2**30:.2f} GiB ({most:,} at a time), "
        f"{free / 2**30:.1f} GiB free"
    )


def _wait_for(job: "Job") -> None:
    if job.engine.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
