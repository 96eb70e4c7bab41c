"""Norm, rotary positions and SwiGLU in one kernel each, laid over the modules of one model, for where nothing compiles.

A module keeps its class, its parameters and its names: only its instance gets another `forward`, which `put_back` takes
off again. No class and no module of a library is changed. Only classes for which a test proves the equal result are
touched; any other stays as it is. Knows nothing of heads, layers, recipes or ranks.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.model.experts_steel import SteelMLP, SteelSENet

# Where a norm rounds: before its weight (Llama) or after it. tests/model/test_fused.py proves each line.
_NORMS = {
    "SteelRMSNorm": "llama", "LlamaRMSNorm": "llama", "MistralRMSNorm": "llama", "Qwen2RMSNorm": "llama",
    "Qwen3RMSNorm": "llama", "SmolLM3RMSNorm": "llama", "GraniteRMSNorm": "llama", "Olmo2RMSNorm": "gemma",
}  # fmt: skip
_GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "OlmoMLP", "Olmo2MLP", "GraniteMLP")
# Attention classes that rotate whole heads [B, N, T, d] by this function of their file.
_ROTARY = "apply_rotary_pos_emb"
_ATTENTION = ("SteelAttention", "LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention",
              "SmolLM3Attention", "GraniteAttention", "OlmoAttention", "Olmo2Attention")  # fmt: skip


def fuse(model: nn.Module, library: str) -> dict[str, int]:
    """Lay the kernels of `liger` (norm, rope, swiglu) or `apex` (norm) over a model.

    Returns:
        How many modules of each kind now use one.
    """
    found = {"norm": 0, "rope": 0, "swiglu": 0}
    for module in model.modules():
        name = type(module).__name__
        if name in _NORMS and _is_known(module):
            _lay(module, _liger_norm(_NORMS[name]) if library == "liger" else _apex_norm)
            found["norm"] += 1
        if library != "liger" or not _is_known(module):
            continue
        if name in _ATTENTION:
            _lay(module, _with_liger_rope(module))
            found["rope"] += 1
        if isinstance(module, SteelSENet):
            _lay(module, _liger_senet)
            found["swiglu"] += 1
        elif isinstance(module, SteelMLP) or (name in _GATED and isinstance(module.act_fn, (nn.SiLU, _silu_class()))):
            _lay(module, _liger_swiglu)
            found["swiglu"] += 1
    return found


def put_back(model: nn.Module) -> None:
    """Every module's own forward again."""
    for module in model.modules():
        if module.__dict__.pop("_fused", False):
            module.__dict__.pop("forward")


def _lay(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__["_fused"] = True
    module.__dict__["forward"] = types.MethodType(forward, module)


def _is_known(module: nn.Module) -> bool:
    """The class itself, not one of the same name in foreign code."""
    return type(module).__module__.startswith(("transformers.models.", SteelConfig.__module__.rpartition(".")[0]))


def _silu_class() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


def _liger_norm(casting: str) -> Callable[..., torch.Tensor]:
    from liger_kernel.ops import LigerRMSNormFunction

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        # Not in place: the gradient of a norm's output may be read by others.
        return LigerRMSNormFunction.apply(x, self.weight, eps, 0.0, casting, False)

    return forward


def _apex_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    return fused_rms_norm_affine(x, self.weight, self.weight.shape, eps)


def _liger_swiglu(self: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


def _liger_senet(self: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    z = LigerSiLUMulFunction.apply(self.gate_up_proj(x), self.up_proj(x))
    return LigerSiLUMulFunction.apply(self.gate_down_proj(z), self.down_proj(z))


def _liger_rope(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply(query, key, cos, sin)


def _with_liger_rope(module: nn.Module) -> Callable[..., Any]:
    """The class's forward over globals of its own, in which the rotary function is Liger's."""
    own = inspect.unwrap(type(module).forward)
    scope = {**own.__globals__, _ROTARY: _liger_rope}
    forward = types.FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward
