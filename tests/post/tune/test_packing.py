"""Packed conversations do not see each other: loss and gradient are those of each alone; and adapters reach what they claim."""

import copy
from itertools import chain

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_tuning import FFNS, sums, write_rows, write_tiny
from transformers import AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from megatron_steel.errors import SteelError
from megatron_steel.post.load import load_as
from megatron_steel.post.tune import lora
from megatron_steel.post.tune.batches import Collator, keep_apart, pack
from megatron_steel.post.tune.mask import Supervision
from megatron_steel.post.tune.tokens import write_tokens


def _kinds(*default):
    """Every kind of model, the others with the slow tests."""
    kinds = ["llama", *FFNS]
    return [pytest.param(kind, marks=[] if kind in default else pytest.mark.slow) for kind in kinds]


def tokens(folder, tmp_path, count=14):
    """The rows of `sums` as a data set of ids and labels."""
    supervision = Supervision(AutoTokenizer.from_pretrained(folder), folder)
    source = write_rows(tmp_path / "r.jsonl", sums(count))
    write_tokens(tmp_path / "t.arrow", source, "sft", supervision, 512, packing=False)
    return Dataset.from_file(str(tmp_path / "t.arrow"))


def loss_and_gradient(model, batches):
    """The sum of the losses of all supervised tokens, as TRL computes them, and its gradient."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = -model(**batch, use_cache=False, fused_lm_head=True).log_probs.sum()
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [kind for kind in _kinds("llama", "prefix") if "v3" not in kind.values])
def test_packed_is_as_good_as_alone(kind, tmp_path):
    folder = write_tiny(tmp_path / "model", kind)
    model, tokenizer = load_as(folder, False, torch.float32)
    rows = tokens(folder, tmp_path)
    packed = pack(rows, 256)
    assert len(packed) < len(rows) / 2
    assert sorted(chain(*packed["input_ids"])) == sorted(chain(*rows["input_ids"]))
    collate = Collator(tokenizer.pad_token_id)
    together = [collate(list(packed)[i : i + 2]) for i in range(0, len(packed), 2)]
    keep_apart(model.train())
    add_fused_lm_head(model, outputs=("log_probs",))
    alone = loss_and_gradient(model, [collate([row]) for row in rows])
    both = loss_and_gradient(model, together)
    assert both[0] == pytest.approx(alone[0], rel=1e-5)
    for name, gradient in alone[1].items():
        scale = float(gradient.abs().max())
        assert torch.allclose(both[1][name], gradient, rtol=0, atol=1e-5 * max(scale, 1e-3)), name
    # And it is the mask that does it: without the numbers of the conversations they see each other.
    blind = [{key: value for key, value in batch.items() if key != "document_ids"} for batch in together]
    assert loss_and_gradient(model, blind)[0] != pytest.approx(alone[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "lagged"])
def test_a_padded_batch_is_as_good_as_its_rows(kind, tmp_path):
    folder = write_tiny(tmp_path / "model", kind)
    model, tokenizer = load_as(folder, False, torch.float32)
    rows, collate = list(tokens(folder, tmp_path, 6)), Collator(tokenizer.pad_token_id)
    add_fused_lm_head(model.train(), outputs=("log_probs",))
    alone, both = (loss_and_gradient(model, batches) for batches in ([collate([row]) for row in rows], [collate(rows)]))
    assert both[0] == pytest.approx(alone[0], rel=1e-5)


def test_a_model_that_sees_the_future_cannot_pack(tmp_path):
    model, _ = load_as(write_tiny(tmp_path / "model", "v3"), False, torch.float32)
    with pytest.raises(SteelError, match="mixes all tokens of a sample") as caught:
        keep_apart(model)
    assert caught.value.where == "--packing"


@pytest.mark.parametrize("kind", _kinds("dense", "lagged"))
def test_adapters_are_used_and_merge(kind, tmp_path):
    """Every adapter gets a gradient; a layer that is read without being called has none; joined, the model is the same."""
    folder = write_tiny(tmp_path / "model", kind)
    model, _ = load_as(folder, False, torch.float32)
    ids = torch.arange(24)[None] + 5
    plain, names = copy.deepcopy(model), [name for name, _ in model.named_parameters()]
    # What would be reached if every linear layer had an adapter; those that get no gradient are not used.
    all_linears = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(lora.linears(model)))
    everywhere = get_peft_model(copy.deepcopy(model), all_linears)
    everywhere(input_ids=ids, labels=ids).loss.backward()
    used = {name.removeprefix("base_model.model.").partition(".lora_B")[0]
            for name, p in everywhere.named_parameters() if "lora_B" in name and p.grad is not None}  # fmt: skip
    assert used == set(lora.targets(model))
    assert (used < set(lora.linears(model))) == (kind in ("v1", "prefix", "lagged", "v3"))
    adapted = get_peft_model(model, lora.config(model, {"r": 2, "lora_alpha": 4}))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    expected = adapted(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    merged = lora.merge(plain, tmp_path / "adapter")
    assert [name for name, _ in merged.named_parameters()] == names
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
