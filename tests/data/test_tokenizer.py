"""Trained folders against sentencepiece itself; loading; every refusal."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_steel
from megatron_steel import cli
from megatron_steel.data import tokenizer as room
from megatron_steel.data.tokenizer import PROBES, load_tokenizer
from megatron_steel.data.train_tokenizer import train_tokenizer
from megatron_steel.errors import SteelError

SIZE = 700
CHAT = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi"}]


def corpus(path: Path) -> Path:
    words = ["钢铁", "是", "怎样", "炼成", "的", "，", "。", "the", "quick", "brown", "fox", "return", "def", "self", ".",
             "(", ")", ":", "12", "345", "import", "\n    ", "\t", "<|im_end|>", "<unk>"]  # fmt: skip
    draw = random.Random(3)
    texts = ["".join(draw.choice(words) + draw.choice(["", " "]) for _ in range(60)) for _ in range(300)]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer([corpus(folder / "c.jsonl")], folder / "t", SIZE)
    return folder / "t"


def test_characters_per_token_on_text_that_was_not_trained_on(trained, tmp_path):
    """Every 100th document is held out: the same tokenizer comes from a corpus without them."""
    rows = corpus(tmp_path / "c.jsonl").read_text("utf-8").splitlines(keepends=True)
    held_out = [json.loads(row)["text"] for row in rows[99::100]]
    found = train_tokenizer([tmp_path / "c.jsonl"], tmp_path / "new", SIZE, compare=[trained])
    ids = load_tokenizer(trained).encode_batch(held_out)
    figure = sum(map(len, held_out)) / sum(map(len, ids))
    assert found == {str(tmp_path / "new"): figure, str(trained): figure}
    rows[99::100] = ['{"text": "完全另外的话 zzz"}\n'] * 3
    (tmp_path / "other.jsonl").write_text("".join(rows), "utf-8")
    train_tokenizer([tmp_path / "other.jsonl"], tmp_path / "other", SIZE)
    assert (tmp_path / "other/tokenizer.json").read_bytes() == (tmp_path / "new/tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def pair(trained):
    return load_tokenizer(trained), sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))


@pytest.mark.parametrize("text", PROBES)
def test_ids_are_sentencepieces_and_decode_back(pair, text):
    ours, theirs = pair
    (ids,) = ours.encode_batch([text])
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text


@settings(max_examples=600, deadline=None)
@given(
    st.text(
        st.one_of(st.sampled_from("钢铁怎样炼成的 ，。thequickbrownfox\n\t  12345():"), st.characters(codec="utf-8"))
    )
)
def test_any_text_survives(pair, text):
    for special in ("\u2581", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<unk>"):  # what the two read differently
        text = text.replace(special, "")
    ours, theirs = pair
    (ids,) = ours.encode_batch([text])
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text


def test_the_size_asked_for_is_the_size_got(trained, pair):
    ours, theirs = pair
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(trained)
    assert len(hf) == ours.vocab_size == theirs.get_piece_size() == SIZE
    assert (hf.eos_token, hf.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert hf.eos_token_id == ours.eos_id == theirs.eos_id()


def test_control_tokens_in_the_text_are_not_learned(pair):
    pieces = [pair[1].id_to_piece(i) for i in range(SIZE)]
    assert not [piece for piece in pieces[4:] if "im_" in piece or "unk" in piece]


def test_chat_template(trained):
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(trained)
    text = hf.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = hf(text, add_special_tokens=False)["input_ids"]
    assert ids.count(hf.eos_token_id) == 3
    assert ids.count(hf.convert_tokens_to_ids("<|im_start|>")) == 4
    assert hf.decode(ids) == text


def test_the_folder_needs_no_sentencepiece(trained, pair):
    code = (
        "import sys; sys.modules['sentencepiece'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"print(AutoTokenizer.from_pretrained({str(trained)!r})({PROBES[0]!r})['input_ids'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pair[1].encode(PROBES[0])


def test_same_input_same_bytes(trained, tmp_path):
    train_tokenizer([corpus(tmp_path / "other.jsonl")], tmp_path / "t", SIZE)
    assert {p.name for p in trained.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    for path in trained.iterdir():
        assert (tmp_path / "t" / path.name).read_bytes() == path.read_bytes()


def test_too_large_a_vocabulary_names_the_largest(tmp_path):
    source = corpus(tmp_path / "c.jsonl")
    with pytest.raises(SteelError, match=r"too small for a vocabulary of 50000: the largest possible is \d+") as caught:
        train_tokenizer([source], tmp_path / "t", 50000)
    largest = int(caught.value.what.split()[-1])
    assert not (tmp_path / "t").exists()
    train_tokenizer([source], tmp_path / "t", largest)
    assert load_tokenizer(tmp_path / "t").vocab_size == largest


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(
        SteelError, match=r"cannot hold the characters of the text: the smallest possible is (\d+)"
    ) as e:
        train_tokenizer([corpus(tmp_path / "c.jsonl")], tmp_path / "t", 261)
    smallest = int(e.value.what.split()[-1])
    train_tokenizer([tmp_path / "c.jsonl"], tmp_path / "t", smallest)
    assert load_tokenizer(tmp_path / "t").vocab_size == smallest


def test_no_text_and_foreign_folders_are_refused(tmp_path):
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(SteelError, match="no text to train"):
        train_tokenizer([tmp_path / "e.jsonl"], tmp_path / "t", SIZE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(SteelError, match="is no tokenizer folder"):
        train_tokenizer([corpus(tmp_path / "c.jsonl")], tmp_path / "mine", SIZE)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_only_what_a_training_wrote_is_replaced(tmp_path, trained):
    source = corpus(tmp_path / "c.jsonl")
    shutil.copytree(trained, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(SteelError, match=r"is no tokenizer folder: it holds model\.safetensors"):
        train_tokenizer([source], tmp_path / "model", SIZE)
    assert len(list((tmp_path / "model").iterdir())) == 4
    (tmp_path / "model" / "model.safetensors").unlink()
    train_tokenizer([source], tmp_path / "model", SIZE + 1)
    assert load_tokenizer(tmp_path / "model").vocab_size == SIZE + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "model"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, trained, monkeypatch):
    shutil.copytree(trained, tmp_path / "t")
    replace = os.replace

    def full(source, target):
        if source.name == "new":
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no"):
        train_tokenizer([corpus(tmp_path / "c.jsonl")], tmp_path / "t", SIZE + 1)
    assert load_tokenizer(tmp_path / "t").vocab_size == SIZE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "t"]


def test_text_almost_without_spaces(tmp_path):
    source = Path(megatron_steel.__file__).parent / "samples" / "encyclopedia_zh.jsonl"
    train_tokenizer([source], tmp_path / "t", 3000)
    assert load_tokenizer(tmp_path / "t").vocab_size == 3000


@pytest.mark.parametrize("case", ["empty text", "this folder", "a vocabulary of a trillion", "a vocabulary of none"])
def test_bad_commands_exit_with_78(tmp_path, monkeypatch, case):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source, output, size = corpus(tmp_path / "c.jsonl"), "../t", SIZE
    if case == "empty text":
        source = tmp_path / "e.txt"
        source.touch()
    elif case == "this folder":
        output = "."
    else:
        size = 10**12 if case.endswith("trillion") else 0
    assert cli.main(["train-tokenizer", str(source), "--output", output, "--vocab-size", str(size)]) == 78
    assert not (tmp_path / "t").exists()
    assert (tmp_path / "here").is_dir()


def test_folder_and_model_have_one_fingerprint(trained, pair):
    ours, model = pair[0], load_tokenizer(trained / "tokenizer.model")
    assert ours.fingerprint == model.fingerprint
    assert (model.vocab_size, model.eos_id) == (ours.vocab_size, ours.eos_id)
    assert model.decode(model.encode_batch(["a b"])[0]) == "a b"


def test_a_wrong_fast_encoder_is_not_used(trained, pair, monkeypatch):
    monkeypatch.setattr(room, "_fast_encoders", lambda hf: [lambda texts: [[1]] * len(texts)])
    assert load_tokenizer(trained).encode_batch(["钢铁"]) == pair[0].encode_batch(["钢铁"])


def test_refusals(tmp_path, trained):
    with pytest.raises(SteelError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(SteelError, match="transformers cannot load"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(SteelError, match="sentencepiece cannot load"):
        load_tokenizer(tmp_path / "bad.model")
    config = json.loads((trained / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    with pytest.raises(SteelError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


@pytest.mark.shared
def test_qwen(shared_data):
    qwen = load_tokenizer(shared_data / "qwen_tokenizer")
    assert (qwen.vocab_size, qwen.eos_id, qwen.name) == (151646, 151645, "qwen_tokenizer")
    assert qwen.decode(qwen.encode_batch(["钢铁 steel"])[0]) == "钢铁 steel"
