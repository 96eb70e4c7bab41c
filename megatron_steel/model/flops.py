"""What a model costs: parameters, and floating-point operations per token in both conventions of the field.

- `hw` = 6 x weights that a token is multiplied with + 12 L N d T for attention. No input embedding; an expert of a
  soft mixture with slots counts by slots per sequence, not per token. This is work the hardware does.
- `six_n` = 6 x all parameters + the same attention term (PaLM, llm-foundry). Comparable with published MFU; for
  soft-MoE models it overstates the work about twofold.

6 = 2 operations per weight forward, 4 backward. 12 L N d T (L layers, N heads, d head dimension, T tokens) is attention
without the causal mask; `causal` has half of it. Everything is counted on the meta device: no memory, no weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from megatron_steel.model.build import construct
from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.model.mixture_steel import BLOCK, CHUNK
from megatron_steel.model.text_to_text import is_text_to_text


@dataclass(frozen=True)
class Parameters:
    """Counts of a model; a tied matrix counts once."""

    total: int
    embedding: int
    """Input embedding."""
    tensors: int
    """Distinct parameters (the entries of an untied `state_dict`)."""


@dataclass(frozen=True)
class FlopsPerToken:
    """Training operations (forward and backward) per token."""

    hw: float
    """The matrix work, attention without a causal mask."""
    six_n: float
    """6 x all parameters, attention without a causal mask."""
    causal: float
    """`hw` with causal attention: half of the attention term."""
    head: float
    """The part of `hw` that the language-model head takes."""
    attention: float
    """The part of `hw` that attention takes."""


def parameters(config: PretrainedConfig) -> Parameters:
    """Exact counts for a configuration, in milliseconds to seconds, without memory."""
    model = _on_meta(config)
    embedding: Any = model.get_input_embeddings()
    counted = list(model.parameters())
    return Parameters(sum(p.numel() for p in counted), embedding.weight.numel(), len(counted))


def flops_per_token(config: PretrainedConfig, sequence_length: int) -> FlopsPerToken | None:
    """Training FLOPs per token for sequences of `sequence_length` tokens.

    Returns:
        None for a class with weights outside `nn.Linear` (fused experts, convolutions), and for an encoder-decoder, whose
        work on a label depends on the prompt: a guess would make a share of peak that nobody can trust.
    """
    attention = None if is_text_to_text(config) else _attention(config, sequence_length)
    return None if attention is None else _counted(config, sequence_length, attention, attention / 2)


def flops_per_full_pair(config: PretrainedConfig, sequence_length: int) -> FlopsPerToken | None:
    """The same of an encoder-decoder, for a token of a response of `sequence_length` tokens whose prompt is as long.

    Encoder and cross attention see everything: only the decoder's own attention has a causal mask. Shorter prompts are
    less work.
    """
    of_a_layer = 12.0 * config.num_heads * config.d_kv * sequence_length
    attention = of_a_layer * (config.num_layers + 2 * config.num_decoder_layers)
    return _counted(config, sequence_length, attention, of_a_layer * config.num_decoder_layers / 2)


def _counted(config: PretrainedConfig, sequence_length: int, attention: float, masked: float) -> FlopsPerToken | None:
    """`attention` without a causal mask, and the part of it that the mask leaves out."""
    model = _on_meta(config)
    weights = _multiplied_weights(model, sequence_length)
    if weights is None:
        return None
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    return FlopsPerToken(
        hw=6 * weights + attention,
        six_n=6 * total + attention,
        causal=6 * weights + attention - masked,
        head=6 * head,
        attention=attention,
    )


# Nominal dense bf16 peaks in FLOP/s with fp32 accumulation and no sparsity, from NVIDIA's data sheets (halved where
# a sheet quotes sparsity) and the Ada white paper. The first name that occurs in the device's name counts, so the
# slower variants of a chip come before the chip.
_PEAKS = (
    ("A100", 312e12),
    ("A800", 312e12),  # an A100 with a narrower NVLink
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100", 989.5e12),
    ("H800 PCIe", 756.5e12),
    ("H800", 989.5e12),  # an H100 SXM with a narrower NVLink
    ("H200 NVL", 835.5e12),
    ("H200", 989.5e12),
    ("RTX 4090 D", None),  # cut down for one market: no sheet states its tensor peak
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),  # GA102 white paper
    ("L40S", 362.05e12),
)


def peak_flops(device_name: str) -> float | None:
    """Nominal dense bf16 peak in FLOP/s of a device as `torch.cuda.get_device_name` calls it; None: not known."""
    return next((peak for name, peak in _PEAKS if name.lower() in device_name.lower()), None)


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model = construct(config, torch.float32)
    model.tie_weights()
    return model


def _multiplied_weights(model: PreTrainedModel, sequence_length: int) -> float | None:
    """Weights that one token is multiplied with on average (router work of soft slots included)."""
    config = model.config
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None  # a sparse mixture multiplies a token with some of its experts only
    causal = isinstance(config, SteelConfig) and config.FFN_type == "softmoe_causal"
    slots = causal or (isinstance(config, SteelConfig) and config.sees_future)
    share = _slot_rows_per_token(config, sequence_length) if slots else 1.0
    total, counted = 0.0, set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            counted.add(id(module.weight))
            # A prefix expert's first product is taken of the tokens (and of the chunks' carried means), not of its slots.
            first = causal and config.causal_slots == "prefix" and "gate_down" not in name and "down_proj" not in name
            rows = 1 + _slots(config) / min(CHUNK, sequence_length) if first else share
            total += module.weight.numel() * (rows if slots and ".experts." in name else 1.0)
        elif isinstance(module, nn.Embedding):
            counted.add(id(module.weight))
    if slots:
        total += config.num_hidden_layers * _slot_products_per_token(config, sequence_length)
        counted |= {id(p) for name, p in model.named_parameters() if name.endswith((".phi", ".score", ".first_slots"))}
    outside = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in counted]
    return None if outside else total


def _slots(config: PretrainedConfig) -> int:
    return config.n_experts * config.slots_per_expert


def _segments(config: PretrainedConfig, tokens: int) -> int:
    """Segments that a block of `tokens` makes room for (see SteelLaggedMixture)."""
    return 1 + min(tokens, tokens // config.segment_length + 1)


def _slot_rows_per_token(config: PretrainedConfig, sequence_length: int) -> float:
    """Vectors that an expert maps for each token: p for each sequence (published), segment or token."""
    if config.FFN_type != "softmoe_causal":
        return config.slots_per_expert / sequence_length
    if config.causal_slots == "prefix":
        return config.slots_per_expert
    block = min(BLOCK, sequence_length)
    return config.slots_per_expert * _segments(config, block) / block


def _slot_products_per_token(config: PretrainedConfig, sequence_length: int) -> float:
    """Multiply-adds for each token and layer that route, gather and hand out, without the experts."""
    s, h = _slots(config), config.hidden_size
    if config.FFN_type != "softmoe_causal":
        return 3 * h * s  # logits, dispatch and combine are products of size h x slots
    block = min(BLOCK, sequence_length)
    if config.causal_slots == "lagged":
        return h * s + 2 * _segments(config, block) * s * h
    c, chunks = min(CHUNK, block), block / min(CHUNK, block)
    r = c + s
    sums = h * s + s * h + (chunks + 1) ** 2 * s * (h + 1) / block  # logits; of each chunk; of all before it
    magnitude = r * r * h / c + s * r * r
    means = config.slots_per_expert * r * 2 * config.inner_size * config.n_experts
    return sums + magnitude + means


def _attention(config: PretrainedConfig, sequence_length: int) -> float | None:
    text = config.get_text_config()
    layers, heads = (getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if getattr(text, "num_query_heads", None):  # OpenELM: each layer has its own number
        return 12.0 * sum(text.num_query_heads) * text.head_dim * sequence_length
    if not layers or not heads:
        return None
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 12.0 * layers * heads * head_dim * sequence_length
