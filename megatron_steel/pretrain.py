"""What `deepspeed --module megatron_steel.pretrain RECIPE [key.path=value ...]` starts on every rank.

1. `plan_run` checks the recipe against data, tokenizer and model, so that bad input ends before anything is built.
2. `_train` builds and audits the model, starts the engine, goes on from the newest whole checkpoint, and hands a `Job` to the loop.

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
from megatron_steel import dist, nodes_agree, preflight, rehearsal, run_folder
from megatron_steel.errors import SteelError, Stopped
from megatron_steel.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from megatron_steel.checkpoint.commit import Checkpoint
    from megatron_steel.data.loader import Loader
    from megatron_steel.data.order import OrderState
    from megatron_steel.model.kernels import Choice
    from megatron_steel.train.guard import Guard
    from megatron_steel.train.monitor import Monitor
    from megatron_steel.train.report import Report
    from megatron_steel.train.spikes import Spikes
    from megatron_steel.train.state import Progress
    from megatron_steel.train.watch import Watch


def main(argv: list[str]) -> int:
    """The launcher's entry: drops its `--local_rank=N`, keeps `--dry-run` and the supervisor's folder. Returns the exit code."""
    from megatron_steel.train.report import OPTION, Report

    dist.set_up_logging()
    arguments = [a for a in argv if not a.startswith("--local_rank=")]
    folders = [a.removeprefix(OPTION) for a in arguments if a.startswith(OPTION)]
    report = Report(Path(folders[0]) if folders else None)
    dry_run = "--dry-run" in arguments
    name, *overrides = [a for a in arguments if a != "--dry-run" and not a.startswith(OPTION)] or [""]
    code = dist.exit_code(lambda: run(name, overrides, dry_run, report))
    report.end(code)
    return code


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
    from megatron_steel.data.loader import Loader
    from megatron_steel.train import engine as engines
    from megatron_steel.train import loop, replicas, state
    from megatron_steel.train.monitor import Monitor

    folder = Path(recipe.run.dir).expanduser()
    dist.together(lambda: engines.refuse_precision(recipe.train.precision, device))
    plan = preflight.plan_run(recipe)
    sharding = dist.together(lambda: engines.read_config(device_facts.sharding(recipe, plan, device)))
    nodes_agree.require(recipe, plan, sharding or {}, folder)
    config = dist.together(lambda: engines.engine_config(recipe, sharding or {}, dist.world_size()))
    chosen = dist.together(lambda: device_facts.kernels(recipe, plan, device))
    assert config is not None
    assert chosen is not None
    seen = published(folder / "checkpoints")
    checkpoint = run_folder.find_checkpoint(recipe, plan, folder)
    steps = dist.together(lambda: preflight.total_steps(recipe, plan.train, checkpoint)) or 0
    order = preflight.plan_order(recipe, plan.train, steps, checkpoint)
    _announce(recipe, plan, steps, config, checkpoint)
    dist.log.info("kernels: %s", chosen)
    if checkpoint and checkpoint.step >= steps:
        dist.log.info("the run is complete: nothing to do")
        return

    if scratch:
        folder, seen = scratch, []
    held = dist.together(lambda: run_folder.open_folder(folder, recipe, config, seen), only=dist.is_main())
    if dist.is_main() and not scratch:
        room = 2 if checkpoint else recipe.train.keep_last + 1
        warn_of_space(folder / "checkpoints", state.first_checkpoint_bytes(plan.parameters), room)
    engine, group_names, causal = _start_engine(recipe, plan, config, checkpoint, device, chosen, folder)
    progress = state.restore(engine, checkpoint) if checkpoint else state.Progress(0, 0, {})
    watch.skipped_steps = progress.skipped_steps
    spikes = _spikes(recipe, progress, order)
    facts = run_folder.facts_of(recipe, plan, config, checkpoint)
    sees_future = causal is False or getattr(plan.config, "sees_future", False)
    monitor = Monitor(folder, progress.step, sees_future, steps)
    monitor.text("recipe", run_folder.as_yaml(recipe))
    dataset = preflight.open_dataset(plan.train, order, recipe.data.sequence_length)
    cut = recipe.train.global_batch_size, recipe.train.micro_batch_size, dist.rank(), dist.world_size()
    pin = device.type == "cuda"
    with Loader(dataset, order, *cut, document_mask=recipe.data.document_mask, pin=pin) as loader:

        def save(step: int, tokens: int) -> Path:
            replicas.compare(engine, step)
            seen = spikes.to_json() if spikes else None
            now = state.Progress(step, tokens, loader.state.to_json(), watch.skipped_steps, seen)
            kept = recipe.train.keep_last, recipe.train.keep_every_steps
            with watch.saving():
                return state.save(engine, folder / "checkpoints", now, facts, group_names, *kept)

        job = loop.Job(
            engine=engine,
            recipe=recipe,
            monitor=monitor,
            watch=watch,
            next_batches=loader.step,
            labels_ahead=loader.labels_ahead,
            validation=preflight.validation_batches_of(recipe, plan),
            prompts=plan.prompts,
            save=state.Saves(save),
            position=lambda: preflight.position(loader.state, plan.train),
            out_of_memory=device_facts.out_of_memory(recipe, plan, device),
            spikes=spikes,
            roll_back=lambda: spikes and _roll_back(recipe, plan, engine, loader, monitor, watch, spikes),
            steps=steps,
            total_tokens=total_tokens(recipe, steps, checkpoint),
            step=progress.step,
            tokens=progress.tokens,
            flops_per_token=plan.flops_per_token,
            peak_flops=device_facts.peak_flops_of(device),
        )
        try:
            if scratch:
                rehearsal.rehearse(job, plan.parameters, causal)
                return
            guard.begin(progress.step)
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


def _announce(
    recipe: Recipe, plan: preflight.RunPlan, steps: int, config: dict[str, Any], checkpoint: "Checkpoint | None"
) -> None:
    from megatron_steel.train.engine import zero_stage

    length = f"{total_tokens(recipe, steps, checkpoint):,} tokens"
    if plan.pairs:
        length = f"{preflight.samples_to_come(recipe, steps, checkpoint):,} pairs"
    dist.log.info(
        "%s: %s parameters, %s steps, %s, %d ranks, ZeRO %d, micro-batch %d x %d",
        recipe.run.dir, f"{plan.parameters:,}", f"{steps:,}", length, dist.world_size(), zero_stage(config),
        recipe.train.micro_batch_size, config["gradient_accumulation_steps"],
    )  # fmt: skip
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
