"""How a model is computed on a device: one choice of head, attention, fused pieces and compilation for a run.

`choose` reads the recipe's `kernels` section: `auto` takes what runs here and never fails; a kernel asked for by name
that cannot run says what is missing and how to get it. What is computed is the same whichever is taken, within the
tolerances of the tests. Knows nothing of ranks, data or the optimizer.
"""

import importlib
import importlib.metadata
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from megatron_steel.errors import SteelError
from megatron_steel.model import regions
from megatron_steel.model.attention import Attention, choose_attention
from megatron_steel.model.text_to_text import is_text_to_text, require_plain
from megatron_steel.recipe import Kernels

_LIGER = "pip install liger-kernel (or megatron-steel[gpu])"
_APEX = "build it from github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"


_NO_GPU = "need a CUDA device"


@dataclass(frozen=True)
class Choice:
    """What `prepare_for_training` lays over a model; the default is the plain road on every device."""

    head: str = "chunked"
    attention: Attention = Attention()  # noqa: RUF009  (frozen itself)
    fused: str = "torch"
    compile: bool = False
    fall_back: bool = False
    """Layers that cannot be compiled run plain: `auto` never fails."""
    outside: tuple[str, ...] = ()
    """Classes that stay out of the compiled layers."""

    def __str__(self) -> str:
        layers = "compiled layer by layer" if self.compile else f"norm, rope and swiglu by {self.fused}"
        if self.outside:
            layers += f" but for {', '.join(self.outside)}, whose shapes follow the documents"
        return f"head {self.head}, attention {self.attention}, {layers}"


def choose(
    kernels: Kernels, model: PreTrainedModel, device: torch.device, precision: str = "bf16", documents: bool = False
) -> Choice:
    """The kernels of a run on this device.

    Where layers are compiled, inductor fuses norm, rope and swiglu, and the head's softmax; a library named for them
    therefore leaves `compile: auto` off.

    Args:
        model: may lie on the meta device.
        documents: packed documents are kept apart.

    Raises:
        SteelError: a kernel asked for by name cannot run here.
    """
    if is_text_to_text(model.config):
        require_plain(model, kernels.compile is True, documents)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    attention = choose_attention(kernels.attention, model, device, documents, dtype)
    compiled = _compiles(kernels, model, device)
    if compiled and kernels.fused in ("liger", "apex"):
        what = f"{kernels.fused}'s norm is not used in compiled layers: inductor fuses it"
        raise SteelError(what, f"kernels.compile=true, kernels.fused={kernels.fused}", "set one of them to auto")
    if kernels.head == "liger":
        _require(liger_problem(device), _LIGER, "kernels.head", "liger")
    # Not Liger's by itself: its chunks of 256 tokens re-read the weight, and no GPU figure says that it is faster.
    head = "chunked" if kernels.head == "auto" else kernels.head
    if not compiled:
        return Choice(head, attention, _fused(kernels.fused, device))
    outside = {type(module).__name__ for module in model.modules() if isinstance(module, regions.OUTSIDE)}
    return Choice(head, attention, "torch", True, kernels.compile == "auto", tuple(sorted(outside)))


def _compiles(kernels: Kernels, model: PreTrainedModel, device: torch.device) -> bool:
    if kernels.compile == "auto":
        # Not foreign code, which nobody has compiled; not where a run must repeat bitwise, as inductor times its kernels.
        known = type(model).__module__.startswith(("megatron_steel.", "transformers.models."))
        known = known and not is_text_to_text(model.config)  # lengths change from batch to batch
        wanted = known and kernels.fused in ("auto", "torch") and not torch.are_deterministic_algorithms_enabled()
        return wanted and device.type == "cuda" and _compiler_problem(device) is None
    if kernels.compile:
        _require(_compiler_problem(device), "install it", "kernels.compile", "true")
    return bool(kernels.compile)


def _fused(name: str, device: torch.device) -> str:
    if name == "auto":
        if device.type != "cuda":
            return "torch"
        if liger_problem(device) is None:
            return "liger"
        return "apex" if apex_problem(device) is None else "torch"
    if name == "liger":
        _require(liger_problem(device), _LIGER, "kernels.fused", "liger")
    if name == "apex":
        _require(apex_problem(device), _APEX, "kernels.fused", "apex")
    return name


def _require(problem: str | None, how: str, key: str, name: str) -> None:
    """`how` to get what is missing; no installation gives a machine a GPU."""
    if problem:
        get = "" if _NO_GPU in problem else f"{how}, or "
        raise SteelError(f"the kernel cannot run here: {problem}", f"{key}={name}", f"{get}use {key}=auto")


def _compiler_problem(device: torch.device) -> str | None:
    """What torch.compile lacks: triton and a C compiler for its launchers on a GPU, a C++ compiler on a CPU."""
    if device.type != "cuda":
        return None if shutil.which("c++") or shutil.which("g++") else "a C++ compiler (g++) is not on the path"
    from torch.utils._triton import has_triton

    if not has_triton():
        return "triton is not installed, or knows no such GPU"
    return None if any(map(shutil.which, ("cc", "gcc", "clang"))) else "a C compiler (gcc) is not on the path"


def liger_problem(device: torch.device) -> str | None:
    """Why Liger's kernels cannot run. First the device: no installation helps a machine without a GPU."""
    # triton's interpreter (TRITON_INTERPRET=1) computes on a CPU, slowly: for tests
    if device.type != "cuda" and not _interpreted():
        return f"Liger's kernels {_NO_GPU}, and this is {device.type}"
    return "liger-kernel is not installed" if importlib.util.find_spec("liger_kernel") is None else None


def _interpreted() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def apex_problem(device: torch.device) -> str | None:
    """Why NVIDIA apex's fused norm cannot run; PyPI's package of that name is another program."""
    if device.type != "cuda":
        return f"NVIDIA apex's kernels {_NO_GPU}, and this is {device.type}"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "NVIDIA apex is not installed"
    if not any((Path(folder) / "normalization").is_dir() for folder in spec.submodule_search_locations or []):
        return f"the installed apex {_version('apex')} is another program (PyPI's), not NVIDIA apex"
    try:
        importlib.import_module("apex.normalization")
    except Exception as error:  # whatever a foreign build raises
        return f"NVIDIA apex does not load; it may be built for another torch ({error})"
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return "NVIDIA apex was built without its CUDA extensions (fused_layer_norm_cuda)"
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"
