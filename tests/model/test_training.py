"""The training form of a model: its loss, its gradients and its document mask, for every class that takes the fast road."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from megatron_steel.errors import SteelError
from megatron_steel.model import training
from megatron_steel.model.attention import document_inputs
from megatron_steel.model.build import build_config, build_model
from megatron_steel.model.head import ChunkedHead
from megatron_steel.model.training import as_shipped, prepare_for_training
from megatron_steel.recipe import Model

GLU = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
FULL_HEADS = {name: value for name, value in GLU.items() if name != "num_key_value_heads"}
CLASSES = {
    "steel": (GLU, {"FFN_type": "raw"}),
    "steel-v1": (GLU, {"FFN_type": "softmoe_v1", "tie_word_embeddings": True}),
    "llama": (GLU, {}),
    "mistral": (GLU, {"sliding_window": None}),
    "qwen2": (GLU, {"tie_word_embeddings": True}),
    "qwen3": (GLU, {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": (GLU, {"pad_token_id": 0}),
    "olmo": (GLU, {}),
    "olmo2": (GLU, {}),
    "granite": (GLU, {"logits_scaling": 9.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}),
    "gemma3_text": (GLU, {"head_dim": 16, "final_logit_softcapping": 2.0}),
    "gpt_neox": (FULL_HEADS, {"hidden_dropout": 0.0}),
    "phi": (GLU, {}),  # its head has a bias
    "nanogpt": (
        {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
        {},
    ),
    "openelm": (
        {
            "vocab_size": 101,
            "model_dim": 32,
            "num_transformer_layers": 3,
            "head_dim": 4,
            "num_gqa_groups": 2,
            "ffn_dim_divisor": 16,
            "max_context_length": 64,
        },
        {},
    ),
    "gpt2": (
        {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
        {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
}


def make(name):
    sizes, rest = CLASSES[name]
    config = build_config(Model(type=name.removesuffix("-v1"), config=sizes | rest))
    model = build_model(config, seed=3)
    if name == "phi":
        torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(4))
    return model.train()


def batch():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 101, (3, 14), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 2:5] = -100
    return tokens[:, :-1], labels


def own_loss(model, ids, labels):
    """The sum of token losses from the class's own forward."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def grads(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_loss_and_gradients_equal_the_class_s_own(name):
    model = make(name)
    ids, labels = batch()
    names = list(model.state_dict())
    expected = own_loss(model, ids, labels)
    expected.backward()
    expected_grads, own_logits = grads(model), model(input_ids=ids).logits
    assert prepare_for_training(model) is model
    assert list(model.state_dict()) == names
    assert isinstance(model.get_output_embeddings(), ChunkedHead)
    loss = model(input_ids=ids, labels=labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    found = grads(model)
    assert found.keys() == expected_grads.keys()
    for key, grad in found.items():
        torch.testing.assert_close(
            grad, expected_grads[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert torch.equal(model(input_ids=ids), own_logits)
    assert torch.equal(as_shipped(model)(input_ids=ids).logits, own_logits)


def test_every_class_on_the_fast_road_is_tested():
    tested = {type(make(name)).__name__ for name in CLASSES}
    # The encoder-decoder takes other inputs: tests/model/test_text_to_text.py.
    assert tested | {"T5ForConditionalGeneration"} == set(training._HEADS)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"gemma3_text"}))
@torch.no_grad()
def test_packed_documents_equal_separate_ones(name):
    model = prepare_for_training(make(name).eval())
    ids, labels = batch()
    document_ids = torch.tensor([7] * 5 + [8] * 1 + [9] * 7).expand(3, -1)
    packed = model(input_ids=ids, document_ids=document_ids)
    separate = torch.cat([model(input_ids=piece) for piece in ids.split([5, 1, 7], dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)
    loss = model(input_ids=ids, labels=labels, document_ids=document_ids)
    pieces = zip(ids.split([5, 1, 7], dim=1), labels.split([5, 1, 7], dim=1), strict=True)
    torch.testing.assert_close(loss, sum(model(input_ids=i, labels=t) for i, t in pieces), rtol=2e-6, atol=0)
    assert not torch.allclose(packed, model(input_ids=ids), atol=1e-3)  # the mask does something


def test_document_inputs_written_out():
    inputs = document_inputs(torch.tensor([[4, 4, 5, 5, 5], [1, 2, 2, 2, 3]]))
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 0]]
    assert inputs["attention_mask"].shape == (2, 1, 5, 5)
    assert inputs["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1],
    ]  # fmt: skip


def test_without_documents_attention_gets_no_mask(monkeypatch):
    """A dense mask would cost the flash kernel, even where it says only "causal"."""
    masks = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        masks.append((attn_mask, is_causal))
        return sdpa(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ids, labels = batch()
    # transformers 4.57 looks for packed samples by itself and then always builds a mask for its own classes.
    old = int(transformers.__version__.split(".")[0]) < 5
    for name in ("steel", "nanogpt", "openelm") if old else ("steel", "llama", "qwen3", "nanogpt", "openelm"):
        prepare_for_training(make(name))(input_ids=ids, labels=labels)
    assert masks
    assert all(mask is None and causal for mask, causal in masks)


@pytest.mark.parametrize("name", ["steel", "llama", "gpt_neox", "nanogpt", "openelm"])
def test_activation_checkpointing_gives_equal_gradients(name):
    ids, labels = batch()
    results = []
    for checkpointing in (False, True):
        model = prepare_for_training(make(name), activation_checkpointing=checkpointing)
        loss = model(input_ids=ids, labels=labels)
        loss.backward()
        results.append((loss.detach(), grads(model)))
    assert torch.equal(results[0][0], results[1][0])
    for key, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][key], rtol=0, atol=1e-5)


def test_any_other_class_keeps_its_own_forward():
    config = build_config(Model(type="stablelm", config=GLU))
    model = build_model(config, seed=3).train()
    ids, labels = batch()
    expected = own_loss(model, ids, labels)
    loss = prepare_for_training(model)(input_ids=ids, labels=labels)
    assert not isinstance(model.get_output_embeddings(), ChunkedHead)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    with pytest.raises(SteelError, match="not proven to keep packed documents apart"):
        model(input_ids=ids, labels=labels, document_ids=torch.zeros_like(ids))


def test_a_model_that_mixes_the_whole_sequence_refuses_document_masks():
    config = build_config(Model(type="steel", config=GLU | {"FFN_type": "softmoe_v3"}))
    model = prepare_for_training(build_model(config, seed=3))
    ids, labels = batch()
    with pytest.raises(SteelError, match="also across documents"):
        model(input_ids=ids, labels=labels, document_ids=torch.zeros_like(ids))


def test_generate_works_again_as_shipped(tmp_path):
    model = make("steel").eval()
    ids, _ = batch()
    before = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    as_shipped(prepare_for_training(model))
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), before)
    model.save_pretrained(tmp_path)  # the swapped head is saved under the old name
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(again(ids).logits, model(ids).logits)
