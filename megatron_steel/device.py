"""What this rank's device is and holds: which sharding fits, which kernels run, which micro-batch would have fitted, its
peak speed.

Estimates from a plan, before and while it trains. Builds nothing and knows nothing of data.
"""

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_steel import dist
from megatron_steel.preflight import RunPlan
from megatron_steel.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from megatron_steel.model.kernels import Choice


def sharding(recipe: Recipe, plan: RunPlan, device: "torch.device") -> str:
    """`deepspeed.config`, with `auto` resolved by the memory of this rank's device."""
    if recipe.deepspeed.config != "auto":
        return recipe.deepspeed.config
    chosen = smallest_sharding(recipe, plan.config, plan.parameters, device_bytes(device), dist.world_size())
    dist.log.info("deepspeed.config: auto takes %s", chosen)
    return chosen


def smallest_sharding(
    recipe: Recipe, config: "PretrainedConfig", parameters: int, device_bytes: int, world_size: int
) -> str:
    """The file of `ds_configs/` with the lowest stage that trains the recipe's micro-batch in so much memory a rank."""
    from megatron_steel.model.memory import activation_bytes_per_sample, head_bytes
    from megatron_steel.train.engine import smallest_stage_that_fits

    length, train = recipe.data.sequence_length, recipe.train
    per_sample = activation_bytes_per_sample(config, length, train.precision, train.activation_checkpointing)
    head = head_bytes(config, train.micro_batch_size * length, train.precision)
    return smallest_stage_that_fits(parameters, per_sample * train.micro_batch_size + head, device_bytes, world_size)


def kernels(recipe: Recipe, plan: RunPlan, device: "torch.device") -> "Choice":
    """The recipe's `kernels` on this rank's device. Raises SteelError where one asked for by name cannot run."""
    import torch

    from megatron_steel.model.build import construct
    from megatron_steel.model.kernels import choose

    with torch.device("meta"):
        model = construct(plan.config, torch.float32)
    return choose(recipe.kernels, model, device, recipe.train.precision, recipe.data.document_mask)


def device_bytes(device: "torch.device") -> int:
    """Memory this rank may use: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // dist.ranks_on_node()


def out_of_memory(recipe: Recipe, plan: RunPlan, device: "torch.device") -> Callable[[], str]:
    """A remedy that names the micro-batch that would fit; asked for only when memory has run out."""
    from megatron_steel.model.memory import largest_micro_batch

    if device.type != "cuda":
        return lambda: "set a smaller train.micro_batch_size, or train.activation_checkpointing=true"
    import torch

    # A tenth stays with the CUDA context, fragments and the buffers of the backward pass.
    free = int(0.9 * torch.cuda.get_device_properties(device).total_memory) - torch.cuda.memory_allocated(device)

    def remedy() -> str:
        tried, batches = recipe.train.micro_batch_size, [s.global_batch_size for s in recipe.train.batch_ramp]
        batch = math.gcd(recipe.train.global_batch_size, *batches) // dist.world_size()
        cuts = [m for m in range(1, tried) if batch % m == 0]  # smaller than what has just failed, and it divides
        for checkpointing in sorted({recipe.train.activation_checkpointing, True}):
            fits = largest_micro_batch(
                plan.config, recipe.data.sequence_length, free, recipe.train.precision, checkpointing
            )
            small_enough = [m for m in cuts if m <= fits]
            if small_enough:
                also = (
                    ""
                    if checkpointing == recipe.train.activation_checkpointing
                    else " with train.activation_checkpointing=true"
                )
                return f"train.micro_batch_size={small_enough[-1]} would fit{also} (an estimate)"
        return "not even one sample fits: use a higher ZeRO stage, more ranks or a shorter data.sequence_length"

    return remedy


def peak_flops_of(device: "torch.device") -> float | None:
    """Nominal bf16 FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    import torch

    from megatron_steel.model.flops import peak_flops

    return peak_flops(torch.cuda.get_device_name(device))
