"""ZeRO stage 0 of another trainer: which fp32 weight is which, where nobody noted the names.

DeepSpeed writes the module's weights by name and, in half precision, the optimizer's fp32 weights without. One of these is
known for certain where rounding it gives exactly the bits of one weight of the module, and of no other. Knows nothing of
files: the state is handed in.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron_steel import dist


def weights_of_stage0(state: dict[str, Any], file: Path) -> dict[str, torch.Tensor]:
    """The weights by name, a tied one under its first: in fp32 where that is certain, else as the module held them.

    Args:
        state: of DeepSpeed's model states: `module`, `buffer_names`, `optimizer`.
        file: where it comes from, for the log, which says how many are which.
    """
    weights: dict[str, torch.Tensor] = {}
    known = set()
    for name, tensor in state["module"].items():
        if name not in state["buffer_names"] and tensor.untyped_storage().data_ptr() not in known:
            known.add(tensor.untyped_storage().data_ptr())
            weights[name] = tensor
    optimizer = state["optimizer"] or {}
    masters = [master for group in optimizer.get("fp32_groups", ()) for master in group]
    masters += [master for flat in optimizer.get("fp32_groups_flat", ()) for master in _cut(flat, weights)]
    if not masters:
        return weights
    dtype = next(iter(weights.values())).dtype
    rounded = [_bits(master.to(dtype)) for master in masters]
    times, names = Counter(rounded), Counter(map(_bits, weights.values()))
    certain = {bits: m for bits, m in zip(rounded, masters, strict=True) if times[bits] == names[bits] == 1}
    found = {name: certain.get(_bits(tensor), tensor).detach() for name, tensor in weights.items()}
    sure = sum(tensor.dtype == torch.float32 for tensor in found.values())
    dist.log.info(
        "%s does not say which fp32 weight is which: %d of %d tensors are known by what they round to, %d are taken in %s",
        file, sure, len(found), len(found) - sure, str(dtype).removeprefix("torch."),
    )  # fmt: skip
    return found


def _cut(flat: torch.Tensor, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A group's fp32 weights laid end to end, cut where they round to weights in the model's order; [] where they do not."""
    found, at = [], 0
    for tensor in weights.values():
        cut = flat[at : at + tensor.numel()]
        if cut.numel() == tensor.numel() and torch.equal(cut.to(tensor.dtype), tensor.flatten()):
            found.append(cut.view(tensor.shape))
            at += cut.numel()
    return found if at == flat.numel() else []


def _bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors of equal shape and bits."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return tuple(tensor.shape), str(tensor.dtype), hashlib.sha256(flat.numpy().data).digest()
