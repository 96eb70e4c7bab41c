"""Bytes that one rank sends in an optimizer step, by ZeRO stage, and how long they take.

A ring of N ranks sends (N - 1) / N of a tensor for an all-gather or a reduce-scatter and twice that for an all-reduce.
Of P parameters in a step of A micro-batches (arXiv 1910.02054, section 7, with what DeepSpeed does under accumulation):

    stage 0    all-reduce of bf16 gradients once                        2 x 2P
    stage 1    reduction of the fp32 sums once, all-gather of weights   4P + 2P
    stage 2    reduction of bf16 gradients each micro-batch, all-gather 2P A + 2P
    stage 3    gather forward, gather backward, reduction, each time    (2P + 2P + 2P) A
    ZeRO++     int8 forward, backward inside the node, int4 reduction   (1P + 0 + 0.5P) A   between nodes

(ZeRO++: arXiv 2306.10209, section 3; its 3 M becomes 0.75 M of 16-bit values between nodes.) Knows nothing of models.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_steel.planner.hardware import Cluster

Scheme = Literal[0, 1, 2, 3, "zero++"]


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends."""

    each_micro_batch: float
    once_a_step: float

    def of_step(self, micro_batches: int) -> float:
        return micro_batches * self.each_micro_batch + self.once_a_step


def traffic(parameters: int, scheme: Scheme, ranks: int) -> Traffic:
    """Bytes sent by one rank over its slowest link."""
    p = parameters * (ranks - 1) / ranks
    if scheme == "zero++":
        return Traffic(1.5 * p, 0.0)
    return {
        0: Traffic(0.0, 4 * p),
        1: Traffic(0.0, 6 * p),
        2: Traffic(2 * p, 2 * p),
        3: Traffic(6 * p, 0.0),
    }[scheme]


def seconds(sent: float, cluster: Cluster) -> float:
    """Time of `sent` bytes at the slowest link of the ring, nominal speed, no latency."""
    return 0.0 if cluster.ranks == 1 else sent / cluster.slowest_link
