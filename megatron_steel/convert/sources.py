"""Where the weights of an export come from, and all else that it must know of them.

A run folder or one of its checkpoints: the newest whole one, every file compared with its hash. What others trained is
found in `foreign`. Must not know what an export looks like.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import dist
from megatron_steel.checkpoint.commit import MANIFEST, Checkpoint, newest_whole
from megatron_steel.checkpoint.commit import verify as verify_checkpoint
from megatron_steel.checkpoint.zero import stream_weights
from megatron_steel.errors import SteelError
from megatron_steel.model.verdict import read_verdict
from megatron_steel.recipe import Recipe, from_dict

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from megatron_steel.data.tokenizer import Tokenizer

Weights = Callable[[], "Iterator[tuple[str, torch.Tensor]]"]


@dataclass(frozen=True)
class Trained:
    """Trained weights, and what an export of them needs to know."""

    checkpoint: Checkpoint
    """Its path is named in errors; its manifest holds the facts (of what others trained: at least `step`)."""
    config: "PretrainedConfig"
    weights: Weights
    """Opens the files: every (name, fp32 tensor) once, a tied one under its first name only, one tensor in memory."""
    tokenizer: "Tokenizer | None"
    tokenizer_path: Path | None
    code: Path | None = None
    """The folder whose modelling code must travel, where the model is neither Steel nor a class of transformers."""
    verdict: dict[str, Any] | None = None
    """The audit's report, where there is one."""
    foreign: bool = False
    """Others trained it: no manifest, no hashes, no recipe."""
    notes: tuple[tuple[str, str], ...] = ()
    """Rows for the model card that belong to this kind of source."""


def find(source: Path) -> Trained:
    """What a run folder or a checkpoint holds.

    Raises:
        SteelError: nothing whole there, a tokenizer that is gone or has changed, a model that cannot be described.
    """
    checkpoint = find_checkpoint(source)
    return of_checkpoint(checkpoint)


def of_checkpoint(checkpoint: Checkpoint) -> Trained:
    """One checkpoint of ours; its files are opened when the weights are asked for. Raises SteelError as `find`."""
    from megatron_steel.data.tokenizer import load_tokenizer
    from megatron_steel.model.build import build_config

    recipe = recipe_of(checkpoint)
    tokenizer = load_tokenizer(recipe.tokenizer.path)
    trained_with = checkpoint.manifest.get("tokenizer", tokenizer.facts())
    if trained_with["fingerprint"] != tokenizer.fingerprint:
        what = f"the tokenizer has changed since the run was trained with it ({trained_with['name']})"
        raise SteelError(what, recipe.tokenizer.path, "put the original tokenizer back there")
    return Trained(
        checkpoint=checkpoint,
        config=build_config(recipe.model, tokenizer.vocab_size),
        weights=lambda: stream_weights(checkpoint.path),
        tokenizer=tokenizer,
        tokenizer_path=Path(recipe.tokenizer.path),
        code=Path(recipe.model.path) if recipe.model.path else None,
        verdict=_verdict_of_run(checkpoint),
    )


def find_checkpoint(source: Path) -> Checkpoint:
    """The checkpoint that `source` means, every file compared with its hash.

    Raises SteelError: there is nothing, it is neither run nor checkpoint, or no checkpoint in it is whole.
    """
    if (source / "checkpoints").is_dir():
        checkpoint, passed_over = newest_whole(source / "checkpoints")
        for problem in passed_over:
            dist.log.warning("passed over a checkpoint: %s", problem)
        if checkpoint is None:
            why = (
                f"none of its {len(passed_over)} checkpoints is whole" if passed_over else "it holds no checkpoint yet"
            )
            raise SteelError(
                f"the run cannot be exported: {why}", source, "name another run, or train this one further"
            )
        return checkpoint
    if (source / MANIFEST).is_file() or source.name.startswith("step-"):
        return verify_checkpoint(source)
    raise SteelError("there is no run folder and no checkpoint here", source,
                     "name a run folder (it holds checkpoints/) or a step-N folder in one")  # fmt: skip


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    """The recipe that a checkpoint was trained by. Raises SteelError when its manifest holds none."""
    tree = checkpoint.manifest.get("recipe")
    if not isinstance(tree, dict):
        raise SteelError("the checkpoint's manifest holds no recipe", checkpoint.path / MANIFEST,
                         "use a checkpoint that `megatron-steel pretrain` wrote")  # fmt: skip
    return from_dict(tree, where=str(checkpoint.path / MANIFEST))


def _verdict_of_run(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The audit's report in the run folder; None also for a checkpoint that was taken out of its run."""
    holder = checkpoint.path.absolute().parent
    return read_verdict(holder.parent) if holder.name == "checkpoints" else None
