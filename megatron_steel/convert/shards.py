"""A stream of weights becomes safetensors shards, each tensor checked against the model.

1. The model is laid out on the meta device: names and shapes, no numbers. With the dtype they say what every file will hold
   and where, so the files' headers are written first.
2. Tensors come in any order, in flat pieces. Each piece is converted, checked and written to its place: memory is bounded by
   a piece, whatever the sizes of tensors and shards. (safetensors' own writer wants a whole shard in memory.)

The bytes are those of `safetensors.torch.save_file`. Must not know where the stream comes from.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_steel.checkpoint.zero import Weight
from megatron_steel.errors import SteelError
from megatron_steel.model.build import construct

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHARD_BYTES = 2_000_000_000
INDEX = "model.safetensors.index.json"
_PIECE = 1 << 20  # values that are converted at a time: they stay in the processor's cache
_CODES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32", "int32": "I32", "bfloat16": "BF16",
    "float16": "F16", "uint16": "U16", "int16": "I16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's dtypes as safetensors calls them, in the order in which it lays tensors into a file."""
_ORDER = list(_CODES)


@dataclass(frozen=True)
class Blueprint:
    """What a configuration builds."""

    architecture: str
    """Class name, as `architectures` of config.json wants it."""
    parameters: int
    """Numbers in all parameters; a tied matrix counts once."""
    shapes: dict[str, tuple[int, ...]]
    """Every tensor of the state dict; a tied one under its first name only."""
    integers: dict[str, torch.dtype]
    """Those that hold no fractions (buffers that count) and keep their dtype."""


def blueprint_of(config: "PretrainedConfig") -> Blueprint:
    """Names and shapes that a model of this configuration has on disk."""
    with torch.device("meta"):
        model = construct(config, torch.float32)
    parameters = dict(model.named_parameters())
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
    tensors = parameters | buffers
    return Blueprint(
        type(model).__name__,
        sum(p.numel() for p in parameters.values()),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tensor.dtype for name, tensor in tensors.items() if not tensor.is_floating_point()},
    )


def write_shards(
    weights: Iterable[tuple[str, torch.Tensor]],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    dtypes: Mapping[str, torch.dtype],
    where: Path,
) -> list[Path]:
    """`write_pieces` for whole tensors."""
    pieces = ((name, Weight(tuple(tensor.shape), (tensor.reshape(-1),))) for name, tensor in weights)
    return write_pieces(pieces, shapes, folder, dtypes, where)


def write_pieces(
    weights: Iterable[tuple[str, Weight]],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    dtypes: Mapping[str, torch.dtype],
    where: Path,
) -> list[Path]:
    """Write `model.safetensors`, or several shards and their index. Returns the weight files.

    Args:
        weights: tensors in any order, each once.
        shapes: exactly what must come; shards are cut in this order.
        dtypes: of each in the files.
        where: named in errors.

    Raises:
        SteelError: a tensor too many, too few or of another shape, or numbers that the dtype cannot hold.
    """
    layout = _layout(shapes, dtypes)
    places: dict[str, tuple[Path, int]] = {}
    for number, tensors in enumerate(layout):
        file = folder / f"{number}.part"
        begin = _write_header(file, tensors, shapes, dtypes)
        places |= {name: (file, begin + at) for name, at in tensors.items()}
    missing = dict(shapes)
    for name, weight in weights:
        _expect(name, weight.shape, missing, where)
        file, at = places[name]
        with file.open("r+b") as stream:
            stream.seek(at)
            for piece in converted(name, weight.pieces, dtypes[name], where):
                stream.write(piece.view(torch.uint8).numpy())
    if missing:
        name, shape = next(iter(missing.items()))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _unlike(f"lacks {name} {shape}{more}", where)
    total = sum(_bytes(shape, dtypes[name]) for name, shape in shapes.items())
    return _name_files([list(tensors) for tensors in layout], total, folder)


def converted(name: str, pieces: Iterable[torch.Tensor], dtype: torch.dtype, where: Path) -> Iterator[torch.Tensor]:
    """A tensor's pieces in the dtype of the export, one at a time: each is overwritten by the next.

    Raises SteelError where numbers are not finite, or the dtype makes them so.
    """
    room = torch.empty(_PIECE, dtype=dtype)  # fresh memory for each would cost more than the conversion
    for flat in pieces:
        for piece in flat.split(_PIECE):
            narrow = room[: piece.numel()].copy_(piece)
            if dtype.is_floating_point and not is_finite(narrow):
                _refuse(name, piece, dtype, where)
            yield narrow


def is_finite(values: torch.Tensor) -> bool:
    """Whether all numbers are, without a mask of them."""
    if values.dtype.itemsize == 1:
        values = values.float()  # torch compares none of the eight-bit kinds
    return values.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(values))  # NaN is both ends


def _refuse(name: str, piece: torch.Tensor, dtype: torch.dtype, where: Path) -> None:
    if not is_finite(piece):
        raise SteelError(f"{name} holds numbers that are not finite", where, "export an earlier checkpoint")
    what = f"{name} holds {float(piece.abs().max()):.3g}, which {_name_of(dtype)} cannot hold"
    raise SteelError(what, where, "export with --dtype bfloat16")


def _expect(name: str, shape: tuple[int, ...], missing: dict[str, tuple[int, ...]], where: Path) -> None:
    expected = missing.pop(name, None)
    if expected is None:
        raise _unlike(
            f"holds {name} {shape}, which the model does not have (or has once){_alike(name, missing)}", where
        )
    if expected != shape:
        raise _unlike(f"holds {name} as {shape}, the model has {expected}", where)


def _alike(name: str, missing: Iterable[str]) -> str:
    """What a name lacks or has too much at its front, where that is all: the model was trained inside of another module."""
    for other in missing:
        if name.endswith(f".{other}"):
            return f"; there it is {other}, without {name.removesuffix(other)!r} in front"
        if other.endswith(f".{name}"):
            return f"; there it is {other}, with {other.removesuffix(name)!r} in front"
    return ""


def _unlike(what: str, where: Path) -> SteelError:
    return SteelError(f"the checkpoint is not of the model that its configuration describes: it {what}", where,
                      "name the model that was trained, and use the versions of megatron_steel and transformers that "
                      "trained it")  # fmt: skip


def _layout(shapes: dict[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> list[dict[str, int]]:
    """Of each shard its tensors, as they lie in the file, and where each begins behind the header."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = _bytes(shape, dtypes[name])
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    layout = []
    for names in shards:
        at, tensors = 0, {}
        for name in sorted(names, key=lambda name: (_ORDER.index(_name_of(dtypes[name])), name)):
            tensors[name] = at
            at += _bytes(shapes[name], dtypes[name])
        layout.append(tensors)
    return layout


def _write_header(
    file: Path, tensors: dict[str, int], shapes: dict[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> int:
    """Make a file with its header; the values are still to come. Returns where they begin."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, at in tensors.items():
        code = _CODES[_name_of(dtypes[name])]
        end = at + _bytes(shapes[name], dtypes[name])
        header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [at, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    return 8 + len(text)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name_files(written: list[list[str]], total_bytes: int, folder: Path) -> list[Path]:
    """Give the parts their final names, which hold the number of shards; with several, write the index."""
    count = len(written)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    for i, name in enumerate(names):
        os.replace(folder / f"{i}.part", folder / name)
    if count > 1:
        weight_map = {tensor: name for name, part in zip(names, written, strict=True) for tensor in part}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]
