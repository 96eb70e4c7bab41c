"""The causal mixtures: formulas, who sees whom, cache, padding, documents, gradients, export; and experts as one product."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mixtures import SIZES, SLOTS, tiny
from transformers.dynamic_module_utils import get_relative_imports

from megatron_steel.model import mixture_steel, modeling_steel
from megatron_steel.model.build import build_config
from megatron_steel.model.configuration_steel import MLP_TYPES, SteelConfig
from megatron_steel.model.flops import parameters
from megatron_steel.model.modeling_steel import SteelForCausalLM, _rotate, rotary_tables
from megatron_steel.model.training import prepare_for_training
from megatron_steel.recipe import Model, load_recipe

TOKENS = 31


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Short chunks and blocks, so that a short text has several of each, and ends within one."""
    monkeypatch.setattr(mixture_steel, "CHUNK", 4)
    monkeypatch.setattr(mixture_steel, "BLOCK", 12)


def some_ids(batch=2, tokens=TOKENS) -> torch.Tensor:
    return torch.randint(1, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


# ---- formulas, written out again slot by slot in fp64


def rms(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def slots_by_hand(mixture, x, t, scores):
    """The n * p slot vectors [s, h] that token t of one sequence x [T, h] reads."""
    if isinstance(mixture, mixture_steel.SteelPrefixMixture):
        return rms(torch.softmax(scores[: t + 1], dim=0).T @ x[: t + 1])
    length = mixture.segment
    k = t // length
    if k == 0:
        return rms(mixture.first_slots.double())
    before = slice((k - 1) * length, k * length)
    return rms(torch.softmax(scores[before], dim=0).T @ x[before])


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("mlp_type", MLP_TYPES)
@torch.no_grad()
def test_formula(slots, mlp_type):
    mixture = tiny(slots, mlp_type=mlp_type).model.layers[0].mlp.double()
    x = torch.randn(TOKENS, 64, dtype=torch.float64)
    phi = F.normalize(mixture.phi, dim=0).flatten(1)
    scores = F.normalize(x, dim=1) @ phi * 40 * torch.tanh(mixture.scale / 40)
    expected = []
    for t in range(TOKENS):
        read = slots_by_hand(mixture, x, t, scores)
        parts = [mixture.experts[j // 2](read[j]) for j in range(6)]
        expected.append(torch.softmax(scores[t], dim=0) @ torch.stack(parts))
        if slots == "lagged":
            expected[-1] = expected[-1] + mixture.shared(x[t])
    expected = torch.stack(expected)
    found = mixture.float()(x.float()[None])[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# ---- who sees whom


@pytest.mark.parametrize("slots", SLOTS)
@torch.no_grad()
def test_a_changed_last_token_changes_no_earlier_logit(slots):
    model, ids = tiny(slots, attn_implementation="eager"), some_ids()
    for place in (TOKENS - 1, 12, 3):  # the last one; the first of a block; the last of a chunk
        other = ids.clone()
        other[:, place] = (ids[:, place] + 1) % 97
        difference = (model(ids).logits - model(other).logits).abs()
        assert difference[:, :place].max().item() == 0.0
        assert difference[:, place].max().item() > 1e-3
    assert not model.config.sees_future


@pytest.mark.parametrize("slots", SLOTS)
def test_no_gradient_comes_from_the_future(slots):
    mixture = tiny(slots).model.layers[0].mlp
    x = torch.randn(1, TOKENS, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(mixture(x)[0, 17].sum(), x)
    assert grad[0, 18:].abs().max().item() == 0.0
    assert grad[0, :17].abs().max().item() > 0.0


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cuts", [[1] * TOKENS, [7, 1, 13, 10]])
@torch.no_grad()
def test_cached_equals_full(slots, attention, cuts):
    model, ids = tiny(slots, attn_implementation=attention), some_ids()
    cache, parts = None, []
    for piece in ids.split(cuts, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        parts, cache = [*parts, out.logits], out.past_key_values
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slots", SLOTS)
@torch.no_grad()
def test_a_batch_with_left_padding_equals_single_texts(slots):
    model, ids = tiny(slots), some_ids()
    lengths = (TOKENS, 18)
    padded = torch.stack([F.pad(row[:n], (TOKENS - n + 3, 0)) for row, n in zip(ids, lengths, strict=True)])
    mask = (padded > 0).long()
    batch = model(padded, attention_mask=mask).logits
    written = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row, (text, n) in enumerate(zip(ids, lengths, strict=True)):
        single = text[None, :n]
        torch.testing.assert_close(batch[row, -n:], model(single).logits[0], rtol=1e-5, atol=1e-5)
        alone = model.generate(single, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(written[row, -8:], alone[0, -8:])


@pytest.mark.parametrize("slots", SLOTS)
@torch.no_grad()
def test_generate_carries_the_state_in_the_library_s_cache(slots):
    model, ids = tiny(slots), some_ids(tokens=9)
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, **settings)
    assert torch.equal(greedy, model.generate(ids, use_cache=False, **settings))
    beams = model.generate(ids, num_beams=3, num_return_sequences=2, **settings)
    assert torch.equal(beams, model.generate(ids, num_beams=3, num_return_sequences=2, use_cache=False, **settings))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-4)
    with pytest.raises(ValueError, match="filled by another model"):
        model(ids, past_key_values=tiny(FFN_type="raw")(ids, use_cache=True).past_key_values)


@torch.no_grad()
def test_the_cache_s_batch_operations_move_the_state_too():
    model, ids = tiny(), some_ids(tokens=9)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 1]))
    found = model(ids[:, 8:].flip(0), past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids.flip(0)).logits[:, -1:], rtol=1e-5, atol=1e-5)
    cache.reset()
    assert all(layer.tensors is None for layer in cache.layers if isinstance(layer, mixture_steel.SlotState))


@pytest.mark.parametrize("slots", SLOTS)
@torch.no_grad()
def test_packed_documents_equal_separate_ones(slots):
    model, ids = prepare_for_training(tiny(slots)), some_ids()
    lengths = [5, 1, 16, 9]  # on and off the edges of chunks, blocks and segments
    documents = torch.repeat_interleave(torch.tensor([7, 8, 3, 9]), torch.tensor(lengths)).expand(2, -1)
    packed = model(input_ids=ids, document_ids=documents)
    separate = torch.cat([model(input_ids=piece) for piece in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed, model(input_ids=ids), atol=1e-3)  # the documents make a difference


# ---- training


@pytest.mark.parametrize("slots", SLOTS)
def test_checkpointing_of_layers_and_of_blocks_changes_nothing(slots, monkeypatch):
    ids, results = some_ids(), []
    for block, checkpointing in ((64, False), (64, True), (12, False), (12, True)):
        monkeypatch.setattr(mixture_steel, "BLOCK", block)
        model = prepare_for_training(tiny(slots), activation_checkpointing=checkpointing).train()
        loss = model(input_ids=ids[:, :-1], labels=ids[:, 1:])
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        for found, expected in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item() + 1e-7)


@pytest.mark.parametrize("slots", SLOTS)
def test_a_long_sequence_keeps_one_block_at_a_time(slots, monkeypatch):
    """Bytes that autograd keeps grow with the tokens by their input and output alone, not by slots x hidden."""
    monkeypatch.setattr(mixture_steel, "BLOCK", 128)
    monkeypatch.setattr(mixture_steel, "CHUNK", 64)
    mixture = tiny(slots).model.layers[0].mlp
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    def bytes_of(tokens):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mixture(torch.randn(1, tokens, 64, requires_grad=True))
        return sum(size for size, _ in kept.values())

    per_token = (bytes_of(1024) - bytes_of(512)) / 512
    slots_of_all = 6 * 64 * 4
    assert per_token < slots_of_all / 2


def rms_of_grads(model, part):
    grads = [p.grad for name, p in model.named_parameters() if part in name and p.dim() == 2]
    return math.sqrt(sum(g.pow(2).sum().item() for g in grads) / sum(g.numel() for g in grads))


def gradient_ratio(**changes):
    """Expert over attention gradient RMS at the published width, two layers, at initialisation."""
    torch.manual_seed(0)
    config = SteelConfig(vocab_size=512, num_hidden_layers=2, mlp_div_ratio=4, **changes)
    model = SteelForCausalLM(config).train()
    ids = torch.randint(0, 512, (1, 513))
    prepare_for_training(model)(input_ids=ids[:, :-1], labels=ids[:, 1:]).backward()
    return rms_of_grads(model, ".experts.") / rms_of_grads(model, ".self_attn.")


@pytest.mark.parametrize("slots", SLOTS)
def test_experts_are_alive_at_initialisation_at_the_published_width(slots, monkeypatch):
    monkeypatch.setattr(mixture_steel, "CHUNK", 64)
    monkeypatch.setattr(mixture_steel, "BLOCK", 2048)
    assert 1e-3 < gradient_ratio(FFN_type="softmoe_causal", causal_slots=slots) < 1e3


def test_the_published_mixture_is_dead_at_initialisation():
    assert gradient_ratio(FFN_type="softmoe_v3") < 1e-3


NOISE_WORDS = 32


def random_token_loss(steps, **changes):
    """Mean loss of the last 20 steps on i.i.d. uniform tokens, which nobody can predict: ln 32 = 3.466 is the floor."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": NOISE_WORDS, "num_hidden_layers": 3, "initializer_range": 0.05, "mlp_type": "raw"}
    model = SteelForCausalLM(SteelConfig(**(sizes | changes))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator, losses = torch.Generator().manual_seed(2), []
    for _ in range(steps):
        ids = torch.randint(0, NOISE_WORDS, (32, 33), generator=generator)
        loss = F.cross_entropy(model(ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@pytest.mark.parametrize("steps", [120, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("slots", SLOTS)
def test_random_tokens_stay_unpredictable(slots, steps, monkeypatch):
    monkeypatch.setattr(mixture_steel, "CHUNK", 16)
    monkeypatch.setattr(mixture_steel, "BLOCK", 64)
    assert random_token_loss(steps, causal_slots=slots) > math.log(NOISE_WORDS) - 0.02


@pytest.mark.slow
def test_the_published_mixture_predicts_random_tokens():
    """The control: it reads the answers."""
    assert random_token_loss(1500, FFN_type="softmoe_v3") < math.log(NOISE_WORDS) - 0.5


def test_sums_stay_exact_under_autocast_and_in_bf16():
    """Against fp32, both stay within a few roundings of bf16 (2^-9) of the largest output."""
    for slots in SLOTS:
        mixture = tiny(slots).model.layers[0].mlp
        x = torch.randn(1, TOKENS, 64)
        exact = mixture(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = mixture(x)
        cast.sum().backward()
        narrow = mixture.bfloat16()(x.bfloat16())
        for found in (cast, narrow.float()):
            assert (found - exact).abs().max() < 0.03 * exact.abs().max()


def test_extreme_scales_stay_finite():
    for slots in SLOTS:
        mixture = tiny(slots).model.layers[0].mlp
        torch.nn.init.constant_(mixture.scale, 1e4)
        x = torch.randn(1, TOKENS, 64, requires_grad=True)
        mixture(x).pow(2).sum().backward()
        assert all(p.grad.isfinite().all() for p in (x, *mixture.parameters()))


# ---- rotary positions under bf16


def test_rotation_is_rounded_once_under_bf16():
    """RMS error against fp64 at most that of rounding the exact result; a rotation in bf16 has half as much again."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 4, 2048, 56, generator=generator).bfloat16()
    cos, sin = rotary_tables(torch.arange(2048)[None], 56, 1e6)
    wide = x.double()
    first, second = wide.chunk(2, dim=-1)
    exact = wide * cos.double() + torch.cat((-second, first), dim=-1) * sin.double()
    ours = (_rotate(x, cos, sin).double() - exact).pow(2).mean().sqrt().item()
    rounding = (exact.bfloat16().double() - exact).pow(2).mean().sqrt().item()
    first, second = x.chunk(2, dim=-1)
    narrow = x * cos.bfloat16() + torch.cat((-second, first), dim=-1) * sin.bfloat16()
    assert ours <= 1.01 * rounding
    assert ours < 1.8e-3  # the fact page: 1.6e-3 for fp32 and one rounding, 2.4e-3 in bf16
    assert (narrow.double() - exact).pow(2).mean().sqrt().item() > 1.3 * ours


# ---- sizes, configuration, export


def test_the_recipe_has_the_published_size():
    model = load_recipe("steel-1b-causal").model
    counts = parameters(build_config(model))
    assert (counts.total, counts.tensors) == (1_122_987_282, 579)
    # As the recipe's comment says, prefix slots have the published tensors, name for name and shape for shape.
    fields = model.config | {"causal_slots": "prefix", "mlp_div_ratio": 4, "n_experts": 6}
    published = load_recipe("steel-1b").model
    with torch.device("meta"):
        ours, theirs = (SteelForCausalLM(build_config(m)).state_dict() for m in (Model("steel", fields), published))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("FFN_type", "softmoe_v9"), ("causal_slots", "future"), ("segment_length", 0), ("slots_per_expert", 0),
        ("n_experts", 0), ("segment_length", 2.5), ("hidden_size", 66),
    ],
)  # fmt: skip
def test_impossible_configurations_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SteelConfig(**(SIZES | {field: value}))


def test_the_modelling_file_names_every_file_that_it_needs():
    """transformers 4 copies what it imports, and not what those import in turn."""
    named = set(get_relative_imports(modeling_steel.__file__))
    for file in named:
        assert set(get_relative_imports(Path(modeling_steel.__file__).with_name(f"{file}.py"))) <= named


LOADER = """
import sys, torch
sys.modules["megatron_steel"] = None   # from here on it cannot be imported, however it was installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
ids = torch.load(sys.argv[1] + "/ids.pt")
with torch.no_grad():
    torch.save((model(ids).logits, model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)), sys.argv[1] + "/out.pt")
model.save_pretrained(sys.argv[1] + "/again")
"""


@pytest.mark.parametrize("slots", SLOTS)
def test_export_loads_in_a_fresh_process_without_this_package(tmp_path, slots):
    model, ids = tiny(slots), some_ids(tokens=9)
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADER, str(tmp_path)], env=home, cwd=tmp_path, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logits, written = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        # the shipped constants cut other chunks than this test does
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(written, model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0))
    assert all((tmp_path / "again" / name).is_file() for name in ("mixture_steel.py", "experts_steel.py"))


@pytest.mark.parametrize("ffn", ["raw", "prefix", "lagged"])
@torch.no_grad()
def test_a_static_cache_decodes_what_a_full_pass_computes(ffn):
    from transformers import StaticCache

    model, ids = (tiny("prefix", FFN_type="raw") if ffn == "raw" else tiny(ffn)), some_ids()
    cache, parts = StaticCache(config=model.config, max_cache_len=TOKENS + 9), []
    for t in range(TOKENS):
        parts.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_attention_can_be_changed_afterwards():
    model, ids = tiny("lagged"), some_ids()
    before = model(ids).logits
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
