"""Each decoder layer compiled by itself: one graph that all layers of a model share.

The layer's own `forward` is compiled, not its call: hooks of the layer (ZeRO-3's, those that watch a run) stay outside
the graph. Hooks of modules inside it would be traced or skipped, so ZeRO-3 must fetch the layer's weights as one unit
(`compiled_layers` names them for it). Knows nothing of ranks, recipes or what a layer computes.
"""

from typing import Any

import torch
from torch import nn

from megatron_steel.model import parts
from megatron_steel.model.mixture_steel import SteelLaggedMixture

OUTSIDE = (SteelLaggedMixture,)
"""Modules that run uncompiled in a compiled layer: a dozen graphs, and new ones for every number of documents."""


def compile_layers(model: nn.Module, backend: Any = "inductor", fall_back: bool = False) -> int:
    """Compile every decoder layer in place; parameters and names stay. Returns how many.

    Shapes are static: another micro-batch size compiles anew. A lagged mixture stays outside the graph (`OUTSIDE`).

    Args:
        fall_back: what cannot be compiled when it is first called runs plain, with torch's warning why (for all of the
            process: torch has one such switch).
    """
    if fall_back:
        torch._dynamo.config.suppress_errors = True
    layers = [layer for _, layer in parts.decoder_layers(model)]
    for layer in layers:
        for part in layer.modules():
            if isinstance(part, OUTSIDE):
                part.__dict__["forward"] = torch.compiler.disable(part.forward)
        layer.__dict__["forward"] = torch.compile(layer.forward, backend=backend, dynamic=False)
    return len(layers)


def is_compiled(layer: nn.Module) -> bool:
    return hasattr(layer.__dict__.get("forward"), "_torchdynamo_orig_callable")


def compiled_layers(model: nn.Module) -> list[nn.Module]:
    """Layers whose forward is compiled: ZeRO-3 must fetch their weights whole."""
    return [module for module in model.modules() if is_compiled(module)]


def plain_forward(layer: nn.Module) -> Any:
    """A layer's own forward, compiled or not."""
    return getattr(layer.forward, "_torchdynamo_orig_callable", layer.forward)


def put_back(model: nn.Module) -> None:
    """Every layer's own forward again."""
    for layer in compiled_layers(model):
        for part in layer.modules():
            if part is layer or isinstance(part, OUTSIDE):
                part.__dict__.pop("forward", None)
