"""Run a part of a model by itself: note what a module was called with in a real pass, and call it again with other inputs.

Modules are found by what they do (a sequence of vectors in, one out), not by their names, so that foreign code works too.
Knows nothing of what is asked of the parts.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Call:
    """What a module was called with, and what it gave: `x` is its sequence of vectors [B, T, h] (or [T, h])."""

    args: tuple
    kwargs: dict[str, Any]
    slot: int | str
    x: torch.Tensor
    y: torch.Tensor


_PROMPT = 7  # tokens; no length that is probed


class _SeenEnough(Exception):  # noqa: N818  (it ends a forward pass early)
    pass


def forward(model: nn.Module, ids_BT: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits [B, T, V] of a pass without a cache. An encoder-decoder's tokens are the decoder's, after one fixed prompt."""
    if takes(model, "decoder_input_ids"):
        inputs["decoder_input_ids"] = ids_BT
        words = model.config.get_text_config().vocab_size
        ids_BT = torch.arange(_PROMPT, device=ids_BT.device).expand(len(ids_BT), -1) % words
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


def record_calls(modules: dict[str, nn.Module], run: Any, length: int) -> dict[str, Call]:
    """Run, and note the first call of each module that maps a sequence of vectors to one; stop when all are seen."""
    calls: dict[str, Call] = {}
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
                calls[name] = Call(args, kwargs, slot, x.detach().clone(), y.detach().clone())
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


def token_axis(x: torch.Tensor) -> int:
    """The one that counts tokens."""
    return x.dim() - 2


def replay(module: nn.Module, call: Call, x: torch.Tensor) -> torch.Tensor:
    args, kwargs = list(call.args), dict(call.kwargs)
    if isinstance(call.slot, int):
        args[call.slot] = x.clone()
    else:
        kwargs[call.slot] = x.clone()
    output = module(*args, **kwargs)
    _, y = _sequence(dict(enumerate(output if isinstance(output, tuple) else (output,))), x.shape[token_axis(x)])
    assert y is not None  # it gave one before
    return y


def parts_of(layer: nn.Module, call: Call, x: torch.Tensor) -> dict[str, Call]:
    """What reaches the parts of which the layer's own code is made when it is given `x`: the outermost modules inside."""
    inside = {name: m for name, m in layer.named_modules() if name}
    calls = record_calls(inside, lambda: replay(layer, call, x), x.shape[token_axis(x)])
    return {name: c for name, c in calls.items() if not any(name.startswith(f"{other}.") for other in calls)}


def kind_of_layer(layer: nn.Module) -> tuple:
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


def embedding_of(model: Any) -> nn.Module | None:
    with contextlib.suppress(NotImplementedError, AttributeError):
        found = (model.get_decoder() if takes(model, "decoder_input_ids") else model).get_input_embeddings()
        if isinstance(found, nn.Module):
            return found
    words = model.config.get_text_config().vocab_size
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings >= words)
    return next(tables, None)
