"""The measuring process: one task, answered in marked lines on stdout."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu import lines, report
from megatron_steel import dist
from megatron_steel.errors import SteelError


def answer(task: dict[str, Any]) -> int:
    """Do what the task says. Returns the exit code; a part that cannot run here is an answer, not a failure."""
    if task["task"] == "apex":
        return _apex(task)
    device = dist.start()
    logging.getLogger("megatron_steel").setLevel(logging.WARNING)
    lines.say("device", **report.device_facts(device))
    if device.type != "cuda" and not task["toy"]:
        print("torch sees no CUDA device", file=sys.stderr)
        return 78
    try:
        _answer(task, device)
    except SteelError as error:
        lines.say("cannot run", reason=" ".join(str(error).split()))
    return 0


def _answer(task: dict[str, Any], device: Any) -> None:
    from gpu import alone, speed

    if task["task"] == "checks":
        for check in _checks(task, device):
            lines.say("check", **check.as_dict())
    elif task["task"] == "measure":
        speed.measure(task, device)
    elif task["task"] == "profile":
        speed.profile(task, device)
    elif task["task"] == "ceilings":
        alone.ceilings(device, task["toy"])
    else:
        alone.head(device, task["toy"])


def _checks(task: dict[str, Any], device: Any) -> Iterator[Any]:
    import torch

    from gpu import parity, steps, whole_run
    from gpu.checks import guarded

    torch.set_float32_matmul_precision("highest")  # TF32 would round the twins' products to ten bits
    group, toy = task["group"], task["toy"]
    if group == "head":
        return parity.heads(device, toy)
    if group == "adam":
        return parity.adams(device, task["build_deepspeed_adam"])
    if group == "liger":
        return parity.ligers(device)
    if group.startswith("steps "):
        return guarded(group, steps.steps, device, group.removeprefix("steps "), toy)
    whole = {"pieces": steps.pieces, "documents": steps.documents, "resume": whole_run.resume,
             "export": whole_run.exported}  # fmt: skip
    return guarded(group, whole[group], device, toy)


def _apex(task: dict[str, Any]) -> int:
    from gpu import apex

    try:
        lines.say("apex", paths=apex.build(Path(task["checkout"]), Path(task["folder"])), reason="")
    except Exception as error:
        lines.say("apex", paths=[], reason=f"{type(error).__name__}: {str(error)[:300]}")
    return 0
