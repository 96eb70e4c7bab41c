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
    "sub_group_size": 1e9,
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
    """Buckets of the gradient reduction, and copies that live only while Adam steps."""
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
        precision: `bf16`, `fp16` or `fp32`.
        largest: most elements that one module holds itself: ZeRO-3 gathers them whatever its limits, and stage 2 reduces
            them by themselves where they are more than a bucket.

    Raises ValueError for offload at stages 1 and 2.
    """
    stage, p = int(zero.get("stage", 0)), sum(sizes)
    share, low = -(-p // ranks), 4 if precision == "fp32" else 2
    offload = zero.get("offload_optimizer", {}).get("device", "none") not in ("none", None)
    if stage == 0:
        return _replicated(p, low)
    if offload and stage < 3:
        raise ValueError(f"what stage {stage} holds with offload_optimizer was never compared with the engine")
    adam = (8 if precision == "fp32" else 12) * share
    bucket = _bucket_bytes(stage, zero, low)
    if stage == 1:
        # fp32 sums of all parameters, beside which the gradients of one micro-batch live or, at the end, the buckets.
        return RankStates(low * p, (4 + low) * p, adam, max(0, bucket - low * p))
    if stage == 2:
        # A tensor larger than a bucket is reduced by itself: its gradient, and that once more laid out flat.
        alone = largest if largest > int(zero.get("reduce_bucket_size", _DEFAULTS["reduce_bucket_size"])) else 0
        return RankStates(low * p, 4 * share, adam, bucket + 2 * low * alone)
    gathered = low * _gathered(sizes, zero, largest) if ranks > 1 else 0  # one rank's share is the whole
    if offload:  # in the host's memory beside Adam's: the fp32 sums, and their copy that Adam reads
        return RankStates(low * share + gathered, 0, 0, bucket, adam + 8 * share)
    # When Adam begins nothing is gathered any more, but its gradients exist once more in fp32, a sub-group at a time.
    copy = 4 * min(share, int(zero.get("sub_group_size", _DEFAULTS["sub_group_size"])))
    return RankStates(low * share + gathered, 4 * share, adam, bucket + max(0, copy - gathered))


def _replicated(p: int, low: int) -> RankStates:
    """Stage 0 in bf16: weights and gradients in bf16, fp32 weights, moments and Adam's fp32 gradients. In fp32: plain."""
    if low == 4:
        return RankStates(4 * p, 4 * p, 8 * p, 0)
    return RankStates(2 * p, 2 * p + 4 * p, 12 * p, 0)


def _bucket_bytes(stage: int, zero: Mapping[str, Any], low: int) -> int:
    """Contiguous buckets: two where reduction overlaps the backward pass (stages 1 and 2), one in stage 3."""
    if not zero.get("contiguous_gradients", True):
        return 0
    elements = int(zero.get("reduce_bucket_size", _DEFAULTS["reduce_bucket_size"]))
    if stage == 3:
        return low * elements
    # Stage 1 reduces its fp32 sums, stage 2 the gradients of each micro-batch.
    return (2 if zero.get("overlap_comm") else 1) * (4 if stage == 1 else low) * elements


def _gathered(sizes: Sequence[int], zero: Mapping[str, Any], largest: int) -> int:
    """Elements of whole parameters that ZeRO-3 holds at one time."""

    def limit(key: str) -> int:
        return int(zero.get(key, _DEFAULTS[key]))

    threshold = limit("stage3_param_persistence_threshold")
    small = sum(size for size in sizes if size <= threshold)
    others = sum(sizes) - small
    return small + min(others, max(largest, limit("stage3_max_live_parameters")))


def deepspeed_estimate(
    parameters: int,
    largest_layer: int,
    stage: int,
    gpus_per_node: int,
    nodes: int = 1,
    offload_optimizer: bool = False,
    offload_param: bool = False,
) -> DeepSpeedEstimate:
    """What DeepSpeed 0.19 says of ZeRO-2 and ZeRO-3, with its default `zero_init` and buffer factor.

    Formulas of `estimate_zero2_model_states_mem_needs` (runtime/zero/stage_1_and_2.py) and
    `estimate_zero3_model_states_mem_needs` (runtime/zero/stage3.py). It has no estimator for stages 0 and 1.

    Args:
        largest_layer: most elements that one module holds itself.
    """
    p, ranks = parameters, gpus_per_node * nodes
    if stage == 2:
        if offload_optimizer:
            return DeepSpeedEstimate(2 * p, int(p * max(4 * ranks, 16) * _BUFFER_FACTOR))
        return DeepSpeedEstimate(2 * p + int(18 * p / ranks), int(p * 4 * gpus_per_node * _BUFFER_FACTOR))
    if stage != 3:
        raise ValueError(f"DeepSpeed estimates stages 2 and 3, not {stage}")
    layer, per_node = 4 * largest_layer, 1 / nodes
    if not offload_optimizer:
        return DeepSpeedEstimate(layer + int(18 * p / ranks), int(largest_layer * 4 * gpus_per_node * _BUFFER_FACTOR))
    if offload_param:
        return DeepSpeedEstimate(layer, int(p * 18 * per_node * _BUFFER_FACTOR))
    return DeepSpeedEstimate(layer + int(2 * p / ranks), int(p * 16 * per_node * _BUFFER_FACTOR))
