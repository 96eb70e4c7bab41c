"""What `deepspeed --module megatron_steel.pretrain RECIPE [key.path=value ...]` starts on every rank.

1. `plan_run` checks the recipe against data, tokenizer and model, so that bad input ends before anything is built.
2. `_train` builds and audits the model, starts the engine, goes on from the newest whole checkpoint, and hands a `Job` to the
   loop: one for each stage that is not over, or one for all of a run without stages. The engine stays, its state too.

Exit codes are those of `errors.py`; all ranks leave together. A guard thread ends a rank that cannot (`train/guard.py`).
"""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import device as device_facts
from megatron_steel import dist, jobs, nodes_agree, preflight, rehearsal, run_folder, stages
from megatron_steel.errors import EXIT_DONE, SteelError, Stopped
from megatron_steel.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from megatron_steel.checkpoint.commit import Checkpoint
    from megatron_steel.model.kernels import Choice
    from megatron_steel.train.guard import Guard
    from megatron_steel.train.report import Report
    from megatron_steel.train.watch import Watch


_USAGE = """usage: deepspeed [--num_gpus N] --module megatron_steel.pretrain RECIPE [key.path=value ...] [--dry-run]

Train a recipe (a shipped name or a YAML file) on every GPU, from where its run folder stands.

  --dry-run   build and audit everything, time two steps, say what the rest takes, leave nothing

`megatron-steel launch RECIPE` does the same and starts again after a crash; `megatron-steel recipes` lists the names."""


def main(argv: list[str]) -> int:
    """The launcher's entry: drops its `--local_rank=N`, keeps `--dry-run` and the supervisor's folder. Returns the exit code."""
    from megatron_steel.train.report import OPTION, Report

    dist.set_up_logging()
    arguments = [a for a in argv if not a.startswith("--local_rank=")]
    if {"-h", "--help"} & set(arguments):
        if dist.is_main():
            print(_USAGE)
        return EXIT_DONE
    folders = [a.removeprefix(OPTION) for a in arguments if a.startswith(OPTION)]
    report = Report(Path(folders[0]) if folders else None)
    dry_run = "--dry-run" in arguments
    words = [a for a in arguments if a != "--dry-run" and not a.startswith(OPTION)]
    code = dist.exit_code(lambda: run(*_recipe_of(words), dry_run, report))
    report.end(code)
    return code


def _recipe_of(words: list[str]) -> tuple[str, list[str]]:
    """(recipe, overrides). Raises SteelError on options that there are not, and without a recipe."""
    unknown = [word for word in words if word.startswith("-")]
    if unknown or not words:
        what = f"there is no option {unknown[0]}" if unknown else "no recipe is named"
        raise SteelError(what, "command line", _USAGE.splitlines()[0].removeprefix("usage: "))
    return words[0], words[1:]


def run(name: str, overrides: list[str], dry_run: bool = False, report: "Report | None" = None) -> None:
    """Train a recipe to its end, from where its run folder stands.

    Raises:
        SteelError: bad recipe or data, on all ranks alike.
        Stopped: a stop was asked for; everything is saved.
        StoppedEarly: a stop was asked for before the first step, on this rank alone.
    """
    from megatron_steel.train.guard import Guard
    from megatron_steel.train.report import Report
    from megatron_steel.train.watch import Watch

    recipe = load_recipe(name, overrides)
    os.umask(os.umask(0o077) | stat.S_IWOTH)  # checkpoints are for their owner, and perhaps a group, to change
    watch = Watch(recipe.train.stop_after_minutes)
    folder = Path(recipe.run.dir).expanduser()
    # Before anything slow, so that no signal is lost.
    with Guard(watch, report or Report(None), folder, recipe.train.hang_after_seconds) as guard:
        if recipe.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        device = dist.start()
        together = False
        try:
            with _deterministic(recipe.train.deterministic), rehearsal.scratch(dry_run) as scratch:
                _train(recipe, watch, guard, device, scratch)
            together = True
        except SteelError as error:
            together = error.shared
            raise
        except Stopped:
            together = True
            raise
        finally:
            if together:
                with watch.saving():  # the first rank may still be deleting: nobody's patience may end meanwhile
                    dist.barrier()  # the launcher kills the others as soon as one rank has left with an error
            watch.leave()


def _train(recipe: Recipe, watch: "Watch", guard: "Guard", device: "torch.device", scratch: Path | None = None) -> None:
    """`scratch`: this is a dry run: what it writes goes there, and the run folder is only read."""
    from megatron_steel.checkpoint.commit import published, warn_of_space
    from megatron_steel.model.build import require_start
    from megatron_steel.train import engine as engines
    from megatron_steel.train import loop, state
    from megatron_steel.train.evaluate import is_evaluated
    from megatron_steel.train.monitor import Monitor

    folder = Path(recipe.run.dir).expanduser()
    dist.together(lambda: engines.refuse_precision(recipe.train.precision, device))
    parts = dist.together(lambda: stages.parts_of(recipe)) or []
    plans = [preflight.plan_run(part.recipe) for part in parts]  # of all, so that no stage fails after weeks
    if any(plan.pairs for plan in plans):
        dist.together(lambda: stages.refuse_tokens(recipe))
    widest, its_plan = max(
        zip([part.recipe for part in parts], plans, strict=True),
        key=lambda pair: pair[0].train.micro_batch_size * pair[0].data.sequence_length,
    )
    sharding = dist.together(lambda: engines.read_config(device_facts.sharding(widest, its_plan, device))) or {}
    configs = []
    for part, plan in zip(parts, plans, strict=True):
        nodes_agree.require(part.recipe, plan, sharding, folder)
        config = dist.together(lambda r=part.recipe: engines.engine_config(r, sharding, dist.world_size()))
        assert config is not None
        configs.append(config)
    chosen = dist.together(lambda: device_facts.kernels(recipe, plans[0], device))
    assert chosen is not None
    seen = published(folder / "checkpoints")
    checkpoint = run_folder.find_checkpoint(recipe, plans[0], folder)
    ahead = stages.to_come(parts, checkpoint.step if checkpoint else 0)
    done = len(parts) - len(ahead)
    part, plan, config = ahead[0], plans[done], configs[done]
    steps = dist.together(lambda: preflight.total_steps(part.recipe, plan.train, checkpoint)) or 0
    order = preflight.plan_order(part.recipe, plan.train, steps, checkpoint)
    _announce(part, plan, steps, config, checkpoint, ahead[1:])
    was = checkpoint.manifest.get("stage") if checkpoint else None
    if checkpoint and was and part.number < was:
        dist.log.warning(
            "step %d was in stage %d and now lies before its beginning: the recipe's lengths have changed",
            checkpoint.step,
            was,
        )
    dist.log.info("kernels: %s", chosen)
    if checkpoint and checkpoint.step >= steps:
        wanted = bool(plan.validation), plan.prompts is not None
        if scratch or checkpoint.step > steps or is_evaluated(folder, steps, *wanted):
            dist.log.info("the run is complete: nothing to do")
            return
        dist.log.info("the run is complete but for its last evaluation: that is made now")

    if recipe.model.init_from and not checkpoint:
        dist.together(lambda: require_start(recipe.model.init_from or ""))
    if scratch:
        folder, seen = scratch, []
    held = dist.together(lambda: run_folder.open_folder(folder, recipe, config, seen), only=dist.is_main())
    if dist.is_main() and not scratch:
        room = 2 if checkpoint else recipe.train.keep_last + 1
        warn_of_space(folder / "checkpoints", state.first_checkpoint_bytes(plan.parameters), room)
    engine, group_names, causal = _start_engine(part.recipe, plan, config, checkpoint, device, chosen, folder)
    progress = state.restore(engine, checkpoint) if checkpoint else state.Progress(0, 0, {})
    watch.skipped_steps = progress.skipped_steps
    sees_future = causal is False or getattr(plan.config, "sees_future", False)
    run_steps = (parts[-1].recipe.train.steps or steps) if recipe.stages else steps
    monitor = Monitor(folder, progress.step, sees_future, run_steps)
    monitor.text("recipe", run_folder.as_yaml(recipe))
    running = jobs.Running(engine, group_names, monitor, watch, device, folder, run_steps, parts)
    try:
        with jobs.job_of(running, part, plan, config, order, checkpoint, progress) as job:
            if scratch:
                rehearsal.rehearse(job, plan.parameters, causal)
                return
            guard.begin(progress.step)
            loop.fit(job)
        for part, plan, config in zip(ahead[1:], plans[done + 1 :], configs[done + 1 :], strict=True):
            checkpoint, order = jobs.next_stage(running, part, plan, job.step)
            with jobs.job_of(running, part, plan, config, order, checkpoint, state.progress_of(checkpoint)) as job:
                loop.fit(job)
    finally:
        with watch.saving():  # deleting a large checkpoint takes as long as it takes
            state.wait_until_tidy()
        watch.leave()  # the picture takes seconds, which are no hang
        monitor.close()
    dist.log.info("done: %s", folder)
    del held  # the folder's lock was ours until here


def _start_engine(
    recipe: Recipe,
    plan: preflight.RunPlan,
    config: dict[str, Any],
    checkpoint: "Checkpoint | None",
    device: "torch.device",
    chosen: "Choice",
    folder: Path,
) -> "tuple[DeepSpeedEngine, list[list[str]], bool | None]":
    """The engine, the names of the parameters in each optimizer group, and (on rank 0) the audit's verdict, which is also
    written to `folder`."""
    from megatron_steel.model import build
    from megatron_steel.train import engine as engines

    def make() -> Any:
        start_from = None if checkpoint else recipe.model.init_from
        model = build.build_model(
            plan.config, recipe.run.seed, start_from, recipe.model.trust_code, recipe.model.init_std
        )
        causal = _audit(model, folder) if dist.is_main() else None
        train = recipe.train
        return build.prepare_for_training(model, train.activation_checkpointing, chosen, train.z_loss), causal

    model, causal = dist.together(make) or (None, None)
    o = recipe.optim
    muon = (o.muon_lr or o.lr) / o.lr if o.name == "muon" else None
    groups = build.decay_groups(model, o.weight_decay, o.weight_decay_on, o.lr_ratio, muon)
    names = {id(p): name for name, p in model.named_parameters()}
    group_names = [[names[id(p)] for p in group["params"]] for group in groups]
    return engines.start_engine(model, groups, recipe.optim, config, device), group_names, causal


def _audit(model: Any, folder: Path) -> bool | None:
    """Write `audit.json`, warn about a model that reads the future. Returns the verdict; None: it could not be found.

    On rank 0 alone, on the whole model in fp32 on the CPU.
    """
    from megatron_steel.audit import quick_audit, warning_of, write_json
    from megatron_steel.model.verdict import AUDIT

    report = quick_audit(model)
    write_json(folder / AUDIT, report)
    warning = warning_of(report)
    if warning:
        dist.log.warning("%s", warning)
    return report["causal"]


def _announce(
    part: stages.Part,
    plan: preflight.RunPlan,
    steps: int,
    config: dict[str, Any],
    checkpoint: "Checkpoint | None",
    then: list[stages.Part],
) -> None:
    from megatron_steel.train.engine import zero_stage
    from megatron_steel.train.schedule import warmup_is_cut

    recipe = part.recipe
    length = f"{jobs.total_tokens(recipe, steps, checkpoint) + sum(later.tokens for later in then):,} tokens"
    if plan.pairs:
        length = f"{preflight.samples_to_come(recipe, steps, checkpoint):,} pairs"
    dist.log.info(
        "%s: %s parameters, %s steps, %s, %d ranks, ZeRO %d, micro-batch %d x %d",
        recipe.run.dir, f"{plan.parameters:,}", f"{steps + sum(later.steps for later in then):,}", length,
        dist.world_size(), zero_stage(config), recipe.train.micro_batch_size, config["gradient_accumulation_steps"],
    )  # fmt: skip
    if warmup_is_cut(recipe.schedule, steps):
        dist.log.warning(
            "schedule.warmup_steps=%d: the rate does not come to its peak of %g before %s",
            recipe.schedule.warmup_steps, recipe.optim.lr, "the decay begins" if recipe.schedule.name == "wsd" else "the run ends",
        )  # fmt: skip
    if part.number:
        dist.log.info("%s", "\n  ".join(stages.described(each) for each in (part, *then)))
    if checkpoint:
        dist.log.info("going on from %s", checkpoint.path)


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    yield
    torch.use_deterministic_algorithms(before)


if __name__ == "__main__":
    from megatron_steel.train.guard import end_now

    end_now(main(sys.argv[1:]))
