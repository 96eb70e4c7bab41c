"""What a recipe asks of a plan: its model, its length, and the setting that it names itself. Refuses what `pretrain` would.

Needs no data: what only data can tell (train.epochs) stays unknown.
"""

from dataclasses import replace

from megatron_steel.errors import SteelError
from megatron_steel.planner import fits, settings
from megatron_steel.planner.hardware import Cluster
from megatron_steel.planner.settings import Candidate
from megatron_steel.planner.work import work_of
from megatron_steel.preflight import require_positions
from megatron_steel.recipe import Recipe
from megatron_steel.stages import parts_of, steps_of_tokens, tokens_of_steps


def model_of(recipe: Recipe) -> fits.Model:
    """Raises SteelError for values that make no model, operations that cannot be counted, too few positions."""
    from megatron_steel.model.build import build_config

    config = build_config(recipe.model)
    require_positions(config, recipe.data.sequence_length)
    work = work_of(config, recipe.data.sequence_length, recipe.train.precision)
    return fits.Model(config, work, recipe.train.precision, recipe.optim.name)


def length(recipe: Recipe) -> tuple[int | None, int | None]:
    """(tokens, steps) of the whole run; (None, None) where only the data can tell (train.epochs)."""
    if recipe.stages:
        parts = parts_of(recipe)
        return sum(part.tokens for part in parts), sum(part.steps for part in parts)
    steps = recipe.train.steps
    if steps is None and recipe.train.tokens is not None:
        steps = steps_of_tokens(recipe, recipe.train.tokens)
    return (None, None) if steps is None else (tokens_of_steps(recipe, steps), steps)


def require_even(recipe: Recipe, cluster: Cluster) -> None:
    """Raises SteelError for a global batch, of the run, of its ramp or of a stage, that the ranks cannot share evenly."""
    ramp = [("train.batch_ramp", stage.global_batch_size) for stage in recipe.train.batch_ramp]
    parts = parts_of(recipe) if recipe.stages else []
    of_stages = [("stages", part.recipe.train.global_batch_size) for part in parts]
    for key, batch in (("train.global_batch_size", recipe.train.global_batch_size), *ramp, *of_stages):
        if batch % cluster.ranks:
            fit = max((r for r in range(1, cluster.ranks) if batch % r == 0), default=1)
            near = round(batch / cluster.ranks) or 1
            what = f"a global batch of {batch} samples cannot be shared evenly by {cluster.ranks} GPUs"
            raise SteelError(what, key, f"set {near * cluster.ranks} samples there, or use {fit} GPUs")


def for_precision(cluster: Cluster, precision: str) -> Cluster:
    """The cluster with the peak that its GPU has in fp16, where that is another one than in bf16."""
    gpu = cluster.gpu
    if precision == "fp16" and gpu.fp16_peak:
        return replace(
            cluster, gpu=replace(gpu, peak=gpu.fp16_peak, note="planned at its fp16 peak, with Ampere's efficiency")
        )
    return cluster


def own_setting(recipe: Recipe, model: fits.Model, cluster: Cluster) -> Candidate | None:
    """The recipe with its own micro-batch and file; None where the file is `auto`, or the batch cannot be cut so.

    Raises SteelError for a DeepSpeed file that is not there or is none.
    """
    from megatron_steel.train.engine import read_config

    file, micro = recipe.deepspeed.config, recipe.train.micro_batch_size
    if file == "auto":
        return None
    read_config(file)
    if recipe.train.global_batch_size % (micro * cluster.ranks):
        return None
    checkpointing = recipe.train.activation_checkpointing
    return settings.evaluate(model, file, cluster, checkpointing, micro, recipe.train.global_batch_size)


def why_not_as_it_is(recipe: Recipe, cluster: Cluster) -> str | None:
    """Why there is no own setting, where the user should know."""
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    if batch % (micro * cluster.ranks) == 0:
        return None
    return (f"as it is the recipe does not run here: {micro} samples a pass on {cluster.ranks} GPUs do not cut a batch of {batch}; "
            "take train.micro_batch_size from the table")  # fmt: skip
