"""A checkpoint of any number of ranks, ZeRO stage and precision becomes the state of the engine that runs now.

1. `places` says which cut of which parameter lies where in this rank's flat fp32 tensors, for each of DeepSpeed's wrappers.
2. `layout_of` is a fingerprint of that: where it is the checkpoint's, DeepSpeed's own loading does, bit for bit.
3. `load` copies weights and moments cut by cut; every rank reads its own cuts from the mapped files.

DeepSpeed's public setters (`safe_set_full_fp32_param`) are not used: they fail where padding is needed, know nothing of stage
0, and need moments that exist only after the first step. Its attributes used here are internal, hence the pin in pyproject.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import dist
from megatron_steel.checkpoint import zero
from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Place:
    """`count` values from `start` of parameter `name` lie at `at` of `flat`, an fp32 tensor that the optimizer steps."""

    name: str
    flat: "torch.Tensor"
    at: int
    start: int
    count: int


def places(engine: "DeepSpeedEngine") -> list[Place]:
    """This rank's share of the fp32 weights, group by group in the optimizer's order."""
    optimizer, names = engine.optimizer, engine.param_names
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        return _stage3_places(optimizer, names)
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 in bf16
        return _linked_places(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
        return _linked_places(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in bf16
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return [_whole(names[p], flat) for low, high in pairs for p, flat in zip(low, high, strict=True)]
    if hasattr(optimizer, "fp32_groups_flat"):  # the same with a fused kernel
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
        return [place for low, flat in pairs for place in _end_to_end_places(low, flat, names)]
    return [_whole(names[p], p) for group in optimizer.param_groups for p in group["params"]]


def layout_of(engine: "DeepSpeedEngine") -> dict[str, Any]:
    """What must agree for DeepSpeed to load its own files; the same on every rank (a collective call)."""
    optimizer, base = engine.optimizer, _base(engine)
    cuts: list[Any] = [
        (p.name, p.flat.numel(), str(p.flat.device.type), p.at, p.start, p.count) for p in places(engine)
    ]
    if engine.zero_optimization_stage() == 0:  # there each parameter is a tensor of its own, whatever group it is in
        cuts.append([len(group["params"]) for group in base.param_groups])
    mine = {
        "optimizer": f"{type(optimizer).__name__}, {type(base).__module__}.{type(base).__name__}",
        "dtype": str(next(engine.module.parameters()).dtype).removeprefix("torch."),
        "ranks": dist.world_size(),
        "stage": engine.zero_optimization_stage(),
        "cuts": hashlib.sha256(json.dumps(cuts).encode()).hexdigest(),
    }
    return dist.gather(mine)[0]


def is_same(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Can DeepSpeed load its own files: the layouts agree, at stage 0, where rank 0 writes all, but for the ranks."""
    if before is None or before["stage"] != now["stage"] or now["stage"] > 0:
        return before == now
    return {**before, "ranks": now["ranks"]} == now


def load(engine: "DeepSpeedEngine", checkpoint: Path) -> None:
    """Fill weights, moments and counters from a checkpoint of any layout; a collective call.

    Raises SteelError on every rank when the checkpoint's parameters are not the model's; the engine is then unusable.
    """
    import torch

    if isinstance(_base(engine), torch.optim.Adafactor):
        what = "Adafactor's factored state goes on only in the precision and the groups that it was saved in"
        raise SteelError(what, checkpoint, "resume with train.precision and optim.lr_ratio of the checkpoint")
    if getattr(engine.optimizer, "swap_optimizer", False):
        what = "an optimizer that is offloaded to NVMe loads only what the same ranks and sharding have saved"
        raise SteelError(what, checkpoint, "resume as the checkpoint was written, or offload to the CPU")
    _event(engine, "checkpoint_event_prologue")  # stage 3: every weight is cut
    dist.together(lambda: _fill(engine, zero.contents(checkpoint), checkpoint))
    _event(engine, "checkpoint_event_epilogue")


def _fill(engine: "DeepSpeedEngine", stored: zero.Contents, where: Path) -> None:
    import torch

    missing = {name: p for p, name in engine.param_names.items()}
    buffers = dict(engine.module.named_buffers())
    mine: dict[str, Place] = {place.name: place for place in places(engine)}
    with torch.no_grad():
        _make_states(engine, stored.step)
        for parameter in stored.trained:
            target = missing.pop(parameter.name, None)
            if target is None or _shape(target) != parameter.shape:
                raise SteelError(f"the checkpoint's {parameter.name} {parameter.shape} is not the model's", where,
                                 "resume with the model that the run began with")  # fmt: skip
            _write_module(target, parameter.read)
            if parameter.name in mine:
                _write_place(engine, mine[parameter.name], parameter, stored.step)
        for name, tensor in stored.others.items():
            if name in buffers:
                buffers[name].copy_(tensor)
            elif name in missing:
                flat = tensor.flatten()
                _write_module(missing.pop(name), lambda _, start, count, flat=flat: flat[start : start + count])
    if missing:
        raise SteelError(f"the checkpoint lacks {next(iter(missing))}", where, "use another checkpoint")
    for name, value in stored.counters.items():
        setattr(engine, name, value)


def _write_module(target: "torch.nn.Parameter", read: Callable[..., "torch.Tensor"]) -> None:
    """The copy that the model computes with, in its own dtype: whole, or under ZeRO-3 this rank's cut."""
    import torch

    if not hasattr(target, "ds_id"):
        target.copy_(read(zero.WEIGHT, 0, target.numel()).view(target.shape))
        return
    piece = target.ds_tensor
    start = min(target.ds_numel, torch.distributed.get_rank(group=target.ds_process_group) * piece.numel())
    count = min(piece.numel(), target.ds_numel - start)
    piece[:count].copy_(read(zero.WEIGHT, start, count))


def _write_place(engine: "DeepSpeedEngine", place: Place, parameter: zero.Stored, step: int) -> None:
    targets, state = {zero.WEIGHT: place.flat}, _base(engine).state[place.flat] if step else {}
    targets |= {moment: state[moment] for moment in (*zero.MOMENTS, *zero.MOMENTUM) if moment in state}
    for quantity, flat in targets.items():
        values = parameter.read(quantity, place.start, place.count)
        flat.view(-1)[place.at : place.at + place.count].copy_(values)


def _make_states(engine: "DeepSpeedEngine", step: int) -> None:
    """Adam's state of every flat tensor as the kernel itself would make it, with its counter at `step`.

    Each tensor gets a counter of its own: a shared one would be counted up once for each. Before the first step there is
    no state, and the kernel makes it.
    """
    import torch

    base = _base(engine)
    in_group = type(base).__module__.startswith("apex")  # counts per group; DeepSpeed's kernels and torch's per tensor
    of_muon = {flat for group in base.param_groups if group.get("muon") for flat in group["params"]}
    for flat in _flats(engine):
        state = base.state[flat]
        if not step:
            base.state.pop(flat)
            continue
        for moment in zero.MOMENTUM if flat in of_muon else zero.MOMENTS:
            if moment in state:
                state[moment].zero_()
            else:
                state[moment] = torch.zeros_like(flat, requires_grad=False)
        if isinstance(base, torch.optim.AdamW):
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=flat.device)
        elif not in_group:
            state["step"] = step
    for group in base.param_groups:
        if in_group and step:
            group["step"] = step


def _flats(engine: "DeepSpeedEngine") -> "list[torch.Tensor]":
    """Every tensor that the optimizer steps on this rank, also one that holds nothing but padding."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups",
                 "fp32_groups_flat"):  # fmt: skip
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [flat for group in optimizer.param_groups for flat in group["params"]]


def _stage3_places(optimizer: Any, names: dict[Any, str]) -> list[Place]:
    import torch

    found = []
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        at = 0
        for p in group:
            cut = p.ds_tensor.ds_numel
            start = min(p.ds_numel, torch.distributed.get_rank(group=p.ds_process_group) * cut)
            found.append(Place(names[p], flat, at, start, min(cut, p.ds_numel - start)))
            at += cut
    return found


def _linked_places(groups: Any, flats: Any, names: dict[Any, str]) -> list[Place]:
    """Where DeepSpeed has linked each parameter to its cut of the flat tensor; None: the cut lies on other ranks."""
    found = []
    for flat, group in zip(flats, groups, strict=True):
        for p in group:
            if p._hp_mapping is not None:
                low, high = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                found.append(Place(names[p], flat, high.start, low.start, low.numel))
    return found


def _end_to_end_places(group: Any, flat: "torch.Tensor", names: dict[Any, str]) -> list[Place]:
    found, at = [], 0
    for p in group:
        found.append(Place(names[p], flat, at, 0, p.numel()))
        at += p.numel()
    return found


def _whole(name: str, flat: "torch.Tensor") -> Place:
    return Place(name, flat, 0, 0, flat.numel())


def _shape(p: Any) -> tuple[int, ...]:
    return tuple(p.ds_shape if hasattr(p, "ds_id") else p.shape)


def _base(engine: "DeepSpeedEngine") -> Any:
    """The Adam inside DeepSpeed's wrapper; at stage 0 in fp32 there is no wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _event(engine: "DeepSpeedEngine", name: str) -> None:
    if hasattr(engine.optimizer, name):
        getattr(engine.optimizer, name)()
