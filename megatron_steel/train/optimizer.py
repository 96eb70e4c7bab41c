"""The optimizer ladder: `choose` names the kernel, `build` makes the optimizer.

Knows nothing of ZeRO: sharding wraps what is built here.
"""

import importlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.errors import SteelError
from megatron_steel.recipe import Optim

if TYPE_CHECKING:
    import torch


HIGHEST_STAGE = {"adamw": 3, "muon": 2, "adafactor": 0}  # of ZeRO, that leaves each optimizer what it needs whole


def refuse_sharding(optim: Optim, stage: int, offload: bool) -> None:
    """Raise SteelError where ZeRO would hand the optimizer pieces of what it needs whole, and it would learn silently wrong."""
    highest = HIGHEST_STAGE[optim.name]
    if stage <= highest and not (offload and optim.name != "adamw"):
        return
    why = {"muon": "makes whole matrices orthogonal, and this sharding cuts every one of them or takes them off the device",
           "adafactor": "factors whole matrices, and ZeRO lays them end to end"}[optim.name]  # fmt: skip
    files = [f"zero{number}.json" for number in range(highest + 1)]
    raise SteelError(f"{optim.name} {why}", f"optim.name={optim.name} with ZeRO {stage}{' and offload' if offload else ''}",
                     f"use deepspeed.config={' or '.join(files)}, or optim.name=adamw")  # fmt: skip


def choose(kernel: str, device: str, offload: bool, sub_groups: bool = False, name: str = "adamw") -> str:
    """The fused Adam that `optim.kernel` means on this device: `apex`, `deepspeed` or `torch`.

    `auto` never fails and never compiles: NVIDIA's apex when it is installed, DeepSpeed's when it was built in
    advance, else torch's fused AdamW. Optimizers other than AdamW are torch's. Raises SteelError when the kernel asked
    for cannot run here.

    Args:
        offload: the optimizer's state lies on the CPU.
        sub_groups: parts of a parameter group are stepped one after another (ZeRO-3), each with a counter of its own;
            apex counts for the whole group.
    """
    if name != "adamw":
        if kernel not in ("auto", "torch"):
            raise SteelError(f"{name} has no {kernel} kernel", f"optim.kernel={kernel}", "use optim.kernel=auto")
        return "torch"
    if kernel == "auto":
        if _why_no_apex(device, offload, sub_groups) is None:
            return "apex"
        return "deepspeed" if _built_in_advance(device, offload) else "torch"
    problem = _why_no_apex(device, offload, sub_groups) if kernel == "apex" else None
    if problem:
        what, remedy = problem
        raise SteelError(f"NVIDIA's apex FusedAdam cannot run here: {what}", "optim.kernel=apex",
                         f"{remedy}optim.kernel=auto takes the fastest kernel that is there")  # fmt: skip
    if kernel == "deepspeed" and not _built_in_advance(device, offload):
        _refuse_impossible_build(device, offload)
    return kernel


def build(
    kernel: str, groups: list[dict[str, Any]], optim: Optim, device: str, offload: bool
) -> "torch.optim.Optimizer":
    """The optimizer over parameter groups (each with its own `weight_decay`), AdamW in the kernel that `choose` returned.

    The learning rate is 0 until the loop sets it: DeepSpeed makes an empty step at start, which must not decay. Adafactor
    (arXiv 1804.04235) has no first moment, takes steps relative to each tensor's RMS and never a rate above 1 / sqrt(step).
    """
    if optim.name == "adafactor":
        import torch

        # torch's own eps1 (1.2e-7) stands beside mean squares of gradients, which are far smaller in language models: the
        # factors would drop out. This one does not, and its square is still a normal fp32 number.
        return torch.optim.Adafactor(groups, lr=0.0, eps=(1e-18, 1e-3))
    settings: dict[str, Any] = {"lr": 0.0, "betas": tuple(optim.betas), "eps": optim.eps}
    if kernel == "apex":
        return importlib.import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True, **settings)
    if kernel == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if device == "cpu" or offload:
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return FusedAdam(groups, adam_w_mode=True, **settings)
    import torch

    if optim.name == "muon":
        from megatron_steel.train.muon import Muon

        return Muon(groups, optim.muon_momentum, optim.muon_adjust_lr_fn, fused=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


_BUILD_APEX = ("git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v "
               "--no-build-isolation . (needs nvcc of torch's CUDA version; a checkout from before 2025 wants --config-settings "
               "'--build-option=--cpp_ext' and '--build-option=--cuda_ext' instead of the variables); ")  # fmt: skip


def _why_no_apex(device: str, offload: bool, sub_groups: bool) -> tuple[str, str] | None:
    """What stands in the way of NVIDIA's apex and what to do about it; None: nothing.

    The name on PyPI belongs to a toolkit for web sites, whose package `apex` has no `optimizers`; it is not imported.
    """
    if device != "cuda" or offload:
        return f"its kernels work on a GPU's memory, and the optimizer is on {'the CPU' if offload else device}", ""
    if sub_groups:
        return "it counts steps for a whole group, and ZeRO-3 steps parts of groups", "use zero1.json or zero2.json; "
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "it is not installed", _BUILD_APEX
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return "the `apex` that is installed is another program, PyPI's", f"pip uninstall apex && {_BUILD_APEX}"
    try:
        importlib.import_module("torch")  # whose libraries the compiled part is linked to
        importlib.import_module("amp_C")
        importlib.import_module("apex.optimizers")
    except ImportError as error:
        return (
            f"it was built without its CUDA part, or for another torch ({error})",
            f"pip uninstall apex && {_BUILD_APEX}",
        )
    return None


def _operator(device: str, offload: bool) -> str:
    return "cpu_adam" if device == "cpu" or offload else "fused_adam"


def _built_in_advance(device: str, offload: bool) -> bool:
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(_operator(device, offload), False))


def _refuse_impossible_build(device: str, offload: bool) -> None:
    """DeepSpeed compiles its Adam at first use: say what is missing before it dies or hangs."""
    name = _operator(device, offload)
    missing = [tool for tool in ("ninja", "c++") if shutil.which(tool) is None]
    missing += ["nvcc"] if device == "cuda" and shutil.which("nvcc") is None else []
    if missing:
        raise SteelError(f"DeepSpeed compiles {name} at first use and {', '.join(missing)} is not on the path",
                         "optim.kernel=deepspeed", "install it, or use optim.kernel=auto")  # fmt: skip
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = sorted(root.glob(f"**/{name}/lock"))
    if locks:
        raise SteelError(f"an earlier build of {name} was killed and left its lock, which would hang this run forever",
                         locks[0], "delete that file (unless another job is compiling right now), or use optim.kernel=auto")  # fmt: skip
