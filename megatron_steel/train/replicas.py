"""Do all ranks hold the same weights? Asked at every save, so that a weight that changed on one rank is not saved.

At stage 0 the ranks hold whole copies of weights and moments, and a changed weight or moment stays or spreads into its
rank's weights. At stages 1 and 2 they hold copies of the weights only, which each step renews from sharded masters: what
is found there changed after the last step. At stage 3 there are no copies, so nothing can be compared, and a bit that flips in
a shard is not found at any stage above 0. Knows nothing of saving.
"""

from collections import Counter
from typing import TYPE_CHECKING

from megatron_steel import dist
from megatron_steel.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine


def compare(engine: "DeepSpeedEngine", step: int) -> None:
    """Raise TrainingError, on all ranks, naming the ranks whose weights differ from most and the first such parameter.

    Of two ranks neither has a majority: both are named. Costs one pass over the weights and a few numbers a parameter.
    """
    if dist.world_size() == 1 or engine.zero_optimization_stage() == 3:
        return
    import torch

    names = [name for name, _ in engine.module.named_parameters()]
    sums = dist.gather(torch.stack([_bits(p) for p in engine.module.parameters()]).tolist())
    for number, name in enumerate(names):
        (most, holders), *others = Counter(rank[number] for rank in sums).most_common()
        if others:
            clear = 2 * holders > dist.world_size()
            odd = [str(r) for r, rank in enumerate(sums) if not clear or rank[number] != most]
            where = f"rank {', '.join(odd)}" if clear else f"ranks {', '.join(odd)} among each other"
            raise dist.shared(TrainingError(
                f"the ranks' copies of {name} differ: {where}, at step {step}", "weights of a running job",
                "start again from the newest checkpoint; if it happens twice, take that machine out (memory, GPU)",
            ))  # fmt: skip


def _bits(parameter: "torch.Tensor") -> "torch.Tensor":
    """The sum of a tensor's raw bits as whole numbers (an int64 scalar): one changed bit always changes it."""
    import torch

    raw = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[parameter.element_size()]
    return parameter.detach().view(raw).sum(dtype=torch.int64)
