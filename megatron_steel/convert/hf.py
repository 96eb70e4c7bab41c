"""A checkpoint becomes a Hugging Face folder, whole or not at all.

1. `find_checkpoint`: the newest whole checkpoint of a run folder, or one checkpoint, verified by its hashes.
2. Weights stream from DeepSpeed's files into safetensors shards (`shards`), each name and shape checked.
3. `companions` writes configuration, code and tokenizer beside them, `card` the README; the audit's verdict goes along.
4. With `verify` a fresh process without this package loads the folder and gives the same logits (`verify`).
5. The folder is synced and takes its name. Until then it lies in `.NAME.tmp` beside it.

Parameter names never change on the way. Must not know how the model was trained or which ZeRO stage wrote it.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.checkpoint.commit import MANIFEST, Checkpoint, newest_whole, sync
from megatron_steel.checkpoint.commit import verify as verify_checkpoint
from megatron_steel.checkpoint.zero import stream_weights
from megatron_steel.errors import SteelError
from megatron_steel.model.verdict import read_verdict, write_verdict
from megatron_steel.recipe import Recipe, from_dict

DTYPES = ("bfloat16", "float16", "float32")


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: str = "bfloat16",
    verify: bool = False,
    audit: Callable[[Path], dict[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint as a Hugging Face folder; peak memory is about one shard (2 GB) beside the reader's.

    Args:
        source: a run folder (its newest whole checkpoint; damaged ones are named and passed over) or a checkpoint.
        output: the folder to make; it must not exist, or be empty.
        dtype: of the weights on disk: `bfloat16`, `float16` or `float32`.
        verify: reload in a fresh process and compare logits before anything is published.
        audit: gives the report on a checkpoint whose run has no `audit.json`.

    Returns: the published folder.
    Raises:
        SteelError: no whole checkpoint, a used output, a tokenizer that is gone, tensors that are not the model's,
            numbers that do not fit the dtype, logits that differ, a full disk. Nothing is left behind.
    """
    from megatron_steel.convert import card, companions, shards
    from megatron_steel.convert.verify import verify_export
    from megatron_steel.data.tokenizer import load_tokenizer
    from megatron_steel.model.build import build_config

    if dtype not in DTYPES:
        raise SteelError(f"there is no dtype {dtype!r} for weights", "--dtype", f"use one of {', '.join(DTYPES)}")
    target = Path(output).absolute()
    refuse_used(target)
    checkpoint = find_checkpoint(Path(source))
    recipe = recipe_of(checkpoint)
    tokenizer = load_tokenizer(recipe.tokenizer.path)
    trained_with = checkpoint.manifest.get("tokenizer", tokenizer.facts())
    if trained_with["fingerprint"] != tokenizer.fingerprint:
        what = f"the tokenizer has changed since the run was trained with it ({trained_with['name']})"
        raise SteelError(what, recipe.tokenizer.path, "put the original tokenizer back there")
    config = build_config(recipe.model, tokenizer.vocab_size)
    report = _verdict_of_run(checkpoint)
    if report is None and audit is not None:
        report = audit(checkpoint.path)
    blueprint = shards.blueprint_of(config)
    with publishing(target) as folder:
        files = shards.write_shards(
            stream_weights(checkpoint.path), blueprint.shapes, folder, dtype, checkpoint.path
        )  # fmt: skip
        loader = companions.write_companions(folder, config, blueprint.architecture, dtype, recipe, tokenizer)
        difference = verify_export(checkpoint, folder) if verify else None
        if report is not None:
            write_verdict(folder, report)
        card.write_card(folder, target.name, checkpoint, config, blueprint.parameters, dtype, loader, difference)
    print(
        f"{output}: {blueprint.architecture} of step {checkpoint.step:,}, {blueprint.parameters:,} parameters "
        f"in {dtype}, {len(files)} weight file{'s' if len(files) > 1 else ''}"
    )
    return target


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


def refuse_used(target: Path) -> None:
    """Raise SteelError where something lies that publishing would replace."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise SteelError("the output exists already and is never overwritten", target,
                         "name another folder, or move this one away")  # fmt: skip


@contextlib.contextmanager
def publishing(target: Path, verb: str = "export") -> Iterator[Path]:
    """A folder to fill beside `target`; at a clean end it is synced and renamed, else it is gone."""
    from safetensors import SafetensorError

    aside = target.with_name(f".{target.name}.tmp")
    new_parents = [p for p in target.parents if not p.exists()]
    try:
        shutil.rmtree(aside, ignore_errors=True)  # what a killed export left
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        os.replace(aside, target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            what = f"the {verb} could not be written: {getattr(error, 'strerror', None) or error}"
            raise SteelError(what, target, f"free space or mend the folder, then {verb} again") from error
        raise
