"""The classes that transformers lacks (modeling_steel.py has its own file): formulas, causality, cache, masks, initial weights, export."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_steel.errors import SteelError
from megatron_steel.model.build import build_config, build_model
from megatron_steel.model.configuration_openelm import OpenELMConfig, divisible, spread
from megatron_steel.model.folder import is_own_code
from megatron_steel.model.own import OWN, own_class
from megatron_steel.recipe import Model

VOCABULARY = 97
KINDS = {
    "nanogpt": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.15},
    "openelm": {
        "model_dim": 64,
        "num_transformer_layers": 3,
        "head_dim": 8,
        "num_gqa_groups": 2,
        "ffn_dim_divisor": 16,
    },
}


def tiny(kind, **changes):
    config = build_config(Model(type=kind, config={"vocab_size": VOCABULARY, **KINDS[kind], **changes}))
    return build_model(config, seed=2).eval()


def some_ids(batch=2, tokens=12):
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_nanogpt_is_gpt2_with_zero_biases():
    ours = tiny("nanogpt")
    sizes = {k: v for k, v in KINDS["nanogpt"].items() if k != "initializer_range"}
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, activation_function="gelu", **sizes)).eval()
    state = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        is_matrix = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")  # GPT-2's lie transposed
        state[name] = weight.T if is_matrix else weight
    for name in state:
        if name.endswith("bias"):
            state[name] = torch.zeros_like(state[name])
    theirs.load_state_dict(state)
    torch.testing.assert_close(ours(some_ids()).logits, theirs(some_ids()).logits, rtol=0, atol=2e-6)


def _openelm_by_hand(model, ids):
    """The formulas again, a layer and a head at a time, from the state dict alone."""
    c, w = model.config, model.state_dict()

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[f"transformer.{name}.weight"]

    def rotate(x_Td):
        T, d = x_Td.shape
        half, turned = d // 2, torch.empty_like(x_Td)
        for i in range(half):
            angle = torch.arange(T) * c.rope_freq_constant ** (-2 * i / d)
            a, b = x_Td[:, i], x_Td[:, i + half]
            turned[:, i], turned[:, i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return turned

    out = []
    for row in ids:
        x = w["transformer.token_embeddings.weight"][row]
        for i, (heads, kv_heads) in enumerate(zip(c.num_query_heads, c.num_kv_heads, strict=True)):
            at = f"layers.{i}"
            heads_THd = (norm(x, f"{at}.attn_norm") @ w[f"transformer.{at}.attn.qkv_proj.weight"].T).view(
                len(row), -1, c.head_dim
            )
            done = []
            for n in range(heads):
                k = n // (heads // kv_heads)
                query = rotate(norm(heads_THd[:, n], f"{at}.attn.q_norm"))
                key = rotate(norm(heads_THd[:, heads + k], f"{at}.attn.k_norm"))
                scores = (query @ key.T / c.head_dim**0.5).masked_fill(
                    torch.ones(len(row), len(row)).triu(1).bool(), -torch.inf
                )
                done.append(scores.softmax(-1) @ heads_THd[:, heads + kv_heads + k])
            x = x + torch.cat(done, -1) @ w[f"transformer.{at}.attn.out_proj.weight"].T
            gate, value = (norm(x, f"{at}.ffn_norm") @ w[f"transformer.{at}.ffn.proj_1.weight"].T).split(
                c.ffn_dims[i], -1
            )
            x = x + (gate * gate.sigmoid() * value) @ w[f"transformer.{at}.ffn.proj_2.weight"].T
        out.append(norm(x, "norm") @ w["transformer.token_embeddings.weight"].T)
    return torch.stack(out)


@torch.no_grad()
def test_openelm_is_its_formulas():
    model, ids = tiny("openelm"), some_ids()
    for name, p in model.named_parameters():  # norms that are all ones would hide a forgotten one
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    torch.testing.assert_close(model(ids).logits, _openelm_by_hand(model, ids), rtol=1e-5, atol=1e-5)


def test_openelm_s_layers_have_the_published_widths():
    """Multipliers as numpy spreads and rounds them, in the two published ranges and at all published depths."""
    for layers in (16, 20, 28, 36):
        for ends in ((0.5, 1.0), (0.5, 4.0)):
            assert spread(ends, layers) == [round(v, 2) for v in np.linspace(*ends, num=layers, dtype=float)]
    assert [divisible(v, 64) for v in (10, 95, 97, 139, 161)] == [64, 64 + 64, 128, 128, 192]
    config = OpenELMConfig()  # 270M
    assert config.num_query_heads == [12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20]
    assert config.num_kv_heads == [3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5]
    assert config.ffn_dims[:3] == [768, 1024, 1280]
    assert config.ffn_dims[-1] == 5120


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_position_sees_a_later_token(kind):
    model, ids = tiny(kind), some_ids()
    changed = ids.clone()
    changed[:, 8] = (changed[:, 8] + 1) % VOCABULARY
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] - after[:, 8:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_and_padded_and_eager_and_flex_equal_the_full_pass(kind):
    model, ids = tiny(kind), some_ids()
    full = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    middle = model(ids[:, 5:9], past_key_values=first.past_key_values, use_cache=True)  # several at once
    pieces = [first.logits, middle.logits]
    for t in range(9, 12):
        pieces.append(model(ids[:, t : t + 1], past_key_values=middle.past_key_values, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-5, atol=1e-5)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)), 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(
        model(padded, attention_mask=mask, position_ids=places).logits[:, 3:], full, rtol=1e-5, atol=1e-5
    )
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, full, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(model(ids).logits, full, rtol=1e-5, atol=1e-5)
        found = model(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
        torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generate_with_a_cache_is_the_argmax_without_one(kind):
    model, ids = tiny(kind), some_ids(tokens=5)
    written = ids
    for _ in range(6):
        written = torch.cat((written, model(written, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), written)


@pytest.mark.parametrize("kind", KINDS)
def test_own_loss_is_the_shifted_cross_entropy(kind):
    model, ids = tiny(kind), some_ids()
    output = model(ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def _expected_std(model, name, weight):
    c = model.config
    ends_branch = name.endswith(("c_proj.weight", "out_proj.weight", "ffn.proj_2.weight"))
    if c.model_type == "nanogpt":
        return 0.02 / (2 * c.n_layer) ** 0.5 if ends_branch else 0.02
    return (2 * c.num_hidden_layers * c.model_dim if ends_branch else weight.shape[1]) ** -0.5


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("nanogpt", {"n_embd": 256, "n_layer": 8, "n_head": 4, "n_positions": 512, "initializer_range": 0.02}),
        ("openelm", {"model_dim": 256, "num_transformer_layers": 8, "head_dim": 32}),
    ],
)
def test_initial_weights_follow_the_published_rules(kind, sizes):
    model = tiny(kind, **sizes)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert torch.equal(p, torch.ones_like(p)), name
        else:  # the standard error of a standard deviation of n numbers is 1/sqrt(2n) of it
            assert float(p.detach().std()) == pytest.approx(
                _expected_std(model, name, p), rel=5 / (2 * p.numel()) ** 0.5
            ), name


def test_dropout_works_in_training_alone():
    model, ids = tiny("nanogpt", dropout=0.5), some_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("nanogpt", "n_head", 5), ("nanogpt", "n_layer", 0), ("nanogpt", "dropout", 1), ("openelm", "head_dim", 7),
        ("openelm", "num_gqa_groups", 0), ("openelm", "ffn_multipliers", [1.0]), ("openelm", "qkv_multipliers", [0, 1]),
    ],
)  # fmt: skip
def test_impossible_values_are_named(kind, field, value):
    with pytest.raises(SteelError, match=r"model\.config\.(n_embd|" + field + ")"):
        tiny(kind, **{field: value})


_LOADER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron_steel": raise ImportError("not here")
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM
out = {}
for folder in sys.argv[1:]:
    ids = torch.load(folder + "/ids.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(ids).logits
    torch.save((logits, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)), folder + "/out.pt")
    model.save_pretrained(folder + "/again")
"""


def test_exports_load_in_a_fresh_process_without_this_package(tmp_path):
    models, ids = {kind: tiny(kind) for kind in KINDS}, some_ids()
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
        torch.save(ids, tmp_path / kind / "ids.pt")
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", _LOADER, *(str(tmp_path / kind) for kind in KINDS)]
    done = subprocess.run(command, env=home, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, model in models.items():
        logits, written = torch.load(tmp_path / kind / "out.pt")
        with torch.no_grad():
            assert torch.equal(logits, model(ids).logits)
        assert torch.equal(written, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
        assert {file.name for file in OWN[kind].files} <= {file.name for file in (tmp_path / kind / "again").iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_our_code_is_ours_and_with_other_code_a_stranger_s(tmp_path, kind):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    assert is_own_code(tmp_path, tree)
    config = build_config(Model(path=str(tmp_path)))
    assert own_class(config) is OWN[kind]
    again = build_model(config, 5, init_from=str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    code = tmp_path / OWN[kind].file_names[1]
    code.write_text(code.read_text() + "\n# changed\n")
    assert not is_own_code(tmp_path, tree)
    with pytest.raises(SteelError, match="is not this package's, and running it is not allowed"):
        build_config(Model(path=str(tmp_path)))
