"""Steel's MLPs, its experts as batched products, and the three mixtures of the published model. Travels with every export.

Expert weights are stacked inside the forward and multiplied in one product; every parameter keeps its published name.
Imports nothing but torch and its own configuration; knows no attention, cache, ranks or optimizer.

Shapes: B batch, T tokens, h hidden, i inner, o outputs, n experts, p slots of an expert, s = n p slots, M rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .configuration_steel import SteelConfig


class SteelMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    first, second = ("gate_proj", "up_proj"), ("down_proj",)

    def __init__(self, config: SteelConfig, inner_size: int | None = None):
        super().__init__()
        inner = config.inner_size if inner_size is None else inner_size
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SteelSENet(nn.Module):
    """Two SwiGLUs: z = silu(gate_up x) * up x, then silu(gate_down z) * down z. (No squeeze-excitation, despite the name.)"""

    first, second = ("gate_up_proj", "up_proj"), ("gate_down_proj", "down_proj")

    def __init__(self, config: SteelConfig, inner_size: int | None = None):
        super().__init__()
        inner = config.inner_size if inner_size is None else inner_size
        self.gate_up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.gate_down_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = F.silu(self.gate_up_proj(x)) * self.up_proj(x)
        return F.silu(self.gate_down_proj(z)) * self.down_proj(z)


MLP = {"raw": SteelMLP, "senet": SteelSENet}


# ---- experts as batched products


class _Stacked(torch.autograd.Function):
    """Products of x with the stacked weights of all experts. It keeps the parameters for the backward pass and stacks
    them again there: the copy lives for one product, and ZeRO-3 may let go of the weights in between."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, n: int, *weights: torch.Tensor) -> torch.Tensor:
        ctx.n = n
        ctx.save_for_backward(x, *weights)
        w_noi = _stack(weights, n, x.dtype)
        return torch.bmm(x.expand(n, -1, -1), w_noi.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        w_noi, grad_nMo = _stack(weights, ctx.n, x.dtype), grads[0].to(x.dtype)
        grad_w = torch.bmm(grad_nMo.transpose(1, 2), x.expand(ctx.n, -1, -1))
        if x.dim() == 3:
            grad_x = torch.bmm(grad_nMo, w_noi)
        else:  # summed as it comes, never [n, M, i]
            grad_x = grad_nMo[0] @ w_noi[0]
            for grad_Mo, w_oi in zip(grad_nMo[1:], w_noi[1:], strict=True):
                grad_x = torch.addmm(grad_x, grad_Mo, w_oi)
        pieces = grad_w.view(len(weights), *weights[0].shape).to(weights[0].dtype)
        return grad_x, None, *pieces.unbind()


def _stack(weights: Any, n: int, dtype: torch.dtype) -> torch.Tensor:
    """[o, i] each, those of one expert next to each other -> [n, o of all, i]."""
    return torch.stack([weight.to(dtype) for weight in weights]).view(n, -1, weights[0].shape[1])


def _linears(experts: Any, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    """x [n, M, i], or [M, i] for all experts -> [n, M, outputs of all names side by side], in the dtype of x."""
    weights = [expert.get_submodule(name).weight for expert in experts for name in names]
    with torch.autocast(x.device.type, enabled=False):
        return _Stacked.apply(x, len(experts), *weights)


def _glu(pair: torch.Tensor) -> torch.Tensor:
    gate, value = pair.chunk(2, dim=-1)
    return F.silu(gate) * value


def first_products(experts: Any, x: torch.Tensor) -> torch.Tensor:
    """x [n, M, h] or [M, h] -> gate and value side by side, [n, M, 2 i]."""
    return _linears(experts, experts[0].first, x)


def outputs_of(experts: Any, pair_nMi: torch.Tensor) -> torch.Tensor:
    """From the first products (gate and value side by side) to the outputs [n, M, h] of all experts."""
    out = _linears(experts, experts[0].second, _glu(pair_nMi))
    return _glu(out) if len(experts[0].second) == 2 else out


def run_experts(experts: Any, x: torch.Tensor) -> torch.Tensor:
    """x [n, M, h] (own rows for each expert) or [M, h] (the same for all) -> [n, M, h]."""
    return outputs_of(experts, first_products(experts, x))


def make_experts(config: SteelConfig) -> nn.ModuleList:
    return nn.ModuleList([MLP[config.mlp_type](config) for _ in range(config.n_experts)])


def as_autocast_wants(x: torch.Tensor) -> torch.Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# ---- the published mixtures


class SteelSoftMoEV1(nn.Module):
    """Every token passes every expert; outputs are mixed by softmax(W x + b). Causal."""

    def __init__(self, config: SteelConfig):
        super().__init__()
        self.experts = make_experts(config)
        self.gating = nn.Linear(config.hidden_size, config.n_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = as_autocast_wants(x)
        weights_Mn = torch.softmax(self.gating(x).flatten(0, -2), dim=-1, dtype=torch.float32).to(x.dtype)
        parts_nMh = run_experts(self.experts, x.flatten(0, -2)) * weights_Mn.T[..., None]
        return parts_nMh.sum(0).view(x.shape)


class SteelSoftMoEV2(nn.Module):
    """Slots gather the sequence with softmax over slots, tokens read them with softmax over the sequence.

    NOT causal. The two axes are swapped against the Soft MoE paper (2308.00951); kept, because weights were trained so.
    """

    def __init__(self, config: SteelConfig):
        super().__init__()
        self.slots = config.slots_per_expert
        self.experts = make_experts(config)
        self.score = nn.Parameter(torch.randn(config.hidden_size, config.n_experts * config.slots_per_expert))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits_BTs = x @ self.score
        dispatch = torch.softmax(logits_BTs, dim=-1, dtype=torch.float32).to(x.dtype)
        combine = torch.softmax(logits_BTs, dim=1, dtype=torch.float32).to(x.dtype)
        return combine @ pass_slots(self.experts, dispatch.transpose(1, 2) @ x).to(combine.dtype)


class SteelSoftMoEV3(nn.Module):
    """Soft MoE with normalised logits: dispatch is a softmax over the sequence, combine over all slots.

    NOT causal. Unlike the paper, experts read the normalised x: its magnitude is lost; kept, because weights were trained so.
    """

    def __init__(self, config: SteelConfig):
        super().__init__()
        shape = (config.hidden_size, config.n_experts, config.slots_per_expert)
        self.phi = nn.Parameter(torch.randn(shape) / config.hidden_size**0.5)
        self.scale = nn.Parameter(torch.ones(1))
        self.experts = make_experts(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(x, dim=2)
        phi = self.scale * F.normalize(self.phi, dim=0)
        logits_BTs = x @ phi.flatten(1)
        dispatch = torch.softmax(logits_BTs, dim=1, dtype=torch.float32).to(logits_BTs.dtype)
        combine = torch.softmax(logits_BTs, dim=-1, dtype=torch.float32).to(logits_BTs.dtype)
        return combine @ pass_slots(self.experts, dispatch.transpose(1, 2) @ x).to(combine.dtype)


def pass_slots(experts: nn.ModuleList, slots_Bsh: torch.Tensor) -> torch.Tensor:
    """Each expert maps its own p consecutive slots. [B, s, h] -> [B, s, h]."""
    B, s, h = slots_Bsh.shape
    rows_nMh = slots_Bsh.view(B, len(experts), -1, h).transpose(0, 1).reshape(len(experts), -1, h)
    return run_experts(experts, rows_nMh).view(len(experts), B, -1, h).transpose(0, 1).reshape(B, s, h)
