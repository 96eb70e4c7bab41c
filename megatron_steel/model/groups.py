"""Which parameters an optimizer treats alike: weight decay, learning-rate ratio, Muon or not; and their initial std by name.

Patterns are shell patterns over parameter names (`*.q_proj.weight`); the first that matches a name decides, and one
that matches no name is an error. Knows nothing of optimizers.
"""

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from megatron_steel.errors import SteelError


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    on: str = "matrices",
    lr_ratio: Mapping[str, float] | None = None,
    muon_lr_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups [{params, weight_decay}]; tied parameters once, frozen ones never, no empty group.

    Args:
        on: `matrices`: tensors of two and more dimensions decay, norms, biases and scalars do not;
            `matrices_without_embeddings`: nor do the weights of `nn.Embedding`, also where the head shares them; `all`.
        lr_ratio: {pattern: factor on the learning rate}, as muP has it (arXiv 2203.03466). Groups then have `lr_ratio`.
        muon_lr_ratio: Muon's learning rate as a share of the others'; its groups have `muon`: True. They are the matrices between embeddings and head.

    Raises SteelError: a pattern matches no parameter.
    """
    ratios = by_pattern(model, lr_ratio or {}, "optim.lr_ratio")
    embeddings, ends = _embeddings(model), _ends(model)
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # A parameter that ZeRO-3 has cut is flat; `ds_shape` remembers what it was.
        dimensions = len(getattr(p, "ds_shape", p.shape))
        spared = dimensions < 2 or (on == "matrices_without_embeddings" and id(p) in embeddings)
        muon = muon_lr_ratio is not None and dimensions == 2 and id(p) not in ends
        ratio = ratios.get(name, 1.0) * (muon_lr_ratio if muon and muon_lr_ratio is not None else 1.0)
        key = (spared and on != "all", muon, ratio)
        group = groups.setdefault(key, {"params": [], "weight_decay": 0.0 if key[0] else weight_decay})
        group["params"].append(p)
        if lr_ratio or muon_lr_ratio is not None:
            group["lr_ratio"] = ratio
        if muon:
            group["muon"] = True
    return [groups[key] for key in sorted(groups)]  # those that decay first


def draw_again(model: nn.Module, std: Mapping[str, float]) -> None:
    """Draw the parameters that a pattern matches from N(0, std), by torch's default generator.

    Raises SteelError: a pattern matches no parameter.
    """
    wanted = by_pattern(model, std, "model.init_std")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in wanted:
                p.normal_(0.0, wanted[name])


def by_pattern(model: nn.Module, patterns: Mapping[str, float], where: str) -> dict[str, float]:
    """{name: the value of the first pattern that matches it}; other parameters are not in it.

    Raises SteelError, saying that it stands at `where`: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            what = f"the pattern {pattern!r} matches no parameter (a tied weight goes by its first name)"
            raise SteelError(what, where, f"the nearest names: {', '.join(_nearest(pattern, names))}")
    return {n: next(v for p, v in patterns.items() if fnmatchcase(n, p)) for n in names
            if any(fnmatchcase(n, p) for p in patterns)}  # fmt: skip


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """Up to three names, by their pieces of as many words as the pattern has."""
    wanted = pattern.strip("*.")
    words = wanted.count(".") + 1
    pieces: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for i in range(max(1, len(parts) - words + 1)):
            pieces.setdefault(".".join(parts[i : i + words]), name)
    return list(dict.fromkeys(pieces[piece] for piece in difflib.get_close_matches(wanted, pieces, n=3, cutoff=0.0)))


def _embeddings(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _ends(model: nn.Module) -> set[int]:
    """Embeddings and the head, which Muon leaves to AdamW: their rows are words, not directions (Jordan, 2024)."""
    head: Any = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return _embeddings(model) | ({id(head.weight)} if head is not None else set())
