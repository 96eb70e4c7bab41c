"""Where the weights of an export come from, and all else that it must know of them.

A run folder or one of its checkpoints: the newest whose weights are as they were written (`checkpoint.sound`); or the mean
of the last few. What others trained is found by `foreign`. Must not know what an export looks like.
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import dist
from megatron_steel.checkpoint import zero
from megatron_steel.checkpoint.commit import MANIFEST, Checkpoint, newest_whole, published
from megatron_steel.checkpoint.mapped import forget
from megatron_steel.checkpoint.sound import verify_weights
from megatron_steel.errors import SteelError
from megatron_steel.model.verdict import read_verdict
from megatron_steel.recipe import Recipe, from_dict

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron_steel.data.tokenizer import Tokenizer

Weights = Callable[[], Iterator[tuple[str, zero.Weight]]]


@dataclass(frozen=True)
class Trained:
    """Trained weights, and what an export of them needs to know."""

    checkpoint: Checkpoint
    """Its path is named in errors; its manifest holds the facts (of what others trained: at least `step`)."""
    config: "PretrainedConfig"
    weights: Weights
    """Opens the files and gives every tensor once, trained ones in fp32, a tied one under its first name only."""
    tokenizer: "Tokenizer | None"
    tokenizer_path: Path | None
    code: Path | None = None
    """The folder whose modelling code must travel, where the model is neither Steel nor a class of transformers."""
    generation: Path | None = None
    """A generation_config.json that others chose, to be kept."""
    verdict: dict[str, Any] | None = None
    """The audit's report, where there is one."""
    foreign: bool = False
    """Others trained it: no manifest, no hashes, no recipe."""
    notes: tuple[tuple[str, str], ...] = ()
    """Rows for the model card that belong to this kind of source."""

    @property
    def label(self) -> str:
        """Which weights these are, in a few words."""
        steps = self.checkpoint.manifest.get("averaged_steps")
        if steps:
            return f"the mean of steps {', '.join(f'{step:,}' for step in steps)}"
        return f"step {self.checkpoint.step:,}"


def find(source: Path, model: Path | None = None, average: int = 1, tokenizer: Path | None = None) -> Trained:
    """What a run folder, a checkpoint, or a ZeRO checkpoint of others holds.

    Args:
        model: the Hugging Face folder that describes a checkpoint of others.
        average: the mean of so many of a run's last whole checkpoints.
        tokenizer: where it lies now, if not where the run's recipe or the checkpoint has it.

    Raises:
        SteelError: nothing whole there, or fewer than `average`; a tokenizer that is gone or has changed; a model that
            cannot be described; an option that does not go with this source.
    """
    from megatron_steel.convert import foreign

    if average < 1:
        raise SteelError(f"there is no mean of {average} checkpoints", "--average", "give a number from 1 on")
    ours = (source / "checkpoints").is_dir() or (source / MANIFEST).is_file() or source.name.startswith("step-")
    if not ours and foreign.is_foreign(source):
        if average > 1:
            raise SteelError("only the checkpoints of a run of megatron_steel can be averaged", source,
                             "leave --average out")  # fmt: skip
        return foreign.find(source, model, tokenizer)
    if ours and model is not None:
        raise SteelError("a run of megatron_steel knows its model by itself", source, "leave --model out")
    if not ours:
        find_checkpoint(source)  # raises
    if average > 1:
        return _mean_of_run(source, average, tokenizer)
    import torch  # noqa: F401  (here: two threads that import parts of one library may meet half-made modules)

    with ThreadPoolExecutor(1) as aside:
        finding = aside.submit(find_checkpoint, source)
        import megatron_steel.model.build  # noqa: F401  (takes as long as summing, which needs no interpreter)

        return of_checkpoint(finding.result(), tokenizer)


def of_checkpoint(checkpoint: Checkpoint, place: Path | None = None) -> Trained:
    """One checkpoint of ours; its files are opened when the weights are asked for. Raises SteelError as `find`.

    Args:
        place: where its tokenizer lies now; None: where the recipe says. Its fingerprint proves it.
    """
    from megatron_steel.model.build import build_config

    recipe = recipe_of(checkpoint)
    tokenizer = _tokenizer_of_run(checkpoint, Path(recipe.tokenizer.path), place)
    return Trained(
        checkpoint=checkpoint,
        config=build_config(recipe.model, tokenizer.vocab_size),
        weights=lambda: zero.stream_pieces(zero.contents(checkpoint.path)),
        tokenizer=tokenizer,
        tokenizer_path=place or Path(recipe.tokenizer.path),
        code=Path(recipe.model.path) if recipe.model.path else None,
        verdict=_verdict_of_run(checkpoint),
    )


def _tokenizer_of_run(checkpoint: Checkpoint, of_recipe: Path, place: Path | None) -> "Tokenizer":
    from megatron_steel.data.tokenizer import load_tokenizer

    if place is None and not of_recipe.exists():
        what = "the tokenizer that the run was trained with is not there (seen from the working directory)"
        raise SteelError(what, of_recipe, "name where it lies now: --tokenizer DIR_OR_MODEL")
    tokenizer = tokenizer_at(place) if place else load_tokenizer(of_recipe)
    trained_with = checkpoint.manifest.get("tokenizer", tokenizer.facts())
    if trained_with["fingerprint"] != tokenizer.fingerprint:
        if place:
            what = f"this is another tokenizer than the run was trained with ({trained_with['name']})"
            raise SteelError(what, place, "name the place of that one: --tokenizer DIR_OR_MODEL")
        what = f"the tokenizer has changed since the run was trained with it ({trained_with['name']})"
        raise SteelError(what, of_recipe, "put the original back, or name where it lies: --tokenizer DIR_OR_MODEL")
    return tokenizer


def tokenizer_at(place: Path) -> "Tokenizer":
    """The tokenizer of a folder, by its own files, or of a sentencepiece `.model`. Raises SteelError where there is none."""
    from megatron_steel.convert.companions import copy_tokenizer_files
    from megatron_steel.data.tokenizer import load_tokenizer

    if not place.is_dir():
        return load_tokenizer(place)
    with tempfile.TemporaryDirectory() as alone:
        # Beside a config.json transformers may build another tokenizer than these files are: that of the model's type.
        if not copy_tokenizer_files(place, Path(alone)):
            raise SteelError("the folder holds no tokenizer", place, "name another: --tokenizer DIR_OR_MODEL")
        try:
            return replace(load_tokenizer(alone), name=place.resolve().name)
        except SteelError as error:
            raise SteelError(error.what, place, error.remedy) from error


def find_checkpoint(source: Path) -> Checkpoint:
    """The checkpoint that `source` means, its weights compared with their sums.

    Raises SteelError: there is nothing, it is neither run nor checkpoint, or no checkpoint in it is whole.
    """
    if (source / "checkpoints").is_dir():
        checkpoint, passed_over = newest_whole(source / "checkpoints", verify_weights)
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
        return verify_weights(source)
    raise SteelError("there is no run folder and no checkpoint here", source,
                     "name a run folder (it holds checkpoints/), a step-N folder in one, or a folder that DeepSpeed or "
                     "transformers' Trainer saved")  # fmt: skip


def _mean_of_run(run: Path, count: int, tokenizer: Path | None) -> Trained:
    """The uniform mean of a run's last `count` whole checkpoints: "latest weight averaging" (Kaddour 2022,
    arXiv:2209.14981; for language models Sanyal et al. 2023, arXiv:2306.03241). It stands in for the end of the learning
    rate's decay: worth trying where a run was stopped at a high rate. Buffers and frozen weights are the newest one's.
    """
    if not (run / "checkpoints").is_dir():
        raise SteelError("the mean of several checkpoints needs a run folder", run, "name the run, not one checkpoint")
    whole: list[Checkpoint] = []
    for path in reversed(published(run / "checkpoints")):
        try:
            whole.append(verify_weights(path))
        except SteelError as problem:
            dist.log.warning("passed over a checkpoint: %s", problem)
        if len(whole) == count:
            break
    steps = [checkpoint.step for checkpoint in reversed(whole)]
    if len(whole) < count:
        there = f"steps {', '.join(map(str, steps))}" if steps else "none"
        raise SteelError(f"the mean of {count} checkpoints is asked, and {len(whole)} are whole ({there})", run,
                         f"use --average {len(whole)}" if len(whole) > 1 else "leave --average out")  # fmt: skip
    newest = whole[0]
    for other in whole[1:]:
        if recipe_of(other).model != recipe_of(newest).model:
            what = f"the checkpoints of steps {other.step} and {newest.step} are not of the same model"
            raise SteelError(what, run, "average fewer checkpoints")
    averaged = Checkpoint(newest.path, newest.manifest | {"averaged_steps": steps})
    found = replace(of_checkpoint(newest, tokenizer), checkpoint=averaged, weights=lambda: _means(whole))
    return replace(found, notes=(("weights", f"uniform {found.label.removeprefix('the ')}"),))


def _means(checkpoints: list[Checkpoint]) -> Iterator[tuple[str, zero.Weight]]:
    newest, *others = [zero.contents(checkpoint.path) for checkpoint in checkpoints]
    elsewhere = [{parameter.name: parameter for parameter in other.trained} for other in others]
    for parameter in newest.trained:
        same = [parameter, *(other[parameter.name] for other in elsewhere if parameter.name in other)]
        if len(same) < len(checkpoints) or len({one.shape for one in same}) > 1:
            raise SteelError(f"the checkpoints do not all hold {parameter.name} {parameter.shape}", parameter.file,
                             "average fewer checkpoints")  # fmt: skip
        pieces = zip(*(one.weight_in_pieces() for one in same), strict=True)
        # In fp64, so that the mean is rounded once and does not depend on the order.
        mean = (sum(piece.double() for piece in cut).div(len(cut)).float() for cut in pieces)
        yield parameter.name, zero.Weight(parameter.shape, mean)
        for one in same:
            forget(one.file.parent)
    yield from zero.stream_pieces(replace(newest, trained=[]))


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
