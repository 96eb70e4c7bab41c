"""The fast encoder against the tokenizer it stands in for; what happens where they differ."""

import json
import pickle
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
    assert (choice.name, choice.source) == ("transformers", str(tiny_tokenizer))
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
    small = encoders.Choice(choice.name, choice.source, 5, 1, ())
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


@pytest.mark.slow
@pytest.mark.shared
@gigatoken
def test_qwen(shared_data):
    assert chosen(shared_data / "qwen_tokenizer").choice.name == "gigatoken"
