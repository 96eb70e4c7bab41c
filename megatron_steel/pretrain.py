"""What `deepspeed --module megatron_steel.pretrain RECIPE [key.path=value ...]` starts on every rank.

1. `plan_run` checks the recipe against data, tokenizer and model, so that bad input ends before anything is built.
2. `_train` builds and audits the model, starts the engine, goes on from the newest whole checkpoint, and hands a `Job` to the loop.

Exit codes are those of `errors.py`; all ranks leave together. A guard thread ends a rank that cannot (`train/guard.py`).
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from megatron_steel import dist, preflight
from megatron_steel.errors import SteelError, Stopped
from megatron_steel.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from megatron_steel.checkpoint.commit import Checkpoint
    from megatron_steel.train.guard import Guard
    from megatron_steel.train.report import Report
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
    watch = Watch(recipe.train.stop_after_minutes)
    folder = Path(recipe.run.dir).expanduser()
    # Before anything slow, so that no signal is lost.
    with Guard(watch, report or Report(None), folder, recipe.train.hang_after_seconds) as guard:
        if recipe.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        device = dist.start()
        together = False
        try:
            with _deterministic(recipe.train.deterministic):
                _train(recipe, watch, guard, device, dry_run)
            together = True
        except SteelError as error:
            together = error.shared
            raise
        except Stopped:
            together = True
            raise
        finally:
            watch.leave()
            if together:
                dist.barrier()  # the launcher kills the others as soon as one rank has left with an error


def _train(recipe: Recipe, watch: "Watch", guard: "Guard", device: "torch.device", dry_run: bool) -> None:
    from megatron_steel.checkpoint.commit import published
    from megatron_steel.data.loader import Loader
    from megatron_steel.train import engine as engines
    from megatron_steel.train import loop, state
    from megatron_steel.train.monitor import Monitor

    folder = Path(recipe.run.dir).expanduser()
    plan = preflight.plan_run(recipe)
    sharding = dist.together(lambda: engines.read_config(_sharding(recipe, plan, device)))
    config = dist.together(lambda: engines.engine_config(recipe, sharding or {}, dist.world_size()))
    assert config is not None
    seen = published(folder / "checkpoints")
    checkpoint = _find_checkpoint(recipe, plan, folder, engines.zero_stage(config))
    steps = dist.together(lambda: preflight.total_steps(recipe, plan, checkpoint)) or 0
    order = preflight.plan_order(recipe, plan, steps, checkpoint)
    _announce(recipe, plan, steps, config, checkpoint)
    if dry_run and getattr(plan.config, "sees_future", False):  # nothing is built, so nothing is audited
        dist.log.warning("FFN_type %s lets every position see later tokens", getattr(plan.config, "FFN_type", ""))
    if dry_run or (checkpoint and checkpoint.step >= steps):
        dist.log.info("dry run: everything checks" if dry_run else "the run is complete: nothing to do")
        return

    held = dist.together(lambda: _open_folder(folder, recipe, config, seen), only=dist.is_main())
    engine, group_names, causal = _start_engine(recipe, plan, config, checkpoint, device)
    progress = state.restore(engine, checkpoint) if checkpoint else state.Progress(0, 0, {})
    facts = _facts(recipe, plan, config)
    monitor = Monitor(folder, progress.step, sees_future=causal is False)
    monitor.text("recipe", _as_yaml(recipe))
    dataset = preflight.open_dataset(plan.train, order)
    cut = recipe.train.global_batch_size, recipe.train.micro_batch_size, dist.rank(), dist.world_size()
    with Loader(dataset, order, *cut, document_mask=recipe.data.document_mask) as loader:

        def save(step: int, tokens: int) -> None:
            now = state.Progress(step, tokens, loader.state.to_json())
            with watch.saving():
                path = state.save(engine, folder / "checkpoints", now, facts, group_names, recipe.train.keep_last)
            dist.log.info("saved %s", path)

        job = loop.Job(
            engine=engine,
            recipe=recipe,
            monitor=monitor,
            watch=watch,
            next_batches=loader.step,
            validation=preflight.validation_batches_of(recipe, plan),
            save=save,
            position=lambda: preflight.position(loader.state, plan.train),
            out_of_memory=_out_of_memory(recipe, plan, device),
            steps=steps,
            step=progress.step,
            tokens=progress.tokens,
            flops_per_token=plan.flops_per_token,
            peak_flops=_peak_flops(device),
        )
        try:
            guard.begin(progress.step)
            loop.fit(job)
        finally:
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
) -> "tuple[DeepSpeedEngine, list[list[str]], bool | None]":
    """The engine, the names of the parameters in each optimizer group, and (on rank 0) the audit's verdict."""
    from megatron_steel.model import build
    from megatron_steel.train import engine as engines

    def make() -> Any:
        start_from = None if checkpoint else recipe.model.init_from
        model = build.build_model(plan.config, recipe.run.seed, start_from, recipe.model.trust_code)
        causal = _audit(model, Path(recipe.run.dir).expanduser()) if dist.is_main() else None
        return build.prepare_for_training(model, recipe.train.activation_checkpointing), causal

    model, causal = dist.together(make) or (None, None)
    groups = build.decay_groups(model, recipe.optim.weight_decay, recipe.optim.weight_decay_on)
    names = {id(p): name for name, p in model.named_parameters()}
    group_names = [[names[id(p)] for p in group["params"]] for group in groups]
    return engines.start_engine(model, groups, recipe.optim, config, device), group_names, causal


def _audit(model: Any, folder: Path) -> bool | None:
    """Write `audit.json`, warn about a model that reads the future. Returns the verdict; None: it could not be found.

    On rank 0 alone, on the whole model in fp32 on the CPU.
    """
    from megatron_steel.audit import quick_audit, warning_of, write_json
    from megatron_steel.convert.card import AUDIT

    report = quick_audit(model)
    write_json(folder / AUDIT, report)
    warning = warning_of(report)
    if warning:
        dist.log.warning("%s", warning)
    return report["causal"]


def _facts(recipe: Recipe, plan: preflight.RunPlan, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says besides step, tokens and order."""
    from megatron_steel.train.engine import zero_stage

    return {
        "recipe": recipe.to_dict(),
        "world_size": dist.world_size(),
        "zero_stage": zero_stage(config),
        "parameters": plan.parameters,
        **_identity(plan),
        "data": [{"digest": m.digest, "tokens": m.tokens, "name": Path(m.prefix).name} for m in plan.train],
    }


def _identity(plan: preflight.RunPlan) -> dict[str, Any]:
    """What must stay the same as long as a run lives, wherever its files lie: the model's fields and the tokenizer."""
    loose = ("_name_or_path", "transformers_version", "auto_map", "dtype", "torch_dtype")
    fields = {key: value for key, value in plan.config.to_dict().items() if key not in loose}
    return {"model_config": json.loads(json.dumps(fields, default=str)), "tokenizer": plan.tokenizer}


def _sharding(recipe: Recipe, plan: preflight.RunPlan, device: "torch.device") -> str:
    """`deepspeed.config`, with `auto` resolved by the memory of this rank's device."""
    from megatron_steel.model.memory import activation_bytes_per_sample
    from megatron_steel.train.engine import smallest_stage_that_fits

    if recipe.deepspeed.config != "auto":
        return recipe.deepspeed.config
    per_sample = activation_bytes_per_sample(
        plan.config, recipe.data.sequence_length, recipe.train.precision, recipe.train.activation_checkpointing
    )
    activations = per_sample * recipe.train.micro_batch_size
    chosen = smallest_stage_that_fits(plan.parameters, activations, _device_bytes(device), dist.world_size())
    dist.log.info("deepspeed.config: auto takes %s", chosen)
    return chosen


def _device_bytes(device: "torch.device") -> int:
    """Memory this rank may use: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // dist.ranks_on_node()


def _find_checkpoint(recipe: Recipe, plan: preflight.RunPlan, folder: Path, stage: int) -> "Checkpoint | None":
    from megatron_steel.train import state

    checkpoint = state.find(folder / "checkpoints")
    if checkpoint and recipe.train.resume == "never":
        raise dist.shared(SteelError("the run folder holds a checkpoint and train.resume is never", folder,
                                     "choose another run.dir, or train.resume=auto to go on"))  # fmt: skip
    if checkpoint:
        dist.together(lambda: state.refuse_other_run(checkpoint, recipe, _identity(plan), stage))
    return checkpoint


def _out_of_memory(recipe: Recipe, plan: preflight.RunPlan, device: "torch.device") -> Callable[[], str]:
    """A remedy that names the micro-batch that would fit; asked for only when memory has run out."""
    from megatron_steel.model.memory import largest_micro_batch

    if device.type != "cuda":
        return lambda: "set a smaller train.micro_batch_size, or train.activation_checkpointing=true"
    import torch

    # A tenth stays with the CUDA context, fragments and the buffers of the backward pass.
    free = int(0.9 * torch.cuda.get_device_properties(device).total_memory) - torch.cuda.memory_allocated(device)

    def remedy() -> str:
        tried, batch = recipe.train.micro_batch_size, recipe.train.global_batch_size // dist.world_size()
        cuts = [m for m in range(1, tried) if batch % m == 0]  # smaller than what has just failed, and it divides
        for checkpointing in sorted({recipe.train.activation_checkpointing, True}):
            fits = largest_micro_batch(
                plan.config, recipe.data.sequence_length, free, recipe.train.precision, checkpointing
            )
            small_enough = [m for m in cuts if m <= fits]
            if small_enough:
                also = (
                    ""
                    if checkpointing == recipe.train.activation_checkpointing
                    else " with train.activation_checkpointing=true"
                )
                return f"train.micro_batch_size={small_enough[-1]} would fit{also} (an estimate)"
        return "not even one sample fits: use a higher ZeRO stage, more ranks or a shorter data.sequence_length"

    return remedy


def _peak_flops(device: "torch.device") -> float | None:
    if device.type != "cuda":
        return None
    import torch

    from megatron_steel.model.flops import peak_flops

    return peak_flops(torch.cuda.get_device_name(device))


def _announce(
    recipe: Recipe, plan: preflight.RunPlan, steps: int, config: dict[str, Any], checkpoint: "Checkpoint | None"
) -> None:
    from megatron_steel.train.engine import zero_stage

    before = (checkpoint.step, checkpoint.manifest["tokens"]) if checkpoint else (0, 0)
    tokens = before[1] + (steps - before[0]) * recipe.train.global_batch_size * recipe.data.sequence_length
    dist.log.info(
        "%s: %s parameters, %s steps, %s tokens, %d ranks, ZeRO %d, micro-batch %d x %d",
        recipe.run.dir, f"{plan.parameters:,}", f"{steps:,}", f"{tokens:,}", dist.world_size(), zero_stage(config),
        recipe.train.micro_batch_size, config["gradient_accumulation_steps"],
    )  # fmt: skip
    if checkpoint:
        dist.log.info("going on from %s", checkpoint.path)


def _open_folder(folder: Path, recipe: Recipe, config: dict[str, Any], seen: list[Path]) -> TextIO:
    """Make the run folder, lock it, and write down what was resolved. Returns the lock.

    `seen`: the checkpoints that lay there when this job chose the one to go on from.
    """
    from megatron_steel.checkpoint.commit import published
    from megatron_steel.train import lock
    from megatron_steel.train.state import versions

    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock.take(folder)
        if recipe.train.resume == "never" and (folder / "metrics.jsonl").exists():
            raise SteelError("train.resume is never and the run folder has been used", folder, "choose another run.dir")
        if published(folder / "checkpoints") != seen:
            raise SteelError("another job has saved here since this one looked", folder, "start again")
        (folder / "recipe.yaml").write_text(_as_yaml(recipe), encoding="utf-8")
        (folder / "ds_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        environment = {"versions": versions(), "world_size": dist.world_size(), "command": sys.argv}
        (folder / "environment.json").write_text(json.dumps(environment, indent=1), encoding="utf-8")
    except OSError as error:
        what = f"the run folder cannot be written: {error.strerror}"
        raise SteelError(what, folder, "choose another run.dir, or mend this one") from error
    return held


def _as_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


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
