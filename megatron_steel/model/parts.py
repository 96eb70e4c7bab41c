"""The decoder layers of any model, the attention and the FFN in each, and how large their numbers are.

Parts are found by their names and their matrices, so that foreign code works too; ZeRO-3 may have cut the parameters.
Knows nothing of what is asked of the parts, and of no rank.
"""

import math
from typing import Any

import torch
from torch import nn

_ATTENTION = ("attn", "attention")
_FEED_FORWARD = ("mlp", "ffn", "moe", "expert", "feedforward", "feed_forward")
_PIECE = 1 << 22  # numbers that are squared at once: a copy in fp64 of 32 MB


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers in order; [] where the model keeps no list of them."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    wanted = getattr(text, "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if getattr(config, "is_encoder_decoder", False):  # both stacks have such a list
        lists = [(name, m) for name, m in lists if name.startswith("decoder.")]
    # The list of that length, else the outermost; a list of experts lies deeper than the layers.
    lists.sort(key=lambda item: (len(item[1]) != wanted, item[0].count("."), -len(item[1])))
    if not lists:
        return []
    name, found = lists[0]
    return [(f"{name}.{i}", layer) for i, layer in enumerate(found)]


def attentions(layer: nn.Module) -> list[nn.Module]:
    """The parts of a layer that go by the name of attention."""
    return [part for name, part in _with_matrices(layer) if _is_called(name, part, _ATTENTION)]


def feed_forwards(layer: nn.Module) -> list[nn.Module]:
    """The parts of a layer that go by the name of an FFN; where none does, all that are neither attention nor norm."""
    others = [(name, part) for name, part in _with_matrices(layer) if not _is_called(name, part, _ATTENTION)]
    named = [part for name, part in others if _is_called(name, part, _FEED_FORWARD)]
    return named or [part for _, part in others]


def expert_parameters(ffn: nn.Module) -> list[nn.Parameter]:
    """The weights of a mixture's experts; of an FFN without experts all it has."""
    inside = [part for name, part in ffn.named_modules() if name.split(".")[-1] == "experts"]
    unique = {id(p): p for part in inside or [ffn] for p in part.parameters()}
    return list(unique.values())


def square_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares as an fp64 scalar on the device of `x`: numbers of 1e-25 have squares, and no large copy is made."""
    pieces = x.detach().reshape(-1).split(_PIECE)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]).square().sum()


def rms(x: torch.Tensor) -> float:
    """Root mean square."""
    return math.sqrt(float(square_sum(x)) / x.numel())


def first_tensor(output: Any) -> torch.Tensor | None:
    """What a part hands on, where it also gives weights or a router's opinion; None where it hands on no tensor."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else (output,)
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def _with_matrices(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    children = list(layer.named_children())
    if type(layer).__name__ == "T5Block":  # a list of residual branches, which add their input to what their part gives
        children = [child for branch in layer.get_submodule("layer").children() for child in branch.named_children()]
    # `ds_shape` is what a parameter was before ZeRO-3 cut it.
    return [
        (name, part)
        for name, part in children
        if any(len(getattr(p, "ds_shape", p.shape)) >= 2 for p in part.parameters())
    ]


def _is_called(name: str, part: nn.Module, words: tuple[str, ...]) -> bool:
    called = f"{name} {type(part).__name__}".lower()
    return any(word in called for word in words)
