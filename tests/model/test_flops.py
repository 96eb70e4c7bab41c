"""Counts and FLOPs against published numbers; the FLOPs formula against a count of what torch multiplies."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_steel.model.build import build_config, construct
from megatron_steel.model.flops import flops_per_full_pair, flops_per_token, parameters, peak_flops
from megatron_steel.recipe import Model, load_recipe

STEEL_1B = load_recipe("steel-1b").model
TINYLLAMA = load_recipe("tinyllama-1.1b").model
MHA_1024 = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}
QWEN = Model("qwen2", MHA_1024 | {"intermediate_size": 2816, "vocab_size": 151936, "tie_word_embeddings": True})
GPT2 = Model("gpt2", {"vocab_size": 50304})
OLMO = Model("olmo", {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 8192,
    "vocab_size": 50304, "tie_word_embeddings": True,
})  # fmt: skip


@pytest.mark.parametrize(
    ("model", "length", "total", "hw", "causal", "six_n", "head_share"),
    [
        (STEEL_1B, 2048, 1_122_922_770, 3.818, 3.422, 7.530, 0.428),
        (TINYLLAMA, 2048, 1_100_048_384, 7.314, 6.760, 7.707, 0.054),
        (QWEN, 2048, 463_987_712, 3.387, 3.085, 3.387, 0.276),
        (GPT2, 1024, 124_475_904, 0.855, 0.798, None, 0.271),  # 6N is published for a version without biases
        (OLMO, 2048, 1_176_764_416, 7.866, 7.463, 7.866, 0.079),
    ],
)
def test_published_counts(model, length, total, hw, causal, six_n, head_share):
    """GFLOP per token, to the three decimals they are published with."""
    config = build_config(model)
    assert parameters(config).total == total
    flops = flops_per_token(config, length)
    assert round(flops.hw / 1e9, 3) == hw
    assert round(flops.causal / 1e9, 3) == causal
    # published without the norms' weights, which move the third decimal
    assert six_n is None or abs(flops.six_n / 1e9 - six_n) < 0.001
    assert round(flops.head / flops.hw, 3) == head_share


def test_steel_is_cheaper_than_its_size_says():
    flops = flops_per_token(build_config(STEEL_1B), 2048)
    assert round(flops.six_n / flops.hw, 2) == 1.97


SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["raw", "softmoe_v1", "softmoe_v2", "softmoe_v3", "llama", "qwen3", "gpt_neox"])
def test_hw_is_what_torch_multiplies(kind):
    """torch's own counter over forward and backward (eager attention, so that every product is seen)."""
    if kind in ("llama", "qwen3", "gpt_neox"):
        sizes = {k: v for k, v in SMALL.items() if kind != "gpt_neox" or k != "num_key_value_heads"}
        config = build_config(Model(kind, sizes))
    else:
        config = build_config(Model("steel", SMALL | {"FFN_type": kind, "n_experts": 3, "slots_per_expert": 2}))
    config._attn_implementation = "eager"
    model = construct(config, torch.float32).train()
    ids = torch.randint(0, 128, (2, 48))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    expected = flops_per_token(config, 48).hw * ids.numel()
    # Less: the router's softmaxes and rotary products are no matrix products; nothing larger may be missing.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)


def test_a_full_pair_is_counted_as_torch_counts_it():
    sizes = {
        "vocab_size": 128,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
    }
    config = build_config(Model("t5", sizes | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}))
    config._attn_implementation = "eager"
    model = construct(config, torch.float32).train()
    prompt, response = (torch.randint(0, 128, (2, 40)) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=prompt, labels=response, use_cache=False).logits.sum().backward()
    flops = flops_per_full_pair(config, 40)
    assert counter.get_total_flops() == pytest.approx(flops.hw * response.numel(), rel=0.002)
    assert flops.attention == 12 * 4 * 8 * 40 * (2 + 2 * 3)
    assert flops.hw - flops.causal == 12 * 4 * 8 * 40 * 3 / 2


def test_no_guess_for_sparse_mixtures():
    sizes = SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1}
    assert flops_per_token(build_config(Model("mixtral", sizes)), 64) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12), ("NVIDIA H100 PCIe", 756.5e12), ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12), ("NVIDIA H800", 989.5e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None), ("Tesla V100-SXM2-16GB", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peaks(name, peak):
    assert peak_flops(name) == peak
