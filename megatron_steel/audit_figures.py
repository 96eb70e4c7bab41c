"""What an audit measures beside causality: losses, decoding, padding, and whether each FFN does anything.

1. `losses`: the loss of one pass over whole sequences (teacher-forced) beside that of passes which saw only the prefix
   of the token they predict (prefix-only). Equal when causal; else only the second is a language-model loss.
2. `decoding`: one full pass against decoding token by token, as `generate` does it.
3. `padding`: a left-padded row against the same row alone.
4. `health`: what the FFN adds to the residual stream, and the gradients of FFN and attention, per layer.

Knows nothing of files.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_steel.audit_replay import forward, logits_of, takes
from megatron_steel.model import parts

_LENGTH, _PADDED = 23, 5


@torch.no_grad()
def losses(model: Any, ids_BT: torch.Tensor, positions: int = 12, seed: int = 0) -> dict[str, Any]:
    """Mean loss in nats per token of int64 sequences [B, T], teacher-forced and prefix-only.

    Prefix-only costs a pass per position, so it is taken at `positions` places, spread evenly over [1, T - 1] from a
    random start; the teacher-forced loss at the same places stands beside it.
    """
    B, T = ids_BT.shape
    forced_BT = torch.cat([_token_losses(forward(model, row[None])[:, :-1], row[None, 1:]) for row in ids_BT])
    generator = torch.Generator().manual_seed(seed)
    count = min(positions, T - 1)
    start = float(torch.rand(1, generator=generator))
    places = [int((i + start) * (T - 1) / count) for i in range(count)]
    honest = torch.stack(
        [_token_losses(forward(model, ids_BT[:, : t + 1])[:, -1:], ids_BT[:, t + 1 : t + 2])[:, 0] for t in places],
        dim=1,
    )
    same = forced_BT[:, places]
    gap = (honest - same).flatten()
    return {
        "sequences": B,
        "length": T,
        "ln_vocabulary": math.log(_words(model)),
        "teacher_forced": float(forced_BT.mean()),
        "positions": gap.numel(),
        "teacher_forced_at_positions": float(same.mean()),
        "prefix_only": float(honest.mean()),
        "gap": float(gap.mean()),
        "gap_standard_error": float(gap.std() / gap.numel() ** 0.5) if gap.numel() > 1 else None,
    }


@torch.no_grad()
def decoding(model: Any, seed: int = 0) -> dict[str, Any]:
    """Largest difference of logits between a full pass and decoding token by token, over the RMS of the logits.

    `mode` is `cached`, or `recomputed` where the model gives no cache: every token then takes a pass over its prefix.
    """
    ids_BT = _random(model, 2, _LENGTH, seed)
    full = forward(model, ids_BT)
    names = [name for name in ("past_key_values", "cache") if takes(model, name)]  # `cache` since transformers 5.24
    decoded = _cached(model, ids_BT, names[0]) if names and takes(model, "use_cache") else None
    mode = "recomputed" if decoded is None else "cached"
    if decoded is None:
        decoded = torch.stack([forward(model, ids_BT[:, : t + 1])[:, -1] for t in range(_LENGTH)], dim=1)
    return {"mode": mode, "difference": _apart(full, decoded)}


@torch.no_grad()
def padding(model: Any, seed: int = 0) -> float | None:
    """Largest difference of logits between a left-padded row of a batch and the row alone, over the RMS of the logits.

    None where the model takes no attention mask.
    """
    if not takes(model, "attention_mask"):
        return None
    ids_BT = _random(model, 2, _LENGTH, seed)
    mask = torch.ones_like(ids_BT)
    mask[1, :_PADDED] = 0
    inputs = {"attention_mask": mask}
    if takes(model, "position_ids"):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    batch = forward(model, ids_BT, **inputs)
    return _apart(forward(model, ids_BT[1:, _PADDED:]), batch[1:, _PADDED:])


def health(model: Any, ids_BT: torch.Tensor) -> list[dict[str, float | None]]:
    """Per layer: RMS of the FFN's output over that of the layer's (`ffn_share`), and gradient RMS of the next-token loss
    by the weights of FFN and attention. One backward pass; each gradient is dropped as soon as it is measured."""
    layers = [layer for _, layer in parts.decoder_layers(model)]
    sizes: dict[str, float] = {}
    squares: dict[str, list[float]] = {}
    handles: list[Any] = []
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for i, layer in enumerate(layers):
        handles += _watch(i, layer, sizes, squares)
    try:
        with torch.enable_grad():
            model.requires_grad_(True)
            logits = forward(model, ids_BT)
            F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
    finally:
        for handle in handles:
            handle.remove()
        for p in model.parameters():
            p.grad = None
        for p in frozen:
            p.requires_grad_(False)
    return [
        {"ffn_share": _share(sizes, i), "ffn_gradient": _mean(squares, f"{i}.ffn"), "attention_gradient": _mean(squares, f"{i}.attention")}
        for i in range(len(layers))
    ]  # fmt: skip


def _watch(i: int, layer: nn.Module, sizes: dict[str, float], squares: dict[str, list[float]]) -> list[Any]:
    def add(key: str) -> Any:
        def measure(p: torch.Tensor) -> None:
            if p.grad is not None:
                total = squares.setdefault(key, [0.0, 0.0])
                total[0] += float(parts.square_sum(p.grad))
                total[1] += p.numel()
                p.grad = None

        return measure

    def size(key: str) -> Any:
        def measure(module: nn.Module, args: Any, output: Any) -> None:
            x = parts.first_tensor(output)
            if x is not None:
                sizes[key] = parts.rms(x)

        return measure

    handles = [layer.register_forward_hook(size(f"{i}.layer"))]
    ffns = parts.feed_forwards(layer)
    for kind, found in (("ffn", ffns), ("attention", parts.attentions(layer))):
        weights = {id(p): p for part in found for p in part.parameters()}
        handles += [p.register_post_accumulate_grad_hook(add(f"{i}.{kind}")) for p in weights.values()]
    if ffns and not isinstance(ffns[-1], (nn.ModuleList, nn.ModuleDict)):
        handles.append(ffns[-1].register_forward_hook(size(f"{i}.ffn")))
    return handles


def _share(sizes: dict[str, float], i: int) -> float | None:
    if f"{i}.ffn" not in sizes:
        return None
    return sizes[f"{i}.ffn"] / sizes[f"{i}.layer"] if sizes[f"{i}.layer"] else math.nan


def _mean(squares: dict[str, list[float]], key: str) -> float | None:
    return (squares[key][0] / squares[key][1]) ** 0.5 if key in squares else None


def _cached(model: Any, ids_BT: torch.Tensor, name: str) -> torch.Tensor | None:
    """Logits of feeding one token at a time with the cache that the model hands back; None: it keeps none."""
    from transformers import DynamicCache

    past: Any = None
    parts = []
    for t in range(ids_BT.shape[1]):
        output = model(input_ids=ids_BT[:, t : t + 1], use_cache=True, **{name: past})
        past = getattr(output, name, None)
        if past is None or (isinstance(past, DynamicCache) and past.get_seq_length() == 0):
            return None
        parts.append(logits_of(output))
    return torch.cat(parts, dim=1)


def _token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BTV.float().transpose(1, 2), labels_BT, reduction="none")


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) / (parts.rms(a) or 1.0)


def _random(model: Any, rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, _words(model), (rows, length), generator=torch.Generator().manual_seed(seed))


def _words(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
