"""Does every FFN do anything, and does it learn? Per decoder layer, at the logging steps alone.

- `ffn_share/layer_NN`: RMS of the FFN's output over that of the residual stream that leaves the layer.
- `expert_gradient/layer_NN`: RMS of the gradient of the experts' weights (of the whole FFN where there are none), as it is
  before clipping: the mean over all tokens of the step.

1. `watching` lays forward hooks over the layers for one forward pass; what activation checkpointing computes again is not counted.
   Layers that are compiled let nobody in: their plain form passes once more beside them.
2. `read_gradients` adds up the squares of this rank's part of the gradients; no gradient is gathered.
3. `take` adds all up over the ranks in one call.

Knows nothing of losses and of where the figures go.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_steel import dist
from megatron_steel.model import parts, regions

if TYPE_CHECKING:
    import torch
    from torch import nn

_FFN, _STREAM = 0, 1  # rows of squares and counts; the gradients' squares stand in a third
_GRADIENT = 2


class Health:
    """One per run.

    Args:
        model: as DeepSpeed has it (parameters may be cut).
        device: of this rank.
    """

    def __init__(self, model: "nn.Module", device: "torch.device"):
        import torch

        self._layers = [
            (layer, found) for _, layer in parts.decoder_layers(model) if (found := parts.feed_forwards(layer))
        ]
        self._weights = [[p for ffn in found for p in parts.expert_parameters(ffn)] for _, found in self._layers]
        self._sums = torch.zeros(2, 3, len(self._layers), dtype=torch.float64, device=device)
        if not self._layers:
            dist.log.info("no decoder layers with an FFN found: their health is not logged")

    @contextlib.contextmanager
    def watching(self, wanted: bool) -> Iterator[None]:
        """Add the outputs of the forward pass inside, where `wanted`."""
        handles: list[Any] = []
        for i, (layer, found) in enumerate(self._layers if wanted else []):
            if regions.is_compiled(layer):  # a hook inside a graph would stay in it, or never be called
                beside = self._adds_beside(i, found[-1])
                handles.append(layer.register_forward_pre_hook(beside, with_kwargs=True))
                continue
            handles.append(layer.register_forward_hook(self._adds(_STREAM, i)))
            handles.append(found[-1].register_forward_hook(self._adds(_FFN, i)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read_gradients(self) -> None:
        """Add the gradients of the step: after its last backward pass, before `engine.step`."""
        for i, weights in enumerate(self._weights):
            for p in weights:
                gradient, ranks = _gradient_here(p)
                if gradient is not None:
                    self._sums[0, _GRADIENT, i] += parts.square_sum(gradient) / ranks
            self._sums[1, _GRADIENT, i] = sum(getattr(p, "ds_numel", p.numel()) for p in weights) / dist.world_size()

    def take(self) -> dict[str, list[float]]:
        """`ffn_share` and `expert_gradient`, a number a layer, and start over. A collective call."""
        import torch

        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        torch.distributed.all_reduce(sums)
        rms = (sums[0] / sums[1]).sqrt().cpu()
        return {"ffn_share": (rms[_FFN] / rms[_STREAM]).tolist(), "expert_gradient": rms[_GRADIENT].tolist()}

    def _adds_beside(self, i: int, ffn: "nn.Module") -> Any:
        """The plain layer once more without gradients, before the compiled one, for the same two figures."""
        import torch

        def add(layer: "nn.Module", args: Any, named: dict[str, Any]) -> None:
            handle = ffn.register_forward_hook(self._adds(_FFN, i))
            devices = [self._sums.device] if self._sums.is_cuda else []
            try:
                with torch.no_grad(), torch.random.fork_rng(devices):  # dropout's dice are the compiled layer's
                    self._adds(_STREAM, i)(layer, args, regions.plain_forward(layer)(*args, **named))
            finally:
                handle.remove()

        return add

    def _adds(self, row: int, i: int) -> Any:
        def add(module: "nn.Module", args: Any, output: Any) -> None:
            x = parts.first_tensor(output)
            if x is None:  # foreign code hands on what nobody can measure: this layer has no share
                return
            self._sums[0, row, i] += parts.square_sum(x)
            self._sums[1, row, i] += x.numel()

        return add


def by_layer(figures: dict[str, list[float]]) -> dict[str, float]:
    """Tags for TensorBoard."""
    return {f"{name}/layer_{i:02d}": value for name, values in figures.items() for i, value in enumerate(values)}


def extremes(figures: dict[str, list[float]]) -> dict[str, float]:
    """The least and the most of all layers that could be measured, for `metrics.jsonl`."""
    found = {}
    for name, values in figures.items():
        known = [value for value in values if not math.isnan(value)]
        if known:
            found[f"{name}_min"], found[f"{name}_max"] = min(known), max(known)
    return found


def _gradient_here(p: "torch.nn.Parameter") -> "tuple[torch.Tensor | None, int]":
    """The part of a reduced gradient that this rank holds, and how many ranks hold the same."""
    if hasattr(p, "ds_id"):  # ZeRO-3: an even cut, filled up with zeros
        from deepspeed.utils import safe_get_local_grad

        return (safe_get_local_grad(p) if p.requires_grad else None), 1
    if hasattr(p, "_hp_mapping"):  # ZeRO-1 and 2: DeepSpeed's public call would gather every parameter of every rank
        mine = p._hp_mapping
        return (None if mine is None else mine.get_lp_grad_fragment(p._index_in_param_group)), 1
    return p.grad, dist.world_size()
