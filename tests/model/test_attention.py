"""Documents in one sample, told to each kind of attention; and torch's back ends, laid around passes that need them."""

import pytest
import torch
import torch.nn.functional as F
from test_training import CLASSES, batch, grads, make
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_steel.model.attention import Attention, document_blocks, document_inputs
from megatron_steel.model.kernels import Choice
from megatron_steel.model.training import as_shipped, prepare_for_training

PIECES = [5, 1, 7]
DOCUMENTS = torch.tensor([7] * 5 + [8] * 1 + [9] * 7).expand(3, -1)
PACKABLE = sorted(set(CLASSES) - {"gemma3_text"})


@pytest.mark.parametrize("shape", [(2, 40), (3, 300), (2, 512), (1, 129)])
@pytest.mark.parametrize("share", [0.3, 0.02, 0.004])
def test_the_block_mask_is_the_one_of_all_pairs(shape, share):
    begins = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    begins[:, 0] = True
    run = begins.cumsum(1)
    theirs = create_block_mask(
        lambda b, h, q, kv: (q >= kv) & (run[b, q] == run[b, kv]), shape[0], None, shape[1], shape[1], device="cpu"
    )
    mine = document_blocks(begins)
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    for side in ("kv", "full_kv", "q", "full_q"):  # the last two are what the backward pass reads
        count, expected = getattr(mine, f"{side}_num_blocks"), getattr(theirs, f"{side}_num_blocks")
        assert torch.equal(count, expected)
        a, b = getattr(mine, f"{side}_indices"), getattr(theirs, f"{side}_indices")
        listed = torch.arange(a.shape[-1]) < count[..., None]
        assert torch.equal(a[listed], b[listed])


def test_document_lengths_written_out():
    inputs = document_inputs(torch.tensor([[4, 4, 5, 5, 5], [5, 2, 2, 2, 3]]), "flash_attention_2")
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 2, 5, 6, 9, 10]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["max_length_q"] == inputs["max_length_k"] == 5
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 0]]
    assert "attention_mask" not in inputs


def packed_and_separate(model):
    ids, _ = batch()
    packed = model(input_ids=ids, document_ids=DOCUMENTS)
    separate = torch.cat([model(input_ids=piece) for piece in ids.split(PIECES, dim=1)], dim=1)
    assert not torch.allclose(packed, model(input_ids=ids), atol=1e-3)  # the documents do something
    return packed, separate


@pytest.mark.parametrize("name", [name for name in PACKABLE if name != "gpt2"])
@torch.no_grad()
def test_packed_documents_equal_separate_ones_through_flex_attention(name):
    """Its plain form: on a CPU it has no backward pass, and compiled it is tested on a GPU."""
    model = make(name).eval()
    shipped = model.config._attn_implementation
    prepare_for_training(model, kernels=Choice(attention=Attention("flex_attention"))).eval()
    with torch.compiler.set_stance("force_eager"):
        packed, separate = packed_and_separate(model)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)
    assert as_shipped(model).config._attn_implementation == shipped


def by_lengths(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **named):
    """What flash-attn's varlen function computes, in plain torch."""
    assert attention_mask is None
    assert named["max_length_q"] >= int(named["cu_seq_lens_q"].diff().max())
    B, _, T, _ = query.shape
    one, rest = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key)), value.transpose(0, 1).flatten(1, 2)[None]
    query, key = one
    lengths = named["cu_seq_lens_q"].diff().tolist()
    pieces = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, rest)), strict=True)
    ]
    return torch.cat(pieces, dim=2)[0].unflatten(1, (B, T)).permute(1, 2, 0, 3), None


@pytest.mark.parametrize("name", PACKABLE)
@torch.no_grad()
def test_packed_documents_equal_separate_ones_through_their_lengths(name, monkeypatch):
    """Every class hands the lengths on to its attention; the kernel itself is tested on a GPU."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", by_lengths)
    model = make(name).eval()
    expected, _ = packed_and_separate(prepare_for_training(model).eval())
    as_shipped(model)
    prepare_for_training(model).eval()
    model.config._attn_implementation = "flash_attention_2"  # set_attn_implementation would look for the package
    kernels = Choice(attention=Attention("flash_attention_2"))
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    as_shipped(model)
    packed = prepare_for_training(model, kernels=kernels).eval()(input_ids=batch()[0], document_ids=DOCUMENTS)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["steel", "llama"])
def test_back_ends_hold_in_the_pass_and_in_what_is_computed_again(name, monkeypatch):
    seen, sdpa = [], F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ids, labels = batch()
    results = []
    for attention in (Attention(), Attention("sdpa", ("math",))):
        model = prepare_for_training(make(name), True, Choice(attention=attention))
        loss = model(input_ids=ids, labels=labels)
        loss.backward()
        results.append((loss.detach(), grads(model)))
    assert seen == [True] * 4 + [False] * 4  # two layers, forward and again
    assert torch.backends.cuda.flash_sdp_enabled()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    for key, grad in results[0][1].items():
        other = results[1][1][key]  # another kernel: as near as fp32 allows through two layers
        assert (grad - other).norm() <= 1e-5 * other.norm() + 1e-6
