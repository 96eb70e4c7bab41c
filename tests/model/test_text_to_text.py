"""T5 in the form in which it is trained equals transformers' own, and what it cannot have is refused by name."""

import copy

import pytest
import torch
import transformers.models.t5.modeling_t5 as t5

from megatron_steel.audit import quick_audit
from megatron_steel.errors import SteelError
from megatron_steel.model.attention import Attention, choose_attention
from megatron_steel.model.build import build_config, build_model, prepare_for_training
from megatron_steel.model.flops import flops_per_token
from megatron_steel.model.kernels import Choice, choose
from megatron_steel.model.memory import activation_bytes_per_sample
from megatron_steel.model.parts import attentions, decoder_layers, feed_forwards
from megatron_steel.model.training import as_shipped
from megatron_steel.recipe import Kernels, Model

SIZES = {"vocab_size": 96, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return build_model(build_config(Model("t5", SIZES)), seed=1)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(2)
    ids, labels = (torch.randint(3, 96, (3, n), generator=generator) for n in (9, 7))
    mask = torch.ones_like(ids)
    mask[0, 5:], labels[1, 4:] = 0, -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def _own_loss(model, batch):
    model.train()
    loss = model(**batch).loss * (batch["labels"] != -100).sum()
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("head", "checkpointing"), [("chunked", False), ("plain", True)])
def test_the_summed_loss_and_its_gradients_are_the_class_s_own(model, batch, head, checkpointing):
    expected, gradients = _own_loss(copy.deepcopy(model), batch)
    trained = prepare_for_training(copy.deepcopy(model), checkpointing, Choice(head=head))
    loss = trained(**batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for p, wanted in zip(trained.parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, wanted, atol=2e-6 * float(wanted.abs().max() + 1))
    assert as_shipped(trained)(**batch).loss.item() == pytest.approx(expected / (batch["labels"] != -100).sum().item())


def test_padding_says_nothing(model, batch):
    trained = prepare_for_training(copy.deepcopy(model))
    pad = torch.nn.functional.pad
    wider = {name: pad(x, (0, 23), value=-100 if name == "labels" else 0) for name, x in batch.items()}
    assert trained(**wider).item() == pytest.approx(trained(**batch).item(), rel=1e-6)


def test_a_row_that_only_fills_up_counts_nothing_and_gives_no_nan(model, batch):
    trained = prepare_for_training(copy.deepcopy(model))
    filled = {
        name: torch.cat([x, torch.full_like(x[:1], -100 if name == "labels" else 0)]) for name, x in batch.items()
    }
    filled["attention_mask"][-1, 0] = 1
    loss = trained(**filled)
    loss.backward()
    assert loss.item() == pytest.approx(trained(**batch).item(), rel=1e-6)
    assert all(p.grad.isfinite().all() for p in trained.parameters())


def test_initial_weights_are_t5_s_own(model):
    assert model.shared.weight.std().item() == pytest.approx(1.0, rel=0.05)
    query = model.decoder.block[0].layer[1].EncDecAttention.q.weight
    assert query.std().item() == pytest.approx((32 * 8) ** -0.5, rel=0.1)
    assert model.lm_head.weight is model.shared.weight
    assert model.config.decoder_start_token_id == model.config.pad_token_id == 0


def test_the_decoder_is_audited_and_a_leak_is_found(model, monkeypatch):
    assert quick_audit(model)["verdict"] == "causal: yes"

    def everything(inputs_embeds, **_):
        B, T = inputs_embeds.shape[:2]
        return torch.ones(B, 1, T, T, dtype=torch.bool)

    monkeypatch.setattr(t5, "create_causal_mask", everything)
    report = quick_audit(model)
    assert report["causal"] is False
    assert report["verdict"] == "NOT CAUSAL: T5LayerSelfAttention in layers 0-1 reads later tokens"


def test_the_parts_are_the_decoder_s(model):
    layers = decoder_layers(model)
    assert [name for name, _ in layers] == ["decoder.block.0", "decoder.block.1"]
    assert [type(part).__name__ for part in feed_forwards(layers[0][1])] == ["T5DenseActDense"]
    assert len(attentions(layers[0][1])) == 2


def test_what_it_cannot_have_is_refused_by_name(model):
    with pytest.raises(SteelError, match="pairs come in many lengths"):
        choose(Kernels(compile=True), model, CPU)
    with pytest.raises(SteelError, match="one in a row"):
        choose(Kernels(), model, CPU, documents=True)
    with pytest.raises(SteelError, match="a bias on the scores"):
        choose_attention("flash", model, CPU, False, torch.bfloat16)
    assert choose(Kernels(), model, CPU).attention == Attention()
    assert flops_per_token(model.config, 32) is None


def test_estimated_activations_are_within_a_quarter_of_what_autograd_keeps():
    config = build_config(Model("t5", SIZES | {"d_model": 128, "d_ff": 384, "d_kv": 32, "num_layers": 4}))
    network, ids = prepare_for_training(build_model(config, seed=1)), torch.randint(3, 96, (2, 256))
    weights, kept = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    real = sum(size for size, _ in kept.values()) / 2
    assert activation_bytes_per_sample(config, 256, "fp32") == pytest.approx(real, rel=0.25)
