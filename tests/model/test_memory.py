"""The activation estimate against what autograd really keeps, and the micro-batch that it names."""

import pytest
import torch

from megatron_steel.model.build import build_config, build_model, prepare_for_training
from megatron_steel.model.memory import activation_bytes_per_sample, head_bytes, largest_micro_batch
from megatron_steel.recipe import Model

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip


def kept_bytes(model, ids) -> int:
    """Bytes of all distinct storages that autograd saves, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids)
    assert loss.isfinite()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("kind", ["raw", "softmoe_v1", "softmoe_v3", "llama", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_estimate_is_within_a_quarter_of_what_autograd_keeps(kind, precision):
    model = Model(kind, SIZES) if kind in ("llama", "qwen3") else Model("steel", SIZES | {"FFN_type": kind})
    config = build_config(model)
    ids = torch.randint(0, 64, (2, 256))
    real = {}
    for checkpointing in (False, True):
        network = prepare_for_training(build_model(config, seed=1), checkpointing).train()
        network.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        real[checkpointing] = kept_bytes(network, ids) / len(ids)
    assert activation_bytes_per_sample(config, 256, precision) == pytest.approx(real[False], rel=0.25)
    one_layer_again = real[False] / 4
    estimate = activation_bytes_per_sample(config, 256, precision, checkpointing=True)
    assert estimate == pytest.approx(real[True] + one_layer_again, rel=0.25)


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    config = build_config(Model("llama", SIZES))
    free = 50_000_000
    fits = largest_micro_batch(config, 256, free)

    def need(batch):
        return batch * activation_bytes_per_sample(config, 256) + head_bytes(config, batch * 256)

    assert need(fits) <= free < need(fits + 1)
    assert largest_micro_batch(config, 256, 1000) == 0
    assert largest_micro_batch(config, 256, free, checkpointing=True) > fits
    assert largest_micro_batch(config, 256, free, precision="fp32") < fits
