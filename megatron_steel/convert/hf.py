"""A checkpoint becomes a Hugging Face folder, whole or not at all.

1. `sources`: the newest whole checkpoint of a run folder, one checkpoint, the mean of several, or what others trained.
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

from megatron_steel.checkpoint.commit import sync
from megatron_steel.errors import SteelError
from megatron_steel.model.verdict import write_verdict

DTYPES = ("bfloat16", "float16", "float32")


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: str = "bfloat16",
    verify: bool = False,
    audit: Callable[[Path], dict[str, Any]] | None = None,
    model: str | os.PathLike[str] | None = None,
    average: int = 1,
) -> Path:
    """Write a checkpoint as a Hugging Face folder; a few megabytes of weights are in memory at a time.

    Args:
        source: a run folder (its newest whole checkpoint; damaged ones are named and passed over) or a checkpoint; or a
            folder that transformers' Trainer with DeepSpeed or a plain DeepSpeed loop saved.
        output: the folder to make; it must not exist, or be empty.
        dtype: of the weights on disk: `bfloat16`, `float16` or `float32`.
        verify: reload in a fresh process and compare logits before anything is published.
        audit: gives the report on a checkpoint whose run has no `audit.json`, or on a Hugging Face folder.
        model: a Hugging Face folder that describes what others trained, where the checkpoint itself does not.
        average: export the mean of so many of a run's last whole checkpoints.

    Returns: the published folder.
    Raises:
        SteelError: no whole checkpoint, a used output, a tokenizer that is gone, tensors that are not the model's,
            numbers that do not fit the dtype, logits that differ, a full disk. Nothing is left behind.
    """
    from megatron_steel.convert import sources

    if dtype not in DTYPES:
        raise SteelError(f"there is no dtype {dtype!r} for weights", "--dtype", f"use one of {', '.join(DTYPES)}")
    target = Path(output).absolute()
    refuse_used(target)
    trained = sources.find(Path(source), Path(model) if model is not None else None, average)
    import torch  # these take seconds, while which `find` hashes

    from megatron_steel.convert import card, companions, shards
    from megatron_steel.convert.verify import verify_export

    where, config, report = trained.checkpoint.path, trained.config, trained.verdict
    if report is None and audit is not None and not trained.foreign:
        report = audit(where)
    blueprint = shards.blueprint_of(config)
    dtypes = dict.fromkeys(blueprint.shapes, getattr(torch, dtype)) | blueprint.integers
    with publishing(target) as folder:
        files = shards.write_pieces(trained.weights(), blueprint.shapes, folder, dtypes, where)
        loader = companions.write_companions(
            folder, config, blueprint.architecture, dtype, trained.tokenizer, trained.tokenizer_path, trained.code
        )
        if trained.generation is not None:
            shutil.copyfile(trained.generation, folder / trained.generation.name)
        difference = verify_export(trained, folder) if verify else None
        if report is None and audit is not None:
            report = audit(folder)  # only here can others' weights be loaded as a model
        if report is not None:
            write_verdict(folder, report)
        card.write_card(
            folder, target.name, trained.checkpoint, config, blueprint.parameters, dtype, loader, difference, trained.notes
        )  # fmt: skip
    print(
        f"{output}: {blueprint.architecture} of {trained.label}, {blueprint.parameters:,} parameters "
        f"in {dtype}, {len(files)} weight file{'s' if len(files) > 1 else ''}"
    )
    return target


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
