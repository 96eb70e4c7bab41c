"""Training goes on from exactly the imported weights, and its first validation loss is the source's, computed by hand."""

import json

import numpy as np
import pytest
import torch
from conftest import VOCABULARY
from published_models import as_bin, tensors, write_model
from safetensors.torch import load_file

from megatron_steel import cli
from megatron_steel.convert.import_hf import import_hf
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.preflight import plan_run, validation_batches_of
from megatron_steel.recipe import load_recipe


@pytest.fixture(scope="module")
def fewer_words(tmp_path_factory, tiny_tokenizer):
    """The tiny tokenizer with every second of its last words and in another order, and the old id of each new one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kept = [0, 1, 2, *range(VOCABULARY - 1, 60, -1), *range(3, 61, 2)]
    old = json.loads((tiny_tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    by_id = {number: word for word, number in old.items()}
    inner = Tokenizer(models.WordLevel({by_id[o]: n for n, o in enumerate(kept)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("fewer")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder, kept


def renumbered(data, kept, folder):
    """Both data sets without the words that are gone, in new ids."""
    new = {old: number for number, old in enumerate(kept)}
    for name in ("train", "validation"):
        with IndexedDataset(data / name) as read, IndexedWriter(folder / name, np.uint16) as write:
            for number in range(read.documents):
                write.add_document(np.array([new[i] for i in read.document(number).tolist() if i in new], np.uint16))


@torch.no_grad()
def loss_by_hand(model, recipe, old_ids):
    """The mean cross-entropy of the source over the run's validation blocks, over the words that are left."""
    total = count = 0
    (batches,) = validation_batches_of(recipe, plan_run(recipe)).values()
    for batch in batches():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            if (labels == -100).all():  # fills a batch
                continue
            assert torch.equal(ids[1:], labels[:-1])
            logits = model(input_ids=old_ids[ids][None], use_cache=False).logits[0][:, old_ids]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    return total / count


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", [0, -1]), pytest.param("steel", [0, 2], marks=pytest.mark.slow)]
)
def test_training_starts_from_these_weights(
    family, layers, fewer_words, tiny_tokenizer, tiny_data, tiny_recipe, metrics, tmp_path
):
    tokenizer, kept = fewer_words
    model = write_model(tmp_path / "in", family, VOCABULARY, torch.bfloat16, tokenizer=tiny_tokenizer)
    if family == "llama":
        as_bin(tmp_path / "in", 2)
    import_hf(tmp_path / "in", tmp_path / "out", tokenizer=tokenizer, layers=layers)
    renumbered(tiny_data, kept, tmp_path)
    settings = [f"run.dir={tmp_path / 'run'}", f"tokenizer.path={tokenizer}", f"model.path={tmp_path / 'out'}",
                f"model.init_from={tmp_path / 'out'}", f"data.train={tmp_path / 'train'}",
                f"data.validation={tmp_path / 'validation'}", "train.eval_samples=10000", "train.steps=1", "optim.lr=1e-30",
                "train.eval_every_steps=1"]  # fmt: skip
    assert cli.main(["pretrain", str(tiny_recipe), *settings]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "again"), "--dtype", "float32"]) == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    started = tensors(tmp_path / "out")
    assert again.keys() == started.keys()
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in started.items())
    source = model.float()
    source.model.layers = torch.nn.ModuleList(source.model.layers[i] for i in layers)
    expected = loss_by_hand(source, load_recipe(str(tiny_recipe), settings), torch.tensor(kept))
    assert abs(metrics(tmp_path / "run")[1]["validation_loss"] - expected) <= 1e-5


def test_an_import_is_imported_again_byte_for_byte(fewer_words, tiny_tokenizer, tmp_path):
    write_model(tmp_path / "in", "qwen2", VOCABULARY, torch.bfloat16, tokenizer=tiny_tokenizer)
    import_hf(tmp_path / "in", tmp_path / "out", tokenizer=fewer_words[0], vocab_size=112, layers=[3, 3])
    import_hf(tmp_path / "out", tmp_path / "again")
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "again").iterdir())
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
