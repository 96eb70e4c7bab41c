"""The run folder: opened by one job at a time, what lies in it, and what its checkpoints say of the run.

Knows nothing of engines or of how a step is made.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.preflight import RunPlan
from megatron_steel.recipe import Recipe

if TYPE_CHECKING:
    from megatron_steel.checkpoint.commit import Checkpoint


def refuse_used(folder: Path) -> None:
    """For `train.resume=never`. Raises SteelError when somebody has trained here."""
    from megatron_steel.checkpoint.commit import published

    if (folder / "metrics.jsonl").exists() or published(folder / "checkpoints"):
        what = "train.resume is never and the run folder has been used"
        raise SteelError(what, folder, "choose another run.dir, or train.resume=auto to go on")


def open_folder(folder: Path, recipe: Recipe, config: dict[str, Any], seen: list[Path]) -> TextIO:
    """Make the run folder, lock it, and write down what was resolved. Returns the lock.

    `seen`: the checkpoints that lay there when this job chose the one to go on from.
    """
    from megatron_steel.checkpoint.commit import published
    from megatron_steel.train import lock
    from megatron_steel.train.state import versions

    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock.take(folder)
        if recipe.train.resume == "never":
            refuse_used(folder)
        if published(folder / "checkpoints") != seen:
            raise SteelError("another job has saved here since this one looked", folder, "start again")
        (folder / "recipe.yaml").write_text(as_yaml(recipe), encoding="utf-8")
        (folder / "ds_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        environment = {"versions": versions(), "world_size": dist.world_size(), "command": sys.argv}
        (folder / "environment.json").write_text(json.dumps(environment, indent=1), encoding="utf-8")
    except OSError as error:
        what = f"the run folder cannot be written: {error.strerror}"
        raise SteelError(what, folder, "choose another run.dir, or mend this one") from error
    return held


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe as it stands in `recipe.yaml`."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def facts_of(recipe: Recipe, plan: RunPlan, config: dict[str, Any], before: "Checkpoint | None") -> dict[str, Any]:
    """What a checkpoint's manifest says besides step, tokens and order.

    `data` are the data sets in use; `data_before` those that the run, up to the checkpoint `before` that it goes on
    from, drew from and no longer does (`inspect RUN --step` finds them by it).
    """
    from megatron_steel.train.engine import zero_stage

    data = [
        {"digest": m.digest, "tokens": m.tokens, "name": Path(m.prefix).name, "prefix": m.prefix}
        | ({"kind": "pairs"} if m.pairs else {})
        for m in plan.train
    ]
    earlier = [*before.manifest.get("data_before", []), *before.manifest.get("data", [])] if before else []
    return {
        "recipe": recipe.to_dict(),
        "world_size": dist.world_size(),
        "zero_stage": zero_stage(config),
        "parameters": plan.parameters,
        **_identity(plan),
        "data": data,
        "data_before": [e for e in earlier if e["digest"] not in {now["digest"] for now in data}],
    }


def _identity(plan: RunPlan) -> dict[str, Any]:
    """What must stay the same as long as a run lives, wherever its files lie: the model's fields and the tokenizer."""
    loose = ("_name_or_path", "transformers_version", "auto_map", "dtype", "torch_dtype")
    fields = {key: value for key, value in plan.config.to_dict().items() if key not in loose}
    return {"model_config": json.loads(json.dumps(fields, default=str)), "tokenizer": plan.tokenizer}


def _defaults(plan: RunPlan) -> dict[str, Any]:
    """The configuration class's own values: those of fields that a checkpoint of an older version does not name."""
    try:
        return json.loads(json.dumps(type(plan.config)().to_dict(), default=str))
    except Exception:  # a foreign class that cannot do without arguments
        return {}


def find_checkpoint(recipe: Recipe, plan: RunPlan, folder: Path) -> "Checkpoint | None":
    """The newest whole checkpoint, if this run may go on from it; a collective call. Raises SteelError where it may not."""
    from megatron_steel.train import state

    if recipe.train.resume == "never":
        dist.together(lambda: refuse_used(folder))
    checkpoint = state.find(folder / "checkpoints")
    if checkpoint:
        dist.together(lambda: state.refuse_other_run(checkpoint, recipe, _identity(plan), _defaults(plan)))
    return checkpoint
