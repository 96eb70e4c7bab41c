"""Does a setting fit the device: states, activations and head of one rank against the GPU's memory.

The states are `model.states`, the activations `model.memory`, the same formulas that `deepspeed.config: auto` and the
remedy of an out-of-memory error use. Knows nothing of time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_steel.model.memory import activation_bytes_per_sample, head_bytes
from megatron_steel.model.states import DeepSpeedEstimate, RankStates, deepspeed_estimate, rank_states
from megatron_steel.planner.hardware import Cluster
from megatron_steel.planner.work import Work

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What stays with the CUDA context, fragments and workspaces: the tenth that the engine's own choice leaves free.
USABLE = 0.9


@dataclass(frozen=True)
class Model:
    """What memory depends on."""

    config: "PretrainedConfig"
    work: Work
    precision: str
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    states: RankStates
    activations: int
    head: int
    deepspeed: DeepSpeedEstimate | None
    """DeepSpeed's own estimate of the states; it has none for stages 0 and 1."""

    @property
    def device(self) -> int:
        return self.states.device + self.activations + self.head


def memory(model: Model, zero: Mapping[str, Any], cluster: Cluster, micro_batch: int, checkpointing: bool) -> Memory:
    """Bytes that one rank needs."""
    tokens = micro_batch * model.work.sequence_length
    return Memory(
        states=states(model, zero, cluster),
        activations=micro_batch * _per_sample(model, checkpointing),
        head=head_bytes(model.config, tokens, model.precision) + _head_gradients(model, tokens),
        deepspeed=_deepspeed(model, zero, cluster),
    )


def states(model: Model, zero: Mapping[str, Any], cluster: Cluster) -> RankStates:
    return rank_states(model.work.sizes, zero, cluster.ranks, model.precision, model.work.largest_layer)


def largest_micro_batch(model: Model, zero: Mapping[str, Any], cluster: Cluster, checkpointing: bool, most: int) -> int:
    """The most samples, up to `most`, that fit; 0 where not even one does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(memory(model, zero, cluster, middle, checkpointing), cluster):
            low = middle
        else:
            high = middle - 1
    return low


def fits(need: Memory, cluster: Cluster) -> bool:
    return need.device <= USABLE * cluster.gpu.memory_bytes


def _per_sample(model: Model, checkpointing: bool) -> int:
    return activation_bytes_per_sample(model.config, model.work.sequence_length, model.precision, checkpointing)


def _head_gradients(model: Model, tokens: int) -> int:
    """Gradients of the hidden states and of the head's weight, finished in the forward pass (`model.head`)."""
    size = 4 if model.precision == "fp32" else 2
    hidden = model.config.get_text_config().hidden_size
    return size * hidden * (model.work.vocab_size + tokens)


def _deepspeed(model: Model, zero: Mapping[str, Any], cluster: Cluster) -> DeepSpeedEstimate | None:
    stage = int(zero.get("stage", 0))
    if stage < 2:
        return None
    offloads = [zero.get(key, {}).get("device", "none") not in ("none", None)
                for key in ("offload_optimizer", "offload_param")]  # fmt: skip
    return deepspeed_estimate(
        model.work.parameters, model.work.largest_layer, stage, cluster.gpus_per_node, cluster.nodes, *offloads
    )
