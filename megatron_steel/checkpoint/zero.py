"""DeepSpeed's checkpoint files as a stream of (name, fp32 weight), for any ZeRO stage and world size.

Needs no process group and no GPU. Stages 1 to 3 are read through DeepSpeed's own lazy reader, which maps the
files and joins one tensor's pieces at a time; stage 0 has one file with everything in it. Knows nothing of
models: names and shapes come from the files.
"""

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
    if list(engine.glob("*zero_pp_rank_*_optim_states.pt")):
        yield from _zero_weights(checkpoint)
    else:
        yield from _stage0_weights(engine)


def _zero_weights(checkpoint: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    lazy = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=ENGINE, lazy_mode=True)
    seen: set[int] = set()
    for name, pieces in lazy.items():
        if id(pieces) in seen:
            continue  # DeepSpeed lists a tied weight under each of its names
        seen.add(id(pieces))
        yield name, pieces.contiguous().float()


def _stage0_weights(engine: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    import torch

    files = sorted(engine.glob("mp_rank_00_model_states.pt"))
    if not files:
        raise SteelError("the engine/ folder holds no DeepSpeed model states", engine, "use another checkpoint")
    state: dict[str, Any] = torch.load(files[0], map_location="cpu", mmap=True, weights_only=False)
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
