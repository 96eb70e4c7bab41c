"""A checkpoint becomes a Hugging Face folder, whole or not at all.

1. `sources`: the newest whole checkpoint of a run folder, one checkpoint, the mean of several, or what others trained.
2. Weights stream from DeepSpeed's files into safetensors shards (`shards`), each name and shape checked.
3. `companions` writes configuration, code and tokenizer beside them, `card` the README; the audit's verdict goes along,
   and `checksums` lists them all.
4. With `verify` a fresh process without this package loads the folder and gives the same logits (`verify`).
5. The folder is synced and takes its name. Until then it lies in `.NAME.export-partial/` beside it,
   which one process at a time may fill.

Parameter names never change on the way, but where files have always had another (`names`). Must not know how the model was
trained or which ZeRO stage wrote it.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.checkpoint.commit import MANIFEST, sync
from megatron_steel.data.reserve import Busy, reserved
from megatron_steel.errors import SteelError
from megatron_steel.model.verdict import write_verdict

if TYPE_CHECKING:
    from megatron_steel.convert.sources import Trained

DTYPES = ("bfloat16", "float16", "float32")
_MARKER = "an export's scratch folder"  # only a folder that holds it is removed


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: str = "bfloat16",
    verify: bool = False,
    audit: Callable[[Path], dict[str, Any]] | None = None,
    model: str | os.PathLike[str] | None = None,
    average: int = 1,
    cut_padding: bool = False,
    license_id: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
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
        cut_padding: leave out the rows of the vocabulary that belong to no token.
        license_id: for the card, as hubs name licences.
        tokenizer: the folder or sentencepiece `.model` where the tokenizer lies now, if not where it lay in training; of a
            run its fingerprint proves that it is the one.

    Returns: the published folder.
    Raises:
        SteelError: no whole checkpoint, a used output, a tokenizer that is gone, tensors that are not the model's,
            numbers that do not fit the dtype, logits that differ, a full disk. Nothing is left behind.
    """
    from megatron_steel.convert import card, sources, upload

    if dtype not in DTYPES:
        raise SteelError(f"there is no dtype {dtype!r} for weights", "--dtype", f"use one of {', '.join(DTYPES)}")
    card.require_license(license_id)
    target = Path(output).absolute()
    refuse_used(target)
    described, place = (Path(path) if path is not None else None for path in (model, tokenizer))
    trained = sources.find(Path(source), described, average, place)
    made = _write(trained, target, dtype, verify, audit, cut_padding, license_id)
    print(f"{output}: {made}")
    print(upload.upload_commands(output, bool(license_id)))
    return target


def _write(
    trained: "Trained",
    target: Path,
    dtype: str,
    verify: bool,
    audit: Callable[[Path], dict[str, Any]] | None,
    cut_padding: bool,
    license_id: str | None,
) -> str:
    """Fill and publish the folder; returns what to tell."""
    import torch  # takes seconds, while which `sources.find` hashes

    from megatron_steel.convert import card, companions, names, padding, shards
    from megatron_steel.convert.verify import verify_export
    from megatron_steel.data.checksums import write_checksums

    where, report = trained.checkpoint.path, trained.verdict
    if report is None and audit is not None and not trained.foreign:
        report = audit(where)
    config = padding.without_padding(trained.config, trained.tokenizer) if cut_padding else trained.config
    whole = shards.blueprint_of(trained.config)
    blueprint = shards.blueprint_of(config) if cut_padding else whole
    padding.require_cuttable(whole.shapes, blueprint.shapes)
    rows = padding.padding_rows(config, trained.tokenizer)
    cut = len(padding.padding_rows(trained.config, trained.tokenizer)) - len(rows)
    weights = padding.cut_rows(trained.weights(), whole.shapes, blueprint.shapes)
    shapes = dict(names.published(config.model_type, blueprint.shapes.items()))
    dtypes = dict.fromkeys(shapes, getattr(torch, dtype)) | blueprint.integers
    with publishing(target) as folder:
        files = shards.write_pieces(names.published(config.model_type, weights), shapes, folder, dtypes, where)
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
        made = card.Made(config, blueprint.shapes, dtype, loader, rows, cut, difference, license_id, trained.notes)
        card.write_card(folder, target.name, trained.checkpoint, made)
        write_checksums(folder)
    told = (
        f"{blueprint.architecture} of {trained.label}, {blueprint.parameters:,} parameters in {dtype}, "
        f"{len(files)} weight file{'s' if len(files) > 1 else ''}"
    )
    if not rows:
        return told
    return f"{told}\nrows {rows.start}..{rows.stop - 1} of the vocabulary belong to no token (--cut-padding leaves them out)"


def refuse_used(target: Path) -> None:
    """Raise SteelError where something lies that publishing would replace, or where training would replace the output."""
    remedy = "name another folder, or move this one away"
    if target.is_symlink():  # one to an empty folder could be filled but not replaced
        raise SteelError("the output is a link and is never overwritten", target, remedy)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise SteelError("the output exists already and is never overwritten", target, remedy)
    for parent in target.resolve().parents:
        checkpoints = parent.name == "checkpoints" and next(parent.glob("step-*"), None) is not None
        if checkpoints or ((parent / MANIFEST).is_file() and (parent / "engine").is_dir()):
            raise SteelError("the output would lie among a run's checkpoints, which training replaces", target,
                             "name a folder outside checkpoints/")  # fmt: skip


@contextlib.contextmanager
def publishing(target: Path, verb: str = "export") -> Iterator[Path]:
    """A folder to fill beside `target`; at a clean end it is synced and renamed, else it is gone.

    Raises SteelError where another process makes `target` meanwhile, or has made it, and where a folder of the scratch
    folder's name holds something else than what an export left.
    """
    from safetensors import SafetensorError

    scratch = target.with_name(f".{target.name}.export-partial")
    new_parents = [p for p in target.parents if not p.exists()]
    try:
        with _alone(scratch, target):
            refuse_used(target)  # another process may have finished it since this one looked
            try:
                _open_scratch(scratch)
                aside = scratch / target.name
                aside.mkdir()
                yield aside
                for path in [*aside.rglob("*"), aside]:
                    sync(path)
                os.replace(aside, target)
                sync(target.parent)
            finally:
                _remove_scratch(scratch)
    except BaseException as error:
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            what = f"the {verb} could not be written: {getattr(error, 'strerror', None) or error}"
            raise SteelError(what, target, f"free space or mend the folder, then {verb} again") from error
        raise


@contextlib.contextmanager
def _alone(scratch: Path, target: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(reserved(scratch))
        except FileExistsError:  # where a folder should be lies a file
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        except Busy:
            remedy = "wait for it or stop it, or name another folder"
            raise Busy("another process is writing this folder", target, remedy) from None
        yield


def _open_scratch(scratch: Path) -> None:
    """Make the scratch folder, in place of one that a killed export left; anything else of its name stays."""
    if scratch.is_symlink() or (scratch.exists() and not (scratch.is_dir() and _is_ours(scratch))):
        what = "a folder of this name holds what no export left"
        raise SteelError(what, scratch, "move it away, or name another output")
    _remove_scratch(scratch)
    scratch.mkdir()
    (scratch / _MARKER).touch()


def _is_ours(scratch: Path) -> bool:
    return (scratch / _MARKER).is_file() or not any(scratch.iterdir())


def _remove_scratch(scratch: Path) -> None:
    """Take away what an export left; the marker goes last, so that one killed here leaves it too."""
    if scratch.is_symlink() or not scratch.is_dir() or not _is_ours(scratch):
        return
    for path in scratch.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        (scratch / _MARKER).unlink(missing_ok=True)
        scratch.rmdir()
