"""The settings that a recipe could run with on a cluster, the fastest that fit first, and what would fit where none does.

A setting is a file of `ds_configs/`, activation checkpointing and a micro-batch; the recipe's global batch stays. Stage
0 is left out, as `deepspeed.config: auto` does: it adds gradients up in bf16; an optimizer that takes no other stage gets it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_steel.planner import fits, speed
from megatron_steel.planner.hardware import Cluster
from megatron_steel.train.engine import config_path
from megatron_steel.train.optimizer import HIGHEST_STAGE

FILES = ("zero1.json", "zero2.json", "zero3.json", "zero3_offload.json")
_GPUS_OF_A_NODE = 8  # beyond, the next smallest change is another node
_FEWER_BYTES_FIRST = {"zero0.json": 0, "zero1.json": 0, "zero2.json": 1, "zero3.json": 2, "zero3_offload.json": 3}


@dataclass(frozen=True)
class Candidate:
    """One setting, what it needs and how fast it is."""

    file: str
    checkpointing: bool
    micro_batch: int
    micro_batches: int
    largest_micro_batch: int
    """That fits; `micro_batch` is the largest of these that cuts the global batch evenly."""
    memory: fits.Memory
    time: speed.StepTime
    tokens_per_second: float
    """Over all ranks."""

    @property
    def overrides(self) -> str:
        return (f"deepspeed.config={self.file} train.micro_batch_size={self.micro_batch} "
                f"train.activation_checkpointing={str(self.checkpointing).lower()}")  # fmt: skip


def files_for(optimizer: str) -> tuple[str, ...]:
    """Of `ds_configs/`, those that `optim.name` trains with, the least sharded first."""
    if optimizer == "adamw":
        return FILES
    return FILES[: HIGHEST_STAGE[optimizer]] or ("zero0.json",)


def zero_section(file: str) -> dict[str, Any]:
    """The sharding of a DeepSpeed file, by path or shipped name."""
    tree = json.loads(config_path(file).read_text(encoding="utf-8"))
    return {"stage": 0, **tree.get("zero_optimization", {})}


def evaluate(
    model: fits.Model, file: str, cluster: Cluster, checkpointing: bool, micro_batch: int, global_batch: int,
    largest: int | None = None,
) -> Candidate:  # fmt: skip
    """Memory and time of one setting, whether it fits or not. The global batch must be whole micro-batches."""
    zero = zero_section(file)
    offload = "offload_optimizer" in zero
    count = global_batch // (micro_batch * cluster.ranks)
    setting = speed.Setting(int(zero["stage"]), micro_batch, count, checkpointing, offload)  # type: ignore[arg-type]
    if largest is None:
        largest = fits.largest_micro_batch(model, zero, cluster, checkpointing, global_batch)
    time = speed.step_time(model.work, setting, cluster)
    tokens = global_batch * model.work.sequence_length
    need = fits.memory(model, zero, cluster, micro_batch, checkpointing)
    return Candidate(file, checkpointing, micro_batch, count, largest, need, time, tokens / time.total)


def ranked(model: fits.Model, cluster: Cluster, global_batch: int, may_checkpoint: bool = True) -> list[Candidate]:
    """Every file with and without checkpointing at its best micro-batch that fits, the fastest first.

    Among settings within a hundredth of the fastest the one that shards least comes first: it communicates least and
    its checkpoints are simplest. Offload comes after all others, since its speed is assumed and not fitted. Empty where
    nothing fits.
    """
    found = []
    cuts = divisors(global_batch, cluster.ranks)
    for file in files_for(model.optimizer):
        for checkpointing in (False, True) if may_checkpoint else (False,):
            zero = zero_section(file)
            largest = fits.largest_micro_batch(model, zero, cluster, checkpointing, global_batch // cluster.ranks)
            useful = [m for m in cuts if m <= largest]
            if useful:
                found.append(_fastest(model, file, cluster, checkpointing, useful, global_batch, largest))
    if not found:
        return []
    best = max(c.tokens_per_second for c in found)

    def order(c: Candidate) -> tuple[bool, bool, float, int]:
        near = c.tokens_per_second >= 0.99 * best
        least = _FEWER_BYTES_FIRST[c.file] + 10 * c.checkpointing
        return "offload" in c.file, not near, 0.0 if near else -c.tokens_per_second, least

    return sorted(found, key=order)


def divisors(global_batch: int, ranks: int) -> list[int]:
    """Micro-batches that cut the global batch evenly over the ranks, ascending."""
    if global_batch % ranks:
        return []
    share = global_batch // ranks
    small = [m for m in range(1, math.isqrt(share) + 1) if share % m == 0]
    return sorted({*small, *(share // m for m in small)})


def why(candidate: Candidate, others: list[Candidate], cluster: Cluster) -> str:
    """One sentence: what makes it the best."""
    reasons = [f"{candidate.micro_batch} samples a pass fit" + (" with" if candidate.checkpointing else " without")
               + " recomputing activations"]  # fmt: skip
    if cluster.ranks == 1:
        reasons.append("there is nothing to communicate")
    elif candidate.time.exposed < 0.01 * candidate.time.total:
        reasons.append("communication hides")
    else:
        reasons.append(f"communication in the open is {candidate.time.exposed / candidate.time.total:.0%} of the step")
    rest = [c for c in others if c is not candidate]
    offloaded = "offload" in candidate.file
    if like := [c for c in rest if ("offload" in c.file) == offloaded]:
        reasons.append(_beside(candidate, like[0], cluster))
    faster = max((c for c in rest if "offload" in c.file), key=lambda c: c.tokens_per_second, default=None)
    more = faster.tokens_per_second / candidate.tokens_per_second - 1 if faster and not offloaded else 0.0
    if more > 0.05:
        reasons.append(
            f"offload may be {more:.0%} faster, but its speed is assumed: compare both by a dry run (pretrain --dry-run)"
        )
    return "; ".join(reasons)


def _beside(best: Candidate, other: Candidate, cluster: Cluster) -> str:
    slower = 1 - other.tokens_per_second / best.tokens_per_second
    name = f"the next ({other.file}{', checkpointing' if other.checkpointing else ''}) is"
    if slower > 0.001:
        return f"{name} {slower:.1%} slower"
    return f"{name} as fast" + (", and shards more" if cluster.ranks > 1 else "")


@dataclass(frozen=True)
class Change:
    """The smallest change after which a setting fits."""

    what: str
    candidate: Candidate
    cluster: Cluster


def smallest_change(
    model: fits.Model, file: str, cluster: Cluster, checkpointing: bool, micro_batch: int, global_batch: int,
    may_checkpoint: bool = True,
) -> Change | None:  # fmt: skip
    """In this order: a smaller micro-batch; checkpointing too; a higher stage; offload; more GPUs, of one node first (up to
    4,096).

    None where not even that is enough.
    """
    tries = [(c, "train.activation_checkpointing=true" if c and not checkpointing else "")
             for c in dict.fromkeys((checkpointing, checkpointing or may_checkpoint))]  # fmt: skip
    files = files_for(model.optimizer)
    later = files[files.index(file) :] if file in files else files
    for try_file in (file, *(f for f in later if f != file)):
        for try_checkpointing, words in tries:
            change = _try(model, try_file, cluster, try_checkpointing, micro_batch, global_batch)
            if change:
                parts = [f"deepspeed.config={try_file}" if try_file != file else "", words]
                parts.append(
                    f"train.micro_batch_size={change.micro_batch}" if change.micro_batch != micro_batch else ""
                )
                return Change(" ".join(part for part in parts if part) or "nothing", change, cluster)
    return _more_gpus(model, cluster, global_batch, may_checkpoint)


def _try(
    model: fits.Model, file: str, cluster: Cluster, checkpointing: bool, micro_batch: int, global_batch: int
) -> Candidate | None:
    zero: Mapping[str, Any] = zero_section(file)
    largest = fits.largest_micro_batch(model, zero, cluster, checkpointing, micro_batch)
    cuts = [m for m in divisors(global_batch, cluster.ranks) if m <= largest]
    if not cuts:
        return None
    return evaluate(model, file, cluster, checkpointing, cuts[-1], global_batch, largest)


def _more_gpus(model: fits.Model, cluster: Cluster, global_batch: int, may_checkpoint: bool) -> Change | None:
    nodes, per_node = cluster.nodes, cluster.gpus_per_node
    while nodes * per_node < 4096:
        if nodes == 1 and per_node <= _GPUS_OF_A_NODE // 2:
            per_node *= 2
        else:
            nodes *= 2
        link = cluster.node_link if cluster.nodes > 1 else cluster.gpu.link * per_node
        larger = replace(cluster, nodes=nodes, gpus_per_node=per_node, node_link=link)
        found = ranked(model, larger, global_batch, may_checkpoint)
        if found:
            least = min(found, key=lambda c: _FEWER_BYTES_FIRST[c.file])
            where = f" ({nodes} nodes)" if nodes > 1 else ""
            return Change(f"{larger.ranks} GPUs{where} and {least.overrides}", least, larger)
    return None


def _fastest(
    model: fits.Model, file: str, cluster: Cluster, checkpointing: bool, cuts: list[int], global_batch: int, most: int
) -> Candidate:
    tried = [evaluate(model, file, cluster, checkpointing, m, global_batch, most) for m in cuts[-3:]]
    return max(tried, key=lambda c: c.tokens_per_second)
