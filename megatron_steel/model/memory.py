"""Bytes of activations: an estimate, good enough to name a micro-batch that fits.

Counted from what the modelling code keeps for its backward pass where attention keeps no map (flash or
memory-efficient): for a GPT layer of width h this comes to the 34 h bytes per token of Korthikanti et al. (2205.05198,
section 4.1, without the attention map), give or take its dropout masks. A test compares it with autograd's own count.
Classes with LayerNorm, dropout and a GELU written in plain torch (gpt2) keep up to twice as much. Allocator fragments,
workspaces and the buffers of ZeRO are not in it. Knows configurations only.
"""

from transformers import PretrainedConfig

from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.model.head import BLOCK_NUMBERS, CHUNK_TOKENS
from megatron_steel.model.mixture_steel import BLOCK, CHUNK
from megatron_steel.model.text_to_text import is_text_to_text

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_QK_NORM = ("qwen3", "olmo2", "olmo3", "gemma3_text", "openelm")


def activation_bytes_per_sample(
    config: PretrainedConfig, sequence_length: int, precision: str = "bf16", checkpointing: bool = False
) -> int:
    """Bytes that one sample's forward pass leaves for its backward pass, the head's logits not included.

    Args:
        sequence_length: tokens of the sample; of an encoder-decoder's, of prompt and response each.
        precision: `fp32`, `bf16` or `fp16`.
        checkpointing: activation checkpointing: each layer's input, and one layer in full while it is computed again.
    """
    text = config.get_text_config()
    size, layers, hidden = _BYTES[precision], text.num_hidden_layers, text.hidden_size
    if is_text_to_text(config):
        return sequence_length * _pair_bytes_per_token(config, size, checkpointing)
    layer = _layer_bytes_per_token(text, size)
    again = 0
    if sequence_length > BLOCK and getattr(text, "FFN_type", None) == "softmoe_causal":
        # Of each block of tokens the mixture keeps its input and output, and computes the rest again, one at a time.
        mixture = _ffn_bytes_per_token(text, size)
        layer, again = layer - mixture + 2 * hidden * size, BLOCK * mixture
    kept = layers * hidden * size + layer if checkpointing else layers * layer
    ends = 4 * hidden * size  # embedding output, final norm, the head's gradient of it
    return sequence_length * (kept + ends) + again


def head_bytes(config: PretrainedConfig, tokens: int, precision: str = "bf16") -> int:
    """Bytes of the chunk of logits that is alive at one time, and of the block of it that is alive in fp32."""
    numbers = min(tokens, CHUNK_TOKENS) * config.get_text_config().vocab_size
    return numbers * _BYTES[precision] + (0 if precision == "fp32" else 4 * min(numbers, BLOCK_NUMBERS))


def largest_micro_batch(
    config: PretrainedConfig,
    sequence_length: int,
    free_bytes: int,
    precision: str = "bf16",
    checkpointing: bool = False,
) -> int:
    """The most samples whose activations fit into `free_bytes` (weights, gradients and optimizer already taken).

    Returns:
        0 when not even one sample fits.
    """
    per_sample = activation_bytes_per_sample(config, sequence_length, precision, checkpointing)
    fits = 0
    # The head's share stops growing at its chunk, so this is not one division.
    while (fits + 1) * per_sample + head_bytes(config, (fits + 1) * sequence_length, precision) <= free_bytes:
        fits += 1
    return fits


def _pair_bytes_per_token(config: PretrainedConfig, size: int, checkpointing: bool) -> int:
    """Of a token of the prompt and one of the response. A decoder layer has one more norm and attention; where there is
    dropout, a mask of a byte lies behind each part and inside the FFN. Relative positions are shared by all layers."""
    hidden, inner = config.d_model, config.d_ff
    branch = hidden * (4 + 2 * size) + 5 * config.num_heads * config.d_kv * size
    encoder = branch + hidden * (4 + 2 * size) + 4 * inner * size
    decoder = encoder + branch
    if config.dropout_rate:
        encoder, decoder = encoder + 2 * hidden + inner, decoder + 3 * hidden + inner
    ends = 4 * hidden * size
    if checkpointing:
        return (config.num_layers + config.num_decoder_layers) * hidden * size + decoder + ends
    return config.num_layers * encoder + config.num_decoder_layers * decoder + ends


def _layer_bytes_per_token(config: PretrainedConfig, size: int) -> int:
    """Bytes per token that one layer saves for its backward pass."""
    hidden = config.hidden_size
    if config.model_type == "openelm":  # each layer has its own widths: their mean
        heads, kv_heads, head_dim = _mean(config.num_query_heads), _mean(config.num_kv_heads), config.head_dim
    else:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
    # Two norms: the input in fp32, its normalised form and the output, rounded.
    norms = 2 * hidden * (4 + 2 * size)
    # Rotated query and key, value; the output as attention and as o_proj want it.
    attention = (3 * heads + 2 * kv_heads) * head_dim * size
    if config.model_type in _QK_NORM:
        attention += (heads + kv_heads) * head_dim * (4 + size)
    return round(norms + attention) + _ffn_bytes_per_token(config, size)


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def _ffn_bytes_per_token(config: PretrainedConfig, size: int) -> int:
    return _ffn_values_per_token(config) * size + _causal_fp32_bytes_per_token(config)


def _ffn_values_per_token(config: PretrainedConfig) -> int:
    hidden = config.hidden_size
    if config.model_type == "openelm":
        return round(4 * _mean(config.ffn_dims))
    if not isinstance(config, SteelConfig):
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        return 4 * inner  # gate, its activation, up, the product
    one = 4 * config.inner_size + (3 * hidden if config.mlp_type == "senet" else 0)
    if config.FFN_type == "raw":
        return one
    if config.FFN_type == "softmoe_v1":
        return config.n_experts * (one + hidden)
    if config.FFN_type == "softmoe_causal":
        return _causal_values_per_token(config, one)
    # The normalised input; dispatch and combine in fp32 and rounded. What the slots do is small.
    return hidden + 6 * config.n_experts * config.slots_per_expert


def _causal_values_per_token(config: SteelConfig, one: int) -> int:
    """Of a causal mixture, up to its block: longer sequences compute each block again and keep less than this."""
    slots = config.n_experts * config.slots_per_expert
    if config.causal_slots == "lagged":
        return 4 * config.intermediate_size + (3 * config.hidden_size if config.mlp_type == "senet" else 0)
    # Gate and value before and after the means; each slot's output, weighted; the shares of a chunk.
    return 2 * config.inner_size * config.n_experts + slots * (one + config.hidden_size) + slots * (CHUNK + slots)


def _causal_fp32_bytes_per_token(config: PretrainedConfig) -> int:
    """Routing and sums, fp32 in every precision: x, x normalised and its norm's input, logits, shares several times."""
    if not isinstance(config, SteelConfig) or config.FFN_type != "softmoe_causal":
        return 0
    slots = config.n_experts * config.slots_per_expert
    shares = 22 * slots * (CHUNK + slots) if config.causal_slots == "prefix" else 0
    return 12 * config.hidden_size + 16 * slots + shares
