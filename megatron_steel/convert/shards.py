"""A stream of fp32 weights becomes safetensors shards, each tensor checked against the model.

Memory is bounded by one shard. The model is laid out on the meta device only: names and shapes, no numbers.
Must not know where the stream comes from.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_steel.errors import SteelError
from megatron_steel.model.build import construct

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHARD_BYTES = 2_000_000_000
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Blueprint:
    """What a configuration builds."""

    architecture: str
    """Class name, as `architectures` of config.json wants it."""
    parameters: int
    """Numbers in all parameters; a tied matrix counts once."""
    shapes: dict[str, tuple[int, ...]]
    """Every tensor of the state dict; a tied one under its first name only."""


def blueprint_of(config: "PretrainedConfig") -> Blueprint:
    """Names and shapes that a model of this configuration has on disk."""
    with torch.device("meta"):
        model = construct(config, torch.float32)
    parameters = dict(model.named_parameters())
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
    shapes = {name: tuple(tensor.shape) for name, tensor in (parameters | buffers).items()}
    return Blueprint(type(model).__name__, sum(p.numel() for p in parameters.values()), shapes)


def write_shards(
    weights: Iterable[tuple[str, torch.Tensor]],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    dtype: str | None,
    where: Path,
) -> list[Path]:
    """Write `model.safetensors`, or several shards and their index. Returns the weight files.

    Args:
        weights: (name, tensor) pairs in any order, each once.
        shapes: exactly what must come.
        dtype: of the files, a torch dtype's name; None keeps each tensor's own.
        where: named in errors.

    Raises:
        SteelError: a tensor too many, too few or of another shape, or numbers that the dtype cannot hold.
    """
    missing = dict(shapes)
    held: dict[str, torch.Tensor] = {}
    written: list[list[str]] = []
    held_bytes = total_bytes = 0
    for name, tensor in weights:
        _expect(name, tuple(tensor.shape), missing, where)
        tensor = cast(name, tensor, dtype, where)
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > SHARD_BYTES:
            written.append(_write(held, folder / f"{len(written)}.part"))
            held, held_bytes = {}, 0
        held[name] = tensor
        held_bytes, total_bytes = held_bytes + size, total_bytes + size
    if missing:
        name, shape = next(iter(missing.items()))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _unlike(f"lacks {name} {shape}{more}", where)
    written.append(_write(held, folder / f"{len(written)}.part"))
    return _name_files(written, total_bytes, folder)


def cast(name: str, tensor: torch.Tensor, dtype: str | None, where: Path) -> torch.Tensor:
    """The tensor in the dtype of the export, contiguous. Raises SteelError where that makes numbers non-finite."""
    narrow = tensor.to(getattr(torch, dtype) if dtype else tensor.dtype).contiguous()
    if bool(torch.isfinite(narrow).all()):
        return narrow
    if not bool(torch.isfinite(tensor).all()):
        raise SteelError(f"{name} holds numbers that are not finite", where, "export an earlier checkpoint")
    largest = float(tensor.abs().max())
    raise SteelError(f"{name} holds {largest:.3g}, which {dtype} cannot hold", where, "export with --dtype bfloat16")


def _expect(name: str, shape: tuple[int, ...], missing: dict[str, tuple[int, ...]], where: Path) -> None:
    expected = missing.pop(name, None)
    if expected is None:
        raise _unlike(f"holds {name} {shape}, which the model does not have (or has once)", where)
    if expected != shape:
        raise _unlike(f"holds {name} as {shape}, the model has {expected}", where)


def _unlike(what: str, where: Path) -> SteelError:
    return SteelError(f"the checkpoint is not of the model that its recipe describes: it {what}", where,
                      "use the version of megatron_steel and transformers that trained it, or another checkpoint")  # fmt: skip


def _write(tensors: dict[str, torch.Tensor], file: Path) -> list[str]:
    from safetensors.torch import save_file

    save_file(tensors, str(file), metadata={"format": "pt"})
    return list(tensors)


def _name_files(written: list[list[str]], total_bytes: int, folder: Path) -> list[Path]:
    """Give the parts their final names, which hold the number of shards; with several, write the index."""
    count = len(written)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    for i, name in enumerate(names):
        os.replace(folder / f"{i}.part", folder / name)
        os.chmod(folder / name, folder.stat().st_mode & 0o666)  # safetensors writes for the owner alone
    if count > 1:
        weight_map = {tensor: name for name, part in zip(names, written, strict=True) for tensor in part}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]
