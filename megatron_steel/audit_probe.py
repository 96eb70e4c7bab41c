"""Does any part of a model read the future? Each decoder layer, and each part of it, is asked alone.

A whole model at small initial weights proves nothing: what an almost dead FFN reads from later tokens is lost when its
output is added to the residual stream. So every part is run by itself, on the inputs it had in a real pass, and
again as a copy whose weights are drawn afresh and doubled until its output is of the order of 1. Two questions:

- perturbation: later inputs are replaced; how far do outputs up to t move, over their own RMS? 0 when causal, or rounding
  (a sparse mixture multiplies other numbers of rows). It finds discrete choices, which have no gradient.
- gradient of output t by later inputs: is there any? A causal part has no path, so it is exactly 0 at any size of weight.

Lengths are odd primes, so that a length is never taken for a width. Knows nothing of files, data or losses.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_steel.audit_replay import (
    Call,
    embedding_of,
    forward,
    kind_of_layer,
    parts_of,
    record_calls,
    replay,
    token_axis,
)  # fmt: skip
from megatron_steel.errors import SteelError
from megatron_steel.model.parts import decoder_layers, rms

ROUNDING = 1e-5
"""Largest change of an output, over the outputs' RMS, that counts as rounding."""
_AWAKE, _DOUBLINGS = 0.5, 40


@dataclass(frozen=True)
class Reading:
    """One part at one size of weights; a model's numbers may be tiny, so all are shares."""

    perturbation: float
    """Largest change of an output up to t when inputs after t change, over the RMS of these outputs."""
    future_gradient: float
    """Largest gradient of output t by an input after t, over the largest by an input up to t; nan: not measured."""

    @property
    def reads_future(self) -> bool:
        return self.future_gradient > 0 or self.perturbation > ROUNDING


@dataclass(frozen=True)
class Part:
    """A part of a layer, or the layer itself (`name` is empty)."""

    name: str
    cls: str
    readings: dict[str, Reading]
    """At `ordinary` and at `enlarged` weights."""

    @property
    def reads_future(self) -> bool:
        return any(reading.reads_future for reading in self.readings.values())


def whole_model(model: nn.Module, length: int, seed: int = 0) -> Reading:
    """The model from its embeddings to its logits, as it is configured (attention included)."""
    ids, other, t = _two_sequences(model, length, seed)
    embedded: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    embedding = embedding_of(model)
    handle = embedding.register_forward_hook(note) if embedding is not None else None
    try:
        with torch.enable_grad():
            logits = forward(model, ids)
            share = _future_share(logits, embedded[0], t, 1) if embedded else math.nan
    finally:
        if handle:
            handle.remove()
    with torch.no_grad():
        changed = forward(model, other)
    return Reading(_change(logits.detach(), changed, t, 1, "the model"), share)


def probe_layers(model: nn.Module, length: int, every: bool, seed: int = 0) -> list[list[Part]]:
    """The parts of every decoder layer, the layer itself first.

    Args:
        every: probe each layer; else one of each kind (same classes, shapes and settings), whose parts then stand for the
            others. The pass that collects their inputs ends at the last of them.
    """
    layers = decoder_layers(model)
    kinds: dict[Any, int] = {}
    stands_for = [kinds.setdefault(i if every else kind_of_layer(layer), i) for i, (_, layer) in enumerate(layers)]
    ids, _, t = _two_sequences(model, length, seed)
    chosen = {name: layer for i, (name, layer) in enumerate(layers) if stands_for[i] == i}
    calls = record_calls(chosen, lambda: forward(model, ids), length)
    found = {
        i: _probe(layers[i][1], calls[layers[i][0]], t, layers[i][0], seed) if layers[i][0] in calls else []
        for i in set(stands_for)
    }
    return [found[i] for i in stands_for]


@torch.no_grad()
def enlarge(model: nn.Module, length: int, seed: int = 0) -> nn.Module:
    """Draw a model's weights afresh, in place, so that every part of every layer adds its share to the stream."""
    _draw(model, seed)
    layers = dict(decoder_layers(model))
    ids, _, _ = _two_sequences(model, length, seed)
    for name, call in record_calls(layers, lambda: forward(model, ids), length).items():
        _wake(layers[name], call, call.x)
    return model


@torch.no_grad()
def _draw(module: nn.Module, seed: int) -> None:
    """Matrices normal with standard deviation 1 / sqrt(largest side), embeddings 1; all else moved by up to half, so that
    no gate is shut."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for p in module.parameters():
        if p.dim() >= 2:
            p.normal_(0, 1.0 if id(p) in tables else max(p.shape) ** -0.5, generator=generator)
        else:
            p.add_(torch.rand(p.shape, generator=generator) - 0.5)


@torch.no_grad()
def _wake(layer: nn.Module, call: Call, x: torch.Tensor) -> None:
    """Double the matrices of a part until its output has an RMS of half or more: some formulas are of fourth degree."""
    for name, inner in parts_of(layer, call, x).items():
        part = layer.get_submodule(name)
        matrices = [p for p in part.parameters() if p.dim() >= 2]
        for _ in range(_DOUBLINGS if matrices else 0):
            if not 0 < rms(replay(part, inner, inner.x)) < _AWAKE:
                break
            for p in matrices:
                p.mul_(2)


def _probe(layer: nn.Module, call: Call, t: int, where: str, seed: int) -> list[Part]:
    ordinary = _read(layer, call, call.x, t, where, seed)
    drawn = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(seed))
    larger = copy.deepcopy(layer)
    _draw(larger, seed)
    _wake(larger, call, drawn)
    enlarged = _read(larger, call, drawn, t, None, seed)
    return [
        dataclasses.replace(part, readings={"ordinary": part.readings["read"], "enlarged": other.readings["read"]})
        for part, other in zip(ordinary, enlarged, strict=True)
    ]


def _read(layer: nn.Module, call: Call, x: torch.Tensor, t: int, where: str | None, seed: int) -> list[Part]:
    """The layer and its parts, on what reaches them when the layer is given `x`."""
    with torch.no_grad():
        whole = dataclasses.replace(call, x=x, y=replay(layer, call, x))
    calls = parts_of(layer, call, x)
    parts = [("", layer, whole), *((name, layer.get_submodule(name), inner) for name, inner in calls.items())]
    return [
        Part(name, type(m).__name__, {"read": _ask(m, c, t, where and f"{where}.{name}".rstrip("."), seed)})
        for name, m, c in parts
    ]


def _ask(module: nn.Module, call: Call, t: int, where: str | None, seed: int) -> Reading:
    axis = token_axis(call.x)
    later = torch.arange(call.x.shape[axis]) > t
    noise = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(seed + 1)) * rms(call.x)
    shape = [-1 if i == axis else 1 for i in range(call.x.dim())]
    with torch.no_grad():
        other = replay(module, call, torch.where(later.view(shape), noise, call.x))
    with torch.enable_grad():
        x = call.x.detach().clone().requires_grad_()
        y = replay(module, call, x * 1)  # a module may change its input in place
        share = _future_share(y, x, t, axis)
    return Reading(_change(call.y, other, t, axis, where), share)


def _change(y: torch.Tensor, other: torch.Tensor, t: int, axis: int, where: str | None) -> float:
    early, moved = (v.narrow(axis, 0, t + 1).double() for v in (y, other))
    difference = float((early - moved).abs().max())
    if where and not math.isfinite(difference):
        raise SteelError(f"{where} gives numbers that are not finite", where, "audit an earlier checkpoint")
    size = rms(early)
    return difference if difference == 0 or math.isnan(difference) else (difference / size if size else math.inf)


def _future_share(y: torch.Tensor, x: torch.Tensor, t: int, axis: int) -> float:
    """The largest gradient of y[t] by x after t, over the largest up to t. nan: no gradient, or not finite."""
    early = y.select(axis, t)
    weights = torch.randn(early.shape, generator=torch.Generator().manual_seed(t))
    size = rms(early)
    if not early.requires_grad or not math.isfinite(size):
        return math.nan
    (gradient,) = torch.autograd.grad((early * (weights / (size or 1.0))).sum(), x, allow_unused=True)
    if gradient is None:
        return 0.0
    own, future = (
        gradient.narrow(axis, *cut).abs().max().item() for cut in ((0, t + 1), (t + 1, -t - 1 + x.shape[axis]))
    )
    return future if future == 0 or math.isnan(future) else (future / own if own else math.inf)


def _two_sequences(model: Any, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Random tokens [1, T], the same with all tokens after t replaced, and t (odd, about a third of T)."""
    generator = torch.Generator().manual_seed(seed)
    words = model.config.get_text_config().vocab_size
    t = length // 3 | 1
    ids = torch.randint(0, words, (1, length), generator=generator)
    other = ids.clone()
    other[:, t + 1 :] += torch.randint(1, words, (1, length - t - 1), generator=generator)
    return ids, other % words, t
