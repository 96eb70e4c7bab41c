"""A pruned tokenizer gives the old pieces wherever they are kept, the same text everywhere, and refuses the rest."""

import json
import random
import shutil

import pytest

from megatron_steel import cli
from megatron_steel.data.prune_tokenizer import KEPT_IDS, prune_tokenizer
from megatron_steel.data.tokenize import tokenize
from megatron_steel.data.tokenizer import PROBES, load_tokenizer
from megatron_steel.data.train_tokenizer import train_tokenizer
from megatron_steel.errors import SteelError

SIZE, FEWER = 700, 600


def write_corpus(path, words, count=300):
    draw = random.Random(1)
    texts = ["".join(draw.choice(words) + draw.choice(["", " "]) for _ in range(60)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return texts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer for Chinese and English, pruned by data that holds Chinese alone."""
    folder = tmp_path_factory.mktemp("prune")
    chinese = ["钢铁", "是", "怎样", "炼成", "的", "，", "高炉", "温度"]
    write_corpus(folder / "all.jsonl", [*chinese, "the", "quick", "brown", "fox", "return", "def", "(", ")", "12"])
    texts = write_corpus(folder / "zh.jsonl", chinese)
    train_tokenizer([folder / "all.jsonl"], folder / "before", SIZE)
    tokenize([folder / "zh.jsonl"], folder / "before", folder / "zh", workers=1)
    share = prune_tokenizer(folder / "before", [folder / "zh"], FEWER, folder / "after")
    return folder, texts, share


def test_kept_pieces_stay_and_every_text_comes_back(made):
    folder, texts, share = made
    before, after = load_tokenizer(folder / "before"), load_tokenizer(folder / "after")
    kept = json.loads((folder / "after" / KEPT_IDS).read_text())
    assert after.vocab_size == len(kept) == FEWER
    assert share == 1.0
    new = {old: number for number, old in enumerate(kept)}
    assert after.eos_id == new[before.eos_id]
    shorter = 0
    for text in [*texts, *PROBES, "the quick brown fox returns", "<|im_start|>user\n钢铁<|im_end|>\n"]:
        (old,), (now,) = before.encode_batch([text]), after.encode_batch([text])
        if all(i in new for i in old):
            assert now == [new[i] for i in old]
        else:
            shorter += 1
        assert after.decode(now) == before.decode(old)
    assert shorter  # some English piece has gone


def test_the_same_data_tokenized_again_has_the_same_lengths(made, tmp_path):
    folder, _, _ = made
    again = tokenize([folder / "zh.jsonl"], folder / "after", tmp_path / "zh", workers=1)
    assert again.tokens == tokenize([folder / "zh.jsonl"], folder / "before", tmp_path / "old", workers=1).tokens


def test_the_chat_template_goes_along(made):
    from transformers import AutoTokenizer

    folder, _, _ = made
    chat = [{"role": "user", "content": "钢铁"}]
    before, after = (AutoTokenizer.from_pretrained(folder / name) for name in ("before", "after"))
    assert before.apply_chat_template(chat, tokenize=False) == after.apply_chat_template(chat, tokenize=False)
    assert after.convert_tokens_to_ids("<|im_start|>") < FEWER


@pytest.mark.parametrize(
    ("size", "said"), [(SIZE, "choose a size between"), (200, "the bytes and added tokens alone are")]
)
def test_impossible_sizes(made, tmp_path, size, said):
    folder, _, _ = made
    with pytest.raises(SteelError, match=said):
        prune_tokenizer(folder / "before", [folder / "zh"], size, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_data_of_another_tokenizer_and_an_existing_output_are_refused(made, tmp_path, capsys):
    folder, _, _ = made
    tokenize([folder / "zh.jsonl"], folder / "after", tmp_path / "other", workers=1)
    arguments = ["prune-tokenizer", str(folder / "before"), "--data", str(tmp_path / "other"), "--vocab-size"]
    assert cli.main([*arguments, str(FEWER), "--output", str(tmp_path / "x")]) == 78
    assert cli.main([*arguments, str(FEWER), "--output", str(folder / "after")]) == 78
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_without_merges_is_refused(made, tmp_path):
    folder, _, _ = made
    shutil.copytree(folder / "before", tmp_path / "words")
    path = tmp_path / "words" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"] = {"type": "WordLevel", "vocab": tree["model"]["vocab"], "unk_token": "<unk>"}
    path.write_text(json.dumps(tree))
    with pytest.raises(SteelError, match="its kind is WordLevel"):
        prune_tokenizer(tmp_path / "words", [folder / "zh"], FEWER, tmp_path / "x")


@pytest.mark.shared
def test_qwen(shared_data, tmp_path):
    qwen, sample = shared_data / "qwen_tokenizer", shared_data / "steel_samples/sky/2021-31_zh_head_0000_sample.jsonl"
    tokenize([sample], qwen, tmp_path / "sky", workers=1)
    share = prune_tokenizer(qwen, [tmp_path / "sky"], 12_000, tmp_path / "small")
    small = load_tokenizer(tmp_path / "small")
    assert small.vocab_size == 12_000
    assert 0.96 < share < 1
    assert small.decode([small.eos_id]) == "<|im_end|>"
