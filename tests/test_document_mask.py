"""`data.document_mask` from the file to the loss: a packed block is worth what its documents are worth alone."""

import numpy as np
import pytest
import torch

from megatron_steel.data.dataset import BlendedDataset
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.data.loader import Loader
from megatron_steel.data.segments import Member, plan
from megatron_steel.model.build import build_config, build_model, prepare_for_training
from megatron_steel.recipe import Model

L = 40
SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"n_experts": 3, "slots_per_expert": 2, "mlp_div_ratio": 2, "segment_length": 5}
MODELS = {
    "raw": ("steel", {"FFN_type": "raw"}),
    "softmoe_v1": ("steel", {"FFN_type": "softmoe_v1"} | EXPERTS),
    "causal, prefix": ("steel", {"FFN_type": "softmoe_causal", "causal_slots": "prefix"} | EXPERTS),
    "causal, lagged": ("steel", {"FFN_type": "softmoe_causal", "causal_slots": "lagged"} | EXPERTS),
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Three samples of documents of 0 to 19 tokens, as the trainer gets them."""
    prefix, generator = tmp_path_factory.mktemp("data") / "d", np.random.default_rng(4)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in generator.integers(0, 20, 60):
            writer.add_document(generator.integers(1, 101, length))
    data = IndexedDataset(prefix)
    dataset = BlendedDataset(plan(None, [Member("d", "dd", data.tokens)], L, 3, 9, 1), {"dd": data})
    with Loader(dataset, dataset.order, 3, 3, document_mask=True) as loader:
        (batch,) = loader.step()
    assert all(len(row.unique()) > 2 for row in batch["document_ids"])
    return batch


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_those_of_the_documents_alone(name, batch):
    """fp32; logits within 1e-5, the sum of losses within 2e-6 of itself, gradients within 1e-4 of the largest."""
    kind, fields = MODELS[name]
    model = prepare_for_training(build_model(build_config(Model(type=kind, config=SIZES | fields)), seed=3))
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], document_ids=batch["document_ids"])
        blind = model(input_ids=batch["input_ids"])
    loss = model(**batch)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    alone = torch.zeros(())
    for row in range(3):
        for document in batch["document_ids"][row].unique():
            inside = batch["document_ids"][row] == document
            ids, labels = batch["input_ids"][row, inside][None], batch["labels"][row, inside][None]
            logits = model(input_ids=ids)  # positions count from 0
            torch.testing.assert_close(packed[row, inside], logits[0].detach(), rtol=1e-5, atol=1e-5)
            alone = alone + model(input_ids=ids, labels=labels)
    torch.testing.assert_close(loss, alone, rtol=2e-6, atol=0)
    alone.backward()
    for key, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-4 * scale + 1e-7)
    assert not torch.allclose(packed, blind, atol=1e-3)  # without the mask they are others
