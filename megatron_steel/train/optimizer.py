"""The optimizer ladder: `choose` names the kernel, `build` makes the optimizer.

Knows nothing of ZeRO: sharding wraps what is built here.
"""

import importlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.errors import SteelError
from megatron_steel.recipe import Optim

if TYPE_CHECKING:
    import torch


def choose(kernel: str, device: str, offload: bool) -> str:
    """The fused Adam that `optim.kernel` means on this device: `apex`, `deepspeed` or `torch`.

    `auto` never fails and never compiles: NVIDIA's apex when it is installed, DeepSpeed's when it was built in
    advance, else torch's fused AdamW. Raises SteelError when the kernel asked for cannot run here.
    """
    if kernel == "auto":
        if device == "cuda" and not offload and _has_apex():
            return "apex"
        return "deepspeed" if _built_in_advance(device, offload) else "torch"
    if kernel == "apex" and (device != "cuda" or offload or not _has_apex()):
        raise SteelError(
            "NVIDIA's apex FusedAdam cannot run here",
            f"optim.kernel=apex on {device}{' with offload' if offload else ''}",
            "build apex from NVIDIA's repository with --cuda_ext on a CUDA machine (the PyPI name is another project), "
            "or use optim.kernel=auto",
        )
    if kernel == "deepspeed" and not _built_in_advance(device, offload):
        _refuse_impossible_build(device, offload)
    return kernel


def build(
    kernel: str, groups: list[dict[str, Any]], optim: Optim, device: str, offload: bool
) -> "torch.optim.Optimizer":
    """AdamW over parameter groups (each with its own `weight_decay`), in the kernel that `choose` returned.

    The learning rate is 0 until the loop sets it: DeepSpeed makes an empty step at start, which must not decay.
    """
    settings: dict[str, Any] = {"lr": 0.0, "betas": tuple(optim.betas), "eps": optim.eps}
    if kernel == "apex":
        return importlib.import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True, **settings)
    if kernel == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if device == "cpu" or offload:
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return FusedAdam(groups, adam_w_mode=True, **settings)
    import torch

    return torch.optim.AdamW(groups, fused=True, **settings)


def _has_apex() -> bool:
    try:
        importlib.import_module("amp_C")  # NVIDIA's compiled part; another project's `apex` has none
        return hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
    except ImportError:
        return False


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
