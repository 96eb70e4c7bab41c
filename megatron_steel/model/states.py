"""Bytes of weights, gradients, optimizer and communication buffers on one rank, by ZeRO stage.

Two estimates. `deepspeed_estimate` repeats the arithmetic of DeepSpeed's own estimator to the byte, so that a plan can be
compared with what its users know. `rank_states` is what this project's engine really holds in the worst moment of a step
(a test compares it with the live tensors): bf16 weights, gradients added up in fp32, fp32 master weights, Adam's two
moments, and the buffers that a DeepSpeed file asks for. Pure arithmetic: knows no model, no engine and no device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# DeepSpeed's defaults (runtime/zero/config.py, 0.19) for the keys that take memory.
_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
}
_BUFFER_FACTOR = 1.5  # `additional_buffer_factor` of DeepSpeed's estimator, for memory of the host


@dataclass(frozen=True)
class RankStates:
    """Bytes on the device of one rank in the worst moment, and in the host's memory for it."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 master weights and both moments."""
    buffers: int
    """Buckets of the gradient reduction."""
    host: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class DeepSpeedEstimate:
    """What DeepSpeed's estimator says, in bytes."""

    device: int
    host: int


def rank_states(
    sizes: Sequence[int], zero: Mapping[str, Any], ranks: int, precision: str = "bf16", largest: int = 0
) -> RankStates:
    """What the engine holds on one rank.

    Args:
        sizes: elements of each parameter, a tied one once.
        zero: the section `zero_optimization` of a DeepSpeed file.
        ranks: data-parallel ranks.
        precision: `bf16` or `fp32`.
        largest: elements that ZeRO-3 must gather at one time whatever its limits (the largest module's own).
    """
    stage, p = int(zero.get("stage", 0)), sum(sizes)
    share = -(-p // ranks)
    low = 2 if precision == "bf16" else 4
    if stage == 0:
        return _replicated(p, low)
    offload = zero.get("offload_optimizer", {}).get("device", "none") not in ("none", None)
    master = 4 * share if precision == "bf16" else 0
    optimizer, host = (0, 8 * share + 4 * share) if offload else (master + 8 * share, 0)
    bucket = _bucket_bytes(stage, zero, p, low)
    if stage < 3:
        whole = 4 * p if stage == 1 else 4 * share
        gradients = whole + (low * p if stage == 1 else 0)
        if offload:
            gradients, host = low * share, host + 4 * share
        return RankStates(low * p, gradients, optimizer, bucket, host)
    gathered = _gathered(sizes, zero, largest)
    gradients = 4 * share
    if offload:
        gradients, host = 0, host + 8 * share
    return RankStates(low * (share + gathered), gradients, optimizer, bucket, host)
