"""A small model with a causal mixture, for the tests of mixtures and of their experts."""

import torch

from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.model.modeling_steel import SteelForCausalLM

SLOTS = ("prefix", "lagged")
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "n_experts": 3, "slots_per_expert": 2, "mlp_div_ratio": 2, "initializer_range": 0.1,
    "FFN_type": "softmoe_causal", "segment_length": 5,
}  # fmt: skip


def tiny(slots="prefix", **changes) -> SteelForCausalLM:
    torch.manual_seed(0)
    return SteelForCausalLM(SteelConfig(**(SIZES | {"causal_slots": slots} | changes))).eval()
