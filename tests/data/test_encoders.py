"""The fast encoder against the tokenizer it stands in for; what happens where they differ."""

import json
import pickle
import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data import encoders
from megatron_steel.data.tokenizer import PROBES, load_tokenizer
from megatron_steel.errors import SteelError

gigatoken = pytest.mark.skipif(encoders.importlib.util.find_spec("gigatoken") is None, reason="no gigatoken here")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE folder with NFC and special strings, as Qwen's, of 600 pieces."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    inner.train_from_iterator([*PROBES, *encoders._MORE_PROBES[:1]] * 4, trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def pair(byte_level):
    return chosen(byte_level), load_tokenizer(byte_level)


def chosen(folder, documents=()):
    return encoders.choose(load_tokenizer(folder), str(folder), list(documents))


def listed(ids, lengths):
    ends = np.cumsum(lengths)
    return [ids[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]


@gigatoken
def test_gigatoken_is_chosen_and_gives_the_tokenizers_ids(byte_level):
    choice = chosen(byte_level, ["document <|im_end|>"]).choice
    assert choice.name == "gigatoken"
    texts = ["", *PROBES, *encoders._MORE_PROBES, ""]
    assert listed(*encoders.Encoder(pickle.loads(pickle.dumps(choice)))(texts)) == load_tokenizer(
        byte_level
    ).encode_batch(texts)


@gigatoken
@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(st.one_of(st.sampled_from("钢铁 e\u0301\u0323<|im_end|>\n\r\t'lLsS12(){}"), st.characters(codec="utf-8"))),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_any_texts(pair, texts):
    fast, plain = pair
    assert listed(*fast(texts)) == plain.encode_batch(texts)


@gigatoken
def test_its_memory_of_words_may_be_dropped_at_any_time(byte_level, monkeypatch):
    encoder = chosen(byte_level)
    before = listed(*encoder(list(PROBES)))
    monkeypatch.setattr(encoders, "_CACHE_BYTES", -(1 << 60))
    assert listed(*encoder(list(PROBES))) == before


def test_the_tokenizer_itself_where_gigatoken_cannot_read_it(tiny_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(encoders.log, "propagate", True)
    with caplog.at_level("INFO"):
        choice = chosen(tiny_tokenizer, ["w3"]).choice
    assert (choice.name, choice.path, choice.serialized) == ("transformers", str(tiny_tokenizer), "")
    assert "encoder: transformers (gigatoken is not used: " in caplog.text
    assert listed(*encoders.Encoder(choice)(["w3 w4", "", "w5"])) == [[3, 4], [], [5]]


@gigatoken
def test_one_other_id_in_the_first_documents_is_enough_to_refuse_it(byte_level, caplog, monkeypatch):
    monkeypatch.setattr(encoders.log, "propagate", True)
    whole = encoders._Gigatoken.__call__

    def wrong(self, texts):
        ids, lengths = whole(self, texts)
        if "the culprit" in texts:
            ids = ids.copy()
            ids[-1] += 1
        return ids, lengths

    monkeypatch.setattr(encoders._Gigatoken, "__call__", wrong)
    with caplog.at_level("INFO"):
        assert chosen(byte_level, ["fine", "the culprit"]).choice.name == "transformers"
        assert chosen(byte_level, ["fine"]).choice.name == "gigatoken"
    assert "first on 'the culprit'" in caplog.text


def test_without_gigatoken(byte_level, monkeypatch):
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    assert chosen(byte_level).choice.name == "transformers"


def test_special_strings(byte_level):
    encoder = chosen(byte_level)
    texts = ["", "a", "<|im_end|>", "x<|im_start|>y<|im_end|>", "<|im_end |>", "", "<|endoftext|><|endoftext|>"]
    assert encoder.special(*encoder(texts)) == 3


def test_an_id_beyond_the_vocabulary_is_refused(tiny_tokenizer):
    choice = chosen(tiny_tokenizer).choice
    small = encoders.Choice(choice.name, choice.path, "", 5, 1, ())
    with pytest.raises(SteelError, match="gives id 100, but its vocabulary ends at 4"):
        encoders.Encoder(small)(["w3 w100"])


def test_an_added_token_beyond_a_small_vocabulary_widens_the_dtype(tmp_path, tiny_tokenizer):
    from megatron_steel.data.tokenize import tokenize

    shutil.copytree(tiny_tokenizer, tmp_path / "t")
    tree = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 70_000, "content": "<far>"})
    tree["model"]["vocab"]["<far>"] = 70_000
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "a.jsonl").write_text('{"text": "w3 <far>"}\n')
    result = tokenize([tmp_path / "a.jsonl"], tmp_path / "t", tmp_path / "out", workers=1)
    assert (result.dtype, result.max_token_id, result.tokenizer["vocab_size"]) == ("int32", 70_000, 70_001)


SURROUNDINGS = (
    "a{0}b {0}x {0}'s {0}’a '{0} '{0}e 'r{0} 'l{0} {0}{0} 1{0}2 é{0}\u0301{0}\u0323 o\u0302{0}\u0323\u0327e\u0345\u0301{0} .{0}!"
    "{0}\n{0}\r\n 中{0}文\t{0}  {0}\u3000{0}\u094d{0}\u200d{0}  {0}  {0}\n\n{0}\u1100\u1161{0}\u11a8{0}\u05b0{0}"
)


@pytest.fixture(scope="module")
def qwen(shared_data):
    encoder = chosen(shared_data / "qwen_tokenizer")
    assert encoder.choice.name == "gigatoken"
    return encoder, load_tokenizer(shared_data / "qwen_tokenizer")


@pytest.mark.shared
@gigatoken
@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_settled_character_has_the_tokenizers_ids_in_any_surroundings(qwen, step):
    encoder, tokenizer = qwen
    settled = [chr(c) for first, last in encoders._SETTLED for c in range(first, last + 1)][::step]
    wrong = []
    for i in range(0, len(settled), 2000):
        some = settled[i : i + 2000]
        texts = [SURROUNDINGS.format(c) for c in some]
        found = listed(*encoder._encode._fast(texts))  # gigatoken's own
        wrong += [c for c, a, b in zip(some, found, tokenizer.encode_batch(texts), strict=True) if a != b]
    assert wrong == []


def test_the_settled_characters_and_no_others():
    inside = {c for first, last in encoders._SETTLED for c in range(first, last + 1)}
    assert sum(last - first + 1 for first, last in encoders._SETTLED) == len(inside) > 100_000
    assert all((encoders._UNSETTLED.search(chr(c)) is None) == (c in inside) for c in range(0x110000))
    assert not inside & {0x09FE, 0x0C3C, 0x0D3B, 0x0EBA, 0x08CA, 0x10EC7}  # newer than the tokenizer's tables


@pytest.mark.shared
@gigatoken
def test_random_texts_of_all_of_unicode_with_qwen(qwen):
    encoder, tokenizer = qwen
    aim, texts = random.Random(5), ["క్\u0c3cష", "a\u0d3b's", "\u09fe's", "\u0eba's", "\u08ca\u0323's", "\U00010ec7's"]
    blocks = [c for c in range(0, 0x31000, 0x80) if not 0xD800 <= c < 0xE000] + [0xE0080, 0xE0100, 0xF0000, 0x10FF80]
    for _ in range(3000):
        near = [chr(c) for block in aim.sample(blocks, 3) for c in range(block, block + 0x80)]
        pool = [*near, *(["'s", "’a", " ", "\n", "\u0301", "\u0323", "1", "a", "é", "中"] * aim.choice((0, 10, 40)))]
        texts.append("".join(aim.choices(pool, k=aim.choice((3, 20, 60)))))
    settled = [encoders._UNSETTLED.search(text) is None for text in texts]
    assert settled.count(True) > 200
    assert listed(*encoder(texts)) == tokenizer.encode_batch(texts)


@gigatoken
def test_the_tokenizer_is_loaded_only_when_a_text_needs_it(byte_level, monkeypatch):
    encoder, loads = encoders.Encoder(chosen(byte_level).choice), []
    monkeypatch.setattr(encoders, "load_tokenizer", lambda path: loads.append(path) or load_tokenizer(path))
    old, new = ["钢铁", "", "e\u0301\u0323's"], ["a\u0c3c\u0323", "\U00010ec7's"]
    plain = load_tokenizer(byte_level).encode_batch
    assert listed(*encoder(old)) == plain(old)
    assert loads == []
    for texts in (new, [old[0], new[0], *old[1:], new[1], old[2]], old):
        assert listed(*encoder(texts)) == plain(texts)
    assert loads == [str(byte_level)]
