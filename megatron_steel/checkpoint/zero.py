"""DeepSpeed's checkpoint files as a stream of (name, fp32 weight), for any ZeRO stage and world size.

Needs no process group and no GPU. ZeRO's shards are read through DeepSpeed's own lazy reader, which maps the files
and joins one tensor's pieces at a time; two layouts that it does not know (stage 0; stage 1 in bf16) are read here. Knows nothing of
models: names and shapes come from the files.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.checkpoint.commit import ENGINE
from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    import torch

CLIENT_STATE = "megatron_steel"  # our key among DeepSpeed's own in a checkpoint: {"group_names": [[...], ...]}


def stream_weights(checkpoint: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield every parameter once, as fp32 on the CPU; a tied weight comes under its first name only.

    Args:
        checkpoint: a folder that holds `engine/`.
    Raises:
        SteelError: when there is no engine folder or its files are not DeepSpeed's.
    """
    engine = checkpoint / ENGINE
    if not engine.is_dir():
        raise SteelError("this is no checkpoint: it has no engine/ folder", checkpoint, "name a run or a step-N folder")
    shards = sorted(engine.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    if not shards:
        yield from _stage0_weights(engine)
    elif _stage(shards[0]) is None:
        yield from _stage1_bf16_weights(engine, shards)
    else:
        yield from _zero_weights(checkpoint)


def _zero_weights(checkpoint: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints its progress
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        lazy = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=ENGINE, lazy_mode=True)
    seen: set[int] = set()
    for name, pieces in lazy.items():
        if id(pieces) in seen:
            continue  # DeepSpeed lists a tied weight under each of its names
        seen.add(id(pieces))
        yield name, pieces.contiguous().float()


def _stage1_bf16_weights(engine: Path, shards: list[Path]) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Stage 1 in bf16 with fp32 gradients has a layout of its own, which DeepSpeed's zero_to_fp32 does not read.

    Each rank holds an equal cut of every group's parameters laid end to end; padding stands at the very end.
    """
    import torch

    shapes = _load(_only(engine, "mp_rank_00_model_states.pt"))["param_shapes"]
    cuts = [_load(shard)["optimizer_state_dict"]["single_partition_of_fp32_groups"] for shard in shards]
    for number, group in enumerate(shapes):
        pieces = [cut[number] for cut in cuts]
        at = 0
        for name, shape in group.items():
            yield name, _slice(pieces, at, shape.numel()).view(shape).to(torch.float32)
            at += shape.numel()


def _slice(pieces: list["torch.Tensor"], start: int, count: int) -> "torch.Tensor":
    """`count` values from `start` of equal flat pieces laid end to end; copies no more than these."""
    import torch

    size, found = pieces[0].numel(), []
    for number in range(start // size, (start + count - 1) // size + 1):
        found.append(pieces[number][max(0, start - number * size) : start + count - number * size])
    return torch.cat(found)


def _stage0_weights(engine: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    state = _load(_only(engine, "mp_rank_00_model_states.pt"))
    masters = _stage0_masters(state)
    seen: set[int] = set()
    for name, tensor in state["module"].items():
        pointer = tensor.untyped_storage().data_ptr()
        if name in state["buffer_names"] or pointer in seen:
            continue
        seen.add(pointer)
        yield name, masters.get(name, tensor).float()


def _stage0_masters(state: dict[str, Any]) -> dict[str, "torch.Tensor"]:
    """The fp32 copies that a bf16 stage-0 run trains, by name (an fp32 run trains the module itself)."""
    groups = (state.get("optimizer") or {}).get("fp32_groups")
    if not groups:
        return {}
    names = state[CLIENT_STATE]["group_names"]
    return {
        name: copy
        for group, copies in zip(names, groups, strict=True)
        for name, copy in zip(group, copies, strict=True)
    }


def _only(engine: Path, name: str) -> Path:
    if not (engine / name).is_file():
        raise SteelError("the engine/ folder holds no DeepSpeed model states", engine / name, "use another checkpoint")
    return engine / name


def _load(file: Path) -> dict[str, Any]:
    import torch

    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _stage(shard: Path) -> int | None:
    """The ZeRO stage a shard names; DeepSpeed's bf16 optimizer of stage 1 names none."""
    return _load(shard)["optimizer_state_dict"].get("zero_stage")


def _rank_of(shard: Path) -> int:
    return int(shard.name.split("zero_pp_rank_")[1].split("_")[0])
