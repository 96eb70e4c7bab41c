"""What becomes of a recipe on more and more nodes, the micro-batch kept: the table of docs/scale.md.

Weak scaling with one micro-batch a step, the worst case for communication: the global batch grows with the ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_steel.model.states import rank_states
from megatron_steel.planner import speed, traffic
from megatron_steel.planner.hardware import Cluster
from megatron_steel.planner.settings import zero_section
from megatron_steel.planner.work import Work

SCHEMES: dict[traffic.Scheme, str] = {1: "ZeRO-1", 3: "ZeRO-3", "zero++": "ZeRO++"}
_NODES = (1, 8, 64, 1000)


@dataclass(frozen=True)
class Row:
    """One scheme on one number of nodes."""

    nodes: int
    ranks: int
    scheme: str
    state_bytes: int
    """Of one rank."""
    sent_bytes: float
    """By one rank in a step; with ZeRO++ what crosses between nodes."""
    communication: float
    """Seconds of that at nominal speed."""
    compute: float
    """Seconds of a micro-batch."""
    step: float
    """Seconds of a step, with what computation does not hide."""
    tokens_per_step: int
    efficiency: float
    """Tokens/s a GPU, as a share of the same scheme's on one node."""


def table(work: Work, cluster: Cluster, micro_batch: int, nodes: Sequence[int] = _NODES) -> list[Row]:
    """Rows for every number of nodes and scheme; `cluster` gives the node and its network."""
    found: list[Row] = []
    for scheme, name in SCHEMES.items():
        first = None
        for count in nodes:
            larger = replace(cluster, nodes=count)
            time = speed.step_time(work, speed.Setting(scheme, micro_batch, 1), larger)
            tokens = micro_batch * work.sequence_length
            rate = tokens / time.total
            first = first or rate
            sent = traffic.traffic(work.parameters, scheme, larger.ranks).of_step(1)
            found.append(Row(count, larger.ranks, name, _states(work, scheme, larger), sent, time.communication,
                             time.compute, time.total, tokens * larger.ranks, rate / first))  # fmt: skip
    return sorted(found, key=lambda row: row.nodes)


def as_markdown(rows: Sequence[Row]) -> str:
    lines = ["| nodes | GPUs | | states of a rank, GB | sent by a rank, GB a step | at nominal speed, ms | computation, ms "
             "| step, ms | efficiency | tokens a step |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        lines.append(f"| {r.nodes:,} | {r.ranks:,} | {r.scheme} | {r.state_bytes / 1e9:.2f} | {r.sent_bytes / 1e9:.2f} | "
                     f"{r.communication * 1e3:.0f} | {r.compute * 1e3:.0f} | {r.step * 1e3:.0f} | {r.efficiency:.0%} | "
                     f"{r.tokens_per_step / 1e6:.1f}M |")  # fmt: skip
    return "\n".join(lines)


def hop_budget(work: Work, cluster: Cluster, micro_batch: int, gathers_a_layer: int = 3) -> float:
    """Seconds that one hop of a ring may take so that ZeRO-3's collectives still hide behind the layers' computation.

    A ring collective over N ranks has N - 1 hops one after another, whatever it carries; ZeRO-3 starts about three a
    layer (gather, gather, reduce) in the time of a micro-batch.
    """
    compute = speed.step_time(work, speed.Setting(3, micro_batch, 1), cluster).compute
    return compute / (gathers_a_layer * work.layers * (cluster.ranks - 1))


def _states(work: Work, scheme: traffic.Scheme, cluster: Cluster) -> int:
    zero: dict[str, Any] = zero_section("zero1.json" if scheme == 1 else "zero3.json")
    states = rank_states(work.sizes, zero, cluster.ranks, "bf16", work.largest_layer).device
    # hpZ keeps a second bf16 copy, cut over the GPUs of a node (ZeRO++, arXiv 2306.10209, section 3.2).
    return states + (2 * work.parameters // cluster.gpus_per_node if scheme == "zero++" else 0)
