"""The shipped architecture: shapes and counts, formulas, causality, cache, padding, masks, checkpointing, export."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megatron_steel import audit_probe
from megatron_steel.model.configuration_steel import FFN_TYPES, MLP_TYPES, SteelConfig
from megatron_steel.model.modeling_steel import SteelForCausalLM, SteelModel, rotary_tables

CAUSAL = ("raw", "softmoe_v1", "softmoe_causal")
PUBLISHED = tuple(
    name for name in FFN_TYPES if name != "softmoe_causal"
)  # test_mixture.py has the formulas of the rest
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "n_experts": 3, "slots_per_expert": 2, "mlp_div_ratio": 2, "initializer_range": 0.1,
}  # fmt: skip


def tiny(**changes) -> SteelForCausalLM:
    torch.manual_seed(0)
    return SteelForCausalLM(SteelConfig(**(SIZES | changes))).eval()


def some_ids(batch=2, tokens=12) -> torch.Tensor:
    return torch.randint(1, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


# ---- sizes and initial weights


@pytest.mark.parametrize(
    ("ffn", "mlp", "total"),
    [
        ("softmoe_v3", "senet", 1_122_922_770), ("raw", "raw", 819_264_768), ("raw", "senet", 833_715_456),
        ("softmoe_v1", "raw", 1_036_218_732), ("softmoe_v1", "senet", 1_122_922_860),
        ("softmoe_v3", "raw", 1_036_218_642), ("softmoe_v2", "senet", 1_122_922_752),
    ],
)  # fmt: skip
def test_counts_at_the_published_size(ffn, mlp, total):
    with torch.device("meta"):
        model = SteelForCausalLM(SteelConfig(FFN_type=ffn, mlp_type=mlp, mlp_div_ratio=4))
    assert sum(p.numel() for p in model.parameters()) == total


def test_names_are_those_of_the_original():
    with torch.device("meta"):
        model = SteelForCausalLM(SteelConfig(FFN_type="softmoe_v3", mlp_type="senet", mlp_div_ratio=4))
    names = set(model.state_dict())
    assert len(names) == 633
    expert = {"gate_up_proj.weight", "up_proj.weight", "gate_down_proj.weight", "down_proj.weight"}
    layer = {"input_layernorm.weight", "post_attention_layernorm.weight", "mlp.phi", "mlp.scale"}
    layer |= {f"self_attn.{p}_proj.{w}" for p in "qkv" for w in ("weight", "bias")} | {"self_attn.o_proj.weight"}
    layer |= {f"mlp.experts.{i}.{name}" for i in range(6) for name in expert}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names == expected | {f"model.layers.{n}.{name}" for n in range(18) for name in layer}
    assert model.state_dict()["model.layers.0.mlp.phi"].shape == (1792, 6, 1)


def test_initial_statistics():
    """Five standard errors of a normal draw's own spread around each stated value."""
    for ffn, name, std in (
        ("softmoe_v3", "mlp.phi", 256**-0.5), ("softmoe_v2", "mlp.score", 1.0), ("softmoe_v1", "mlp.gating.weight", 0.02),
        ("raw", "mlp.down_proj.weight", 0.02), ("raw", "self_attn.q_proj.weight", 0.02),
    ):  # fmt: skip
        model = tiny(FFN_type=ffn, hidden_size=256, initializer_range=0.02, vocab_size=500)
        weight = model.model.layers[1].get_parameter(name).detach()
        error = std / (2 * weight.numel()) ** 0.5
        assert abs(weight.std().item() - std) < 5 * error, (name, weight.std())
        assert abs(weight.mean().item()) < 5 * std / weight.numel() ** 0.5
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                assert module.bias.abs().max() == 0
        assert abs(model.lm_head.weight.std().item() - 0.02) < 5 * 0.02 / (2 * 500 * 256) ** 0.5
        assert model.model.norm.weight.eq(1).all()
    assert tiny(FFN_type="softmoe_v3").model.layers[0].mlp.scale.item() == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("FFN_type", "softmoe_v4"), ("mlp_type", "se"), ("slots_per_expert", 0), ("n_experts", 0), ("hidden_act", "relu"),
        ("num_key_value_heads", 3), ("hidden_size", 66), ("hidden_size", "wide"), ("intermediate_size", 1),
        ("use_sliding_window", True), ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ],
)  # fmt: skip
def test_impossible_configurations_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SteelConfig(**(SIZES | {field: value}))


# ---- formulas, written out again token by token in fp64


def expert(module, x):
    w = {name: p.double() for name, p in module.named_parameters()}
    if "gate_proj.weight" in w:
        return (F.silu(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)) @ w["down_proj.weight"].T
    z = F.silu(x @ w["gate_up_proj.weight"].T) * (x @ w["up_proj.weight"].T)
    return F.silu(z @ w["gate_down_proj.weight"].T) * (z @ w["down_proj.weight"].T)


def by_hand(mlp, ffn, x):
    """One sequence [T, h] in fp64."""
    if ffn == "raw":
        return expert(mlp, x)
    if ffn == "softmoe_v1":
        weights = torch.softmax(x @ mlp.gating.weight.double().T + mlp.gating.bias.double(), dim=1)
        return sum(weights[:, [e]] * expert(module, x) for e, module in enumerate(mlp.experts))
    if ffn == "softmoe_v2":
        scores = x @ mlp.score.double()
        dispatch, combine = scores.softmax(1), scores.softmax(0)
        source = x
    else:
        source = x / x.norm(dim=1, keepdim=True)
        phi = mlp.phi.double()
        scores = source @ (mlp.scale.double() * phi / phi.norm(dim=0, keepdim=True)).reshape(x.shape[1], -1)
        dispatch, combine = scores.softmax(0), scores.softmax(1)
    out = 0
    for slot in range(scores.shape[1]):
        gathered = (dispatch[:, [slot]] * source).sum(0, keepdim=True)
        out = out + combine[:, [slot]] * expert(mlp.experts[slot // 2], gathered)
    return out


@pytest.mark.parametrize("ffn", PUBLISHED)
@pytest.mark.parametrize("mlp_type", MLP_TYPES)
@torch.no_grad()
def test_ffn_formulas(ffn, mlp_type):
    model = tiny(FFN_type=ffn, mlp_type=mlp_type)
    mlp = model.model.layers[0].mlp
    if ffn == "softmoe_v1":
        mlp.gating.bias.normal_()
    x = torch.randn(2, 7, 64)
    expected = torch.stack([by_hand(mlp, ffn, row.double()) for row in x])
    torch.testing.assert_close(mlp(x).double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def layer_by_hand(layer, ffn, x, allowed):
    """One sequence [T, h] through a decoder layer in fp64. `allowed` [T, T]; a query with no key takes the mean of all."""
    w = {name: p.double() for name, p in layer.named_parameters()}
    config, T = layer.self_attn.config, len(x)
    heads, d = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def norm(x, name):
        return w[f"{name}.weight"] * x / (x.pow(2).mean(1, keepdim=True) + config.rms_norm_eps).sqrt()

    def turn(rows):
        angle = torch.arange(T, dtype=torch.float64)[:, None] / 1e6 ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
        a, b = rows[..., : d // 2], rows[..., d // 2 :]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    read = norm(x, "input_layernorm")
    q, k, v = ((read @ w[f"self_attn.{n}_proj.weight"].T + w[f"self_attn.{n}_proj.bias"]).view(T, -1, d).transpose(0, 1) for n in "qkv")  # fmt: skip
    group = heads // config.num_key_value_heads
    parts = []
    for head in range(heads):
        scores = turn(q[head]) @ turn(k[head // group]).T / d**0.5
        parts.append(scores.masked_fill(~allowed, -1e30).softmax(1) @ v[head // group])
    x = x + torch.cat(parts, 1) @ w["self_attn.o_proj.weight"].T
    return x + by_hand(layer.mlp, ffn, norm(x, "post_attention_layernorm"))


@pytest.mark.parametrize("padding", [0, 3, -3])
@pytest.mark.parametrize("weights", ["ordinary", "enlarged"])
@pytest.mark.parametrize("mlp_type", MLP_TYPES)
@pytest.mark.parametrize("ffn", PUBLISHED)
@torch.no_grad()
def test_the_whole_model_is_the_original_s_formulas(ffn, mlp_type, weights, padding):
    """GQA, biases, theta 1e6, untied head; padding on the left, on the right or none. Within 1e-5 of the largest logit in fp32.

    Enlarged: every part adds its share to the stream, biases are not 0. Then what rounding makes of a logit grows with the
    layers before it, so the tolerance is of the largest logit.
    """
    model = tiny(FFN_type=ffn, mlp_type=mlp_type, initializer_range=0.02)
    if weights == "enlarged":
        audit_probe.enlarge(model, 13)
    ids, T = some_ids(1, 13), 13
    mask = torch.ones_like(ids)
    mask[0, : max(padding, 0)] = 0
    mask[0, T + min(padding, 0) :] = 0
    allowed = torch.ones(T, T, dtype=torch.bool).tril() & mask[0].bool()
    x = model.model.embed_tokens.weight.double()[ids[0]]
    for layer in model.model.layers:
        x = layer_by_hand(layer, ffn, x, allowed)
    x = model.model.norm.weight.double() * x / (x.pow(2).mean(1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    expected = x @ model.lm_head.weight.double().T
    rows = slice(None) if model.config.sees_future else mask[0].bool()  # nobody reads the others
    for attention in ("eager", "sdpa"):
        model.config._attn_implementation = attention
        found = model(ids, attention_mask=mask, use_cache=False).logits[0].double()
        assert (found - expected)[rows].abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), attention


def test_rotary_tables_are_fp32_whatever_the_model_is():
    cos, sin = rotary_tables(torch.arange(4000)[None], 56, 1e6)
    assert cos.dtype == sin.dtype == torch.float32
    exponent = torch.arange(0, 56, 2, dtype=torch.float64) / 56
    angle = torch.arange(4000, dtype=torch.float64)[:, None] / 1e6**exponent
    # the angle itself is rounded to fp32: 4000 x 2^-24 = 2.4e-4
    torch.testing.assert_close(cos[0, 0].double(), torch.cat((angle, angle), 1).cos(), rtol=0, atol=5e-4)
    torch.testing.assert_close(sin[0, 0].double(), torch.cat((angle, angle), 1).sin(), rtol=0, atol=5e-4)


# ---- who sees whom


@pytest.mark.parametrize("ffn", FFN_TYPES)
@torch.no_grad()
def test_a_changed_last_token_changes_earlier_outputs_only_where_the_config_says_so(ffn):
    model = tiny(FFN_type=ffn)
    ids = some_ids()
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 97
    difference = (model(ids).logits - model(other).logits)[:, :-1].abs().max().item()
    assert model.config.sees_future == (ffn not in CAUSAL)
    if model.config.sees_future:
        assert difference > 1e-6
    else:
        assert difference == 0.0


@pytest.mark.parametrize("ffn", CAUSAL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_cached_equals_full(ffn, attention):
    model = tiny(FFN_type=ffn, attn_implementation=attention)
    ids = some_ids()
    full = model(ids, use_cache=False).logits
    first = model(ids[:, :5], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for piece in (ids[:, 5:9], ids[:, 9:10], ids[:, 10:]):  # several tokens at once, and one at a time
        out = model(piece, past_key_values=cache)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ffn", FFN_TYPES)
@torch.no_grad()
def test_generate_equals_greedy_by_hand(ffn):
    model = tiny(FFN_type=ffn)
    ids = some_ids()
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)


def test_a_model_that_sees_the_future_refuses_a_filled_cache():
    cache = tiny(FFN_type="raw")(some_ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="without a cache"):
        tiny(FFN_type="softmoe_v3")(some_ids(), past_key_values=cache)
    assert tiny(FFN_type="softmoe_v3")(some_ids(), use_cache=True).past_key_values is None


def test_generating_with_a_model_that_sees_the_future_says_so(monkeypatch):
    from megatron_steel.model import modeling_steel

    said = []
    monkeypatch.setattr(modeling_steel.logger, "warning_once", said.append)
    tiny(FFN_type="softmoe_v2").generate(some_ids(), max_new_tokens=1, pad_token_id=0)
    tiny(FFN_type="raw").generate(some_ids(), max_new_tokens=1, pad_token_id=0)
    assert len(said) == 1
    assert "not causal" in said[0]


@pytest.mark.parametrize("ffn", CAUSAL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_left_padding_changes_nothing(ffn, attention):
    model = tiny(FFN_type=ffn, attn_implementation=attention)
    ids = some_ids(1)
    padded = F.pad(ids, (5, 0))
    mask = F.pad(torch.ones_like(ids), (5, 0))
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, 5:], model(ids).logits, rtol=1e-5, atol=1e-5
    )
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    left = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(left[:, 5:], plain)


@torch.no_grad()
def test_sdpa_equals_eager_also_with_a_given_mask():
    ids = some_ids()
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[6:, :6] = False
    mask = mask.expand(2, 1, 12, 12)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    logits = [
        tiny(attn_implementation=name)(ids, attention_mask=given).logits
        for name in ("sdpa", "eager")
        for given in (mask, additive)
    ]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-5)
    plain = [tiny(attn_implementation=name)(ids).logits for name in ("sdpa", "eager")]
    torch.testing.assert_close(plain[0], plain[1], rtol=1e-5, atol=1e-5)


def _like_flash(module, query, key, value, padding_BS, scaling, dropout, **kwargs):
    """What a flash kernel is told: padding or nothing; the causal rule it keeps by itself, aligned to the last key."""
    assert padding_BS is None or padding_BS.dim() == 2
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    T, S = query.shape[2], key.shape[2]
    allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
    if padding_BS is not None:
        allowed = allowed & padding_BS[:, None, None].bool() | torch.eye(T, S, dtype=torch.bool)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -1e30)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@torch.no_grad()
def test_an_attention_of_the_library_s_table_is_used_and_a_flash_kernel_gets_padding_only():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("flash_by_hand", _like_flash)
    ids = some_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for ffn in CAUSAL:
        model, other = tiny(FFN_type=ffn), tiny(FFN_type=ffn)
        assert other._supports_flash_attn
        assert other._supports_flex_attn
        other.config._attn_implementation = "flash_by_hand"
        for inputs in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(
                other(ids, **inputs).logits[:, 4:], model(ids, **inputs).logits[:, 4:], rtol=1e-5, atol=1e-5
            )
        full = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
        with pytest.raises(ValueError, match="use sdpa for a complete mask"):
            other(ids, attention_mask=full)
        written = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, other)]
        assert torch.equal(*written)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention is compiled, and there is no compiler")
@torch.no_grad()
def test_flex_attention_equals_eager():
    """Plain, with padding, with a complete mask, and over a cache. (v3's padding is an additive mask, for which torch 2.13
    compiles a kernel that aborts on a CPU; its complete mask stands for it.)"""
    ids = some_ids()
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    complete = torch.ones(12, 12, dtype=torch.bool).tril()
    complete[6:, :6] = False
    for ffn in ("raw", "softmoe_v3", "softmoe_causal"):
        eager, flex = (tiny(FFN_type=ffn, attn_implementation=name) for name in ("eager", "flex_attention"))
        masks = (None, padding, complete.expand(2, 1, 12, 12))
        for mask in masks if ffn != "softmoe_v3" else masks[::2]:
            torch._dynamo.reset()
            found, wanted = (m(ids, attention_mask=mask, use_cache=False).logits for m in (flex, eager))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch._dynamo.reset()
        written = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (eager, flex)]
        assert torch.equal(*written)


def test_the_loss_is_the_shifted_cross_entropy_and_counts_items():
    model, ids = tiny(), some_ids()
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(out.loss, expected / (labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=10).loss, expected / 10)
    assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 97)


@pytest.mark.parametrize("ffn", FFN_TYPES)
def test_activation_checkpointing_changes_neither_loss_nor_gradients(ffn):
    ids = some_ids()
    results = []
    for checkpointing in (False, True):
        model = tiny(FFN_type=ffn).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_base_model_returns_hidden_states():
    model = tiny()
    out = model.model(some_ids(), output_hidden_states=True)
    assert isinstance(model.base_model, SteelModel)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


# ---- the file travels

LOADER = """
import sys, torch
sys.modules["megatron_steel"] = None   # from here on it cannot be imported, however it was installed
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
ids = torch.load(sys.argv[1] + "/ids.pt")
base = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
assert type(base).__name__ == "SteelModel"
with torch.no_grad():
    torch.save((model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)), sys.argv[1] + "/out.pt")
model.save_pretrained(sys.argv[1] + "/again")
"""


@pytest.mark.parametrize(("ffn", "tied"), [("raw", True), ("softmoe_v3", False)])
def test_export_loads_in_a_fresh_process_without_this_package(tmp_path, ffn, tied):
    model, ids = tiny(FFN_type=ffn, tie_word_embeddings=tied), some_ids()
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADER, str(tmp_path)], env=home, cwd=tmp_path, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logits, written = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert torch.equal(logits, model(ids).logits)
    assert torch.equal(written, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
    for name in ("configuration_steel.py", "mixture_steel.py", "modeling_steel.py", "config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).is_file()
