"""Seconds of one optimizer step: a sum of physical terms with seven fitted coefficients.

For a micro-batch of m tokens on a GPU of peak F and memory bandwidth B (`Work` counts operations and bytes):

    gemm       c_gemm   x m (layers' and head's matrix work) / F      c: one for Ampere, one for Hopper
    attention  c_attn   x m (causal attention) / F                    likewise
    traffic    c_bytes  x m (activations kept) / B                    norms, activations, residuals, rotary
    logits     c_logits x m (vocabulary) / B                          loss and its gradient, bytes a logit
    weights    16 P / B                                               read twice, gradient written and added up
    nodes      c_nodes  x log2(nodes) x m (matrix work) / F           stragglers, growth of collectives

and once a step Adam's 36 bytes a parameter over B. With activation checkpointing the layers are computed once more (4/3).
Communication (`traffic`) hides behind computation up to its length; what is longer is added. The coefficients are
those of `calibrate.fit` on the rows of `published.yaml` that are not held out; a test fits them again. 1 / c_gemm is the
share of peak that matrix products reach. Knows nothing of recipes.
"""

import math
from dataclasses import dataclass

from megatron_steel.planner import traffic
from megatron_steel.planner.hardware import Cluster
from megatron_steel.planner.work import Work

# name -> coefficient, in the order of `terms`.
COEFFICIENTS = {
    "gemm_ampere": 1.465,
    "gemm_hopper": 1.87,
    "attention_ampere": 3.717,
    "attention_hopper": 6.457,
    "traffic": 2.756,
    "logits": 56.27,
    "nodes": 0.03435,
}
_WEIGHT_BYTES = 16  # a micro-batch: bf16 weight forward and backward, gradient written, read, added to its fp32 sum
_ADAM_BYTES = 36  # fp32 weight and two moments read and written, gradient read, bf16 weight written
# Assumed for offload, measured by nobody here: PCIe 4 one way, and the memory bandwidth of one host.
_PCIE, _HOST_BANDWIDTH = 32e9, 200e9


@dataclass(frozen=True)
class Setting:
    """How a step is cut and sharded."""

    scheme: traffic.Scheme
    micro_batch: int
    micro_batches: int
    """Of a rank in one optimizer step."""
    checkpointing: bool = False
    offload: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    communication: float
    """At nominal speed; `exposed` is the part that computation does not hide."""
    exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.optimizer


def terms(work: Work, setting: Setting, cluster: Cluster) -> dict[str, float]:
    """Seconds per micro-batch of every fitted term, before its coefficient."""
    tokens = setting.micro_batch * work.sequence_length
    again = 4 / 3 if setting.checkpointing else 1.0
    gpu = cluster.gpu
    gemm = tokens * (work.gemm * again + work.head) / gpu.peak
    attention = tokens * work.attention * again / gpu.peak
    hopper = gpu.generation == "hopper"
    return {
        "gemm_ampere": 0.0 if hopper else gemm,
        "gemm_hopper": gemm if hopper else 0.0,
        "attention_ampere": 0.0 if hopper else attention,
        "attention_hopper": attention if hopper else 0.0,
        "traffic": tokens * work.kept_bytes * again / gpu.bandwidth,
        "logits": tokens * work.vocab_size / gpu.bandwidth,
        "nodes": math.log2(cluster.nodes) * gemm,
    }


def fixed(work: Work, setting: Setting, cluster: Cluster) -> tuple[float, float]:
    """Seconds that no coefficient scales: of a micro-batch (weights), of a step (optimizer)."""
    p = work.parameters
    share = p / cluster.ranks if setting.scheme != 0 else p
    adam = _ADAM_BYTES * share / cluster.gpu.bandwidth
    if setting.offload:
        adam = 6 * share / _PCIE + _ADAM_BYTES * p / cluster.nodes / _HOST_BANDWIDTH
    return _WEIGHT_BYTES * p / cluster.gpu.bandwidth, adam


def step_time(work: Work, setting: Setting, cluster: Cluster, coefficients: dict[str, float] | None = None) -> StepTime:
    """Predicted seconds of one optimizer step."""
    c = COEFFICIENTS if coefficients is None else coefficients
    weights, adam = fixed(work, setting, cluster)
    micro = weights + sum(c[name] * value for name, value in terms(work, setting, cluster).items())
    sent = traffic.traffic(work.parameters, setting.scheme, cluster.ranks)
    compute = setting.micro_batches * micro
    each = traffic.seconds(sent.each_micro_batch, cluster)
    once = traffic.seconds(sent.once_a_step, cluster)
    # Gradients of the last backward pass leave while it runs (two thirds of a micro-batch); what follows is in the way.
    exposed = setting.micro_batches * max(0.0, each - micro) + max(0.0, once - 2 / 3 * micro)
    return StepTime(compute, setting.micro_batches * each + once, exposed, adam)


def tokens_per_second(work: Work, setting: Setting, cluster: Cluster, **coefficients: dict[str, float]) -> float:
    """Over all ranks."""
    tokens = setting.micro_batch * setting.micro_batches * work.sequence_length * cluster.ranks
    return tokens / step_time(work, setting, cluster, **coefficients).total
