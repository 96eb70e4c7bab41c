"""Does any part of a model read the future? Each decoder layer, and each part of it, is asked alone.

A whole model at small initial weights proves nothing: what an almost dead FFN reads from later tokens is lost when its
output is added to the residual stream. So every part is run by itself, on the inputs it had in a real pass, and
again as a copy whose weights are drawn afresh and doubled until its output is of the order of 1. Two questions:

- perturbation: later inputs are replaced; how far do outputs up to t move, over their own RMS? 0 when causal, or rounding
  (a sparse mixture multiplies other numbers of rows). It finds discrete choices, which have no gradient.
- gradient of output t by later inputs: is there any? A causal part has no path, so it is exactly 0 at any size of weight.

Lengths are odd primes, so that a length is never taken for a width. Knows nothing of files, data or losses.
"""

import contextlib
import copy
import dataclasses
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_steel.errors import SteelError

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


@dataclass
class _Call:
    """What a module was called with, and what it gave: `x` is its sequence of vectors [B, T, h] (or [T, h])."""

    args: tuple
    kwargs: dict[str, Any]
    slot: int | str
    x: torch.Tensor
    y: torch.Tensor


class _SeenEnough(Exception):  # noqa: N818  (it ends a forward pass early)
    pass


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers in order; [] where the model keeps no list of them."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    wanted = getattr(text, "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    # The list of that length, else the outermost; a list of experts lies deeper than the layers.
    lists.sort(key=lambda item: (len(item[1]) != wanted, item[0].count("."), -len(item[1])))
    if not lists:
        return []
    name, found = lists[0]
    return [(f"{name}.{i}", layer) for i, layer in enumerate(found)]


def forward(model: nn.Module, ids_BT: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits [B, T, V] of a pass without a cache."""
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    return logits_of(model(input_ids=ids_BT, **inputs))


def logits_of(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's call names this argument."""
    return name in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def asked(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, as before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def rms(x: torch.Tensor) -> float:
    """Root mean square, in fp64: numbers of 1e-25 have squares."""
    return float(x.detach().double().pow(2).mean().sqrt())


def whole_model(model: nn.Module, length: int, seed: int = 0) -> Reading:
    """The model from its embeddings to its logits, as it is configured (attention included)."""
    ids, other, t = _two_sequences(model, length, seed)
    embedded: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    embedding = _embedding(model)
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
    stands_for = [kinds.setdefault(i if every else _kind(layer), i) for i, (_, layer) in enumerate(layers)]
    ids, _, t = _two_sequences(model, length, seed)
    chosen = {name: layer for i, (name, layer) in enumerate(layers) if stands_for[i] == i}
    calls = _calls(chosen, lambda: forward(model, ids), length)
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
    for name, call in _calls(layers, lambda: forward(model, ids), length).items():
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
def _wake(layer: nn.Module, call: _Call, x: torch.Tensor) -> None:
    """Double the matrices of a part until its output has an RMS of half or more: some formulas are of fourth degree."""
    for name, inner in _parts(layer, call, x).items():
        part = layer.get_submodule(name)
        matrices = [p for p in part.parameters() if p.dim() >= 2]
        for _ in range(_DOUBLINGS if matrices else 0):
            if not 0 < rms(_replay(part, inner, inner.x)) < _AWAKE:
                break
            for p in matrices:
                p.mul_(2)


def _probe(layer: nn.Module, call: _Call, t: int, where: str, seed: int) -> list[Part]:
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


def _read(layer: nn.Module, call: _Call, x: torch.Tensor, t: int, where: str | None, seed: int) -> list[Part]:
    """The layer and its parts, on what reaches them when the layer is given `x`."""
    with torch.no_grad():
        whole = dataclasses.replace(call, x=x, y=_replay(layer, call, x))
    calls = _parts(layer, call, x)
    parts = [("", layer, whole), *((name, layer.get_submodule(name), inner) for name, inner in calls.items())]
    return [
        Part(name, type(m).__name__, {"read": _ask(m, c, t, where and f"{where}.{name}".rstrip("."), seed)})
        for name, m, c in parts
    ]


def _ask(module: nn.Module, call: _Call, t: int, where: str | None, seed: int) -> Reading:
    axis = _axis(call.x)
    later = torch.arange(call.x.shape[axis]) > t
    noise = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(seed + 1)) * rms(call.x)
    shape = [-1 if i == axis else 1 for i in range(call.x.dim())]
    with torch.no_grad():
        other = _replay(module, call, torch.where(later.view(shape), noise, call.x))
    with torch.enable_grad():
        x = call.x.detach().clone().requires_grad_()
        y = _replay(module, call, x * 1)  # a module may change its input in place
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


def _calls(modules: dict[str, nn.Module], run: Any, length: int) -> dict[str, _Call]:
    """Run, and note the first call of each module that maps a sequence of vectors to one; stop when all are seen."""
    calls: dict[str, _Call] = {}
    waiting = set(modules)
    handles = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if name not in waiting:
                return
            waiting.discard(name)
            slot, x = _sequence({**dict(enumerate(args)), **kwargs}, length)
            _, y = _sequence(dict(enumerate(output if isinstance(output, tuple) else (output,))), length)
            if x is not None and y is not None:
                calls[name] = _Call(args, kwargs, slot, x.detach().clone(), y.detach().clone())
            if not waiting:
                raise _SeenEnough

        return note

    try:
        handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
        with torch.no_grad(), contextlib.suppress(_SeenEnough):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _sequence(values: dict[Any, Any], length: int) -> tuple[Any, torch.Tensor | None]:
    """The first floating tensor [B, T, h] or [T, h] among arguments or results, and its place."""
    for slot, value in values.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if value.dim() == 3 and value.shape[1] == length:
                return slot, value
            if value.dim() == 2 and value.shape[0] == length:
                return slot, value
    return None, None


def _axis(x: torch.Tensor) -> int:
    """The one that counts tokens."""
    return x.dim() - 2


def _replay(module: nn.Module, call: _Call, x: torch.Tensor) -> torch.Tensor:
    args, kwargs = list(call.args), dict(call.kwargs)
    if isinstance(call.slot, int):
        args[call.slot] = x.clone()
    else:
        kwargs[call.slot] = x.clone()
    output = module(*args, **kwargs)
    _, y = _sequence(dict(enumerate(output if isinstance(output, tuple) else (output,))), x.shape[_axis(x)])
    assert y is not None  # it gave one before
    return y


def _parts(layer: nn.Module, call: _Call, x: torch.Tensor) -> dict[str, _Call]:
    """What reaches the parts of which the layer's own code is made when it is given `x`: the outermost modules inside."""
    inside = {name: m for name, m in layer.named_modules() if name}
    calls = _calls(inside, lambda: _replay(layer, call, x), x.shape[_axis(x)])
    return {name: c for name, c in calls.items() if not any(name.startswith(f"{other}.") for other in calls)}


def _kind(layer: nn.Module) -> tuple:
    """Equal for layers that differ in nothing but their weights and their number."""
    parts = []
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and key not in ("layer_idx", "training")
        }
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
        parts.append((name, type(module), tuple(sorted(settings.items())), tuple(shapes)))
    return tuple(parts)


def _embedding(model: Any) -> nn.Module | None:
    with contextlib.suppress(NotImplementedError, AttributeError):
        found = model.get_input_embeddings()
        if isinstance(found, nn.Module):
            return found
    words = model.config.get_text_config().vocab_size
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings >= words)
    return next(tables, None)
