"""Pairs: their bytes, which pair a sample number is, and the batches that come of them."""

import json
import struct

import numpy as np
import pytest

from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.data.loader import Loader, counted, validation_batches
from megatron_steel.data.manifest import load, trust
from megatron_steel.data.merge import merge
from megatron_steel.data.pairs import PairDataset, counted_as_tokens, cut_share, pair_batch, read_pair
from megatron_steel.data.segments import Member, plan
from megatron_steel.data.tokenize import tokenize
from megatron_steel.errors import SteelError

EOS = 1
KEYS = {"prompt_key": "q", "response_key": "a", "workers": 1}


def _rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _words(ids):
    return " ".join(f"w{i}" for i in ids)


def test_the_bytes_are_megatron_s_with_two_sequences_a_document(tmp_path, tiny_tokenizer):
    rows = [{"q": "w3 w4", "a": "w5"}, {"q": "w6", "a": ""}, {"q": None, "a": "w6"}, {"q": "w6", "a": "w7 w8 w9"}]
    made = tokenize([_rows(tmp_path / "p.jsonl", rows)], tiny_tokenizer, tmp_path / "p", **KEYS)
    ids = [3, 4, EOS, 5, EOS, 6, EOS, 7, 8, 9, EOS]
    assert (tmp_path / "p.bin").read_bytes() == struct.pack("<11H", *ids)
    assert (tmp_path / "p.idx").read_bytes() == (
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 3)
        + struct.pack("<4i", 3, 2, 2, 4) + struct.pack("<4q", 0, 6, 10, 14) + struct.pack("<3q", 0, 2, 4)
    )  # fmt: skip
    assert (made.kind, made.documents, made.sequences, made.max_token_document) == ("pairs", 2, 4, 1)
    assert made.provenance[0] | {"rows": 4, "empty": 2, "documents": 2, "malformed": 0} == made.provenance[0]
    (tmp_path / "p.bin").touch()  # looked at again, and still known for what it is
    assert trust(tmp_path / "p").kind == "pairs"


def test_workers_and_small_parts_change_nothing(tmp_path, tiny_tokenizer, small_units):
    generator = np.random.default_rng(0)
    rows = [
        {"q": _words(generator.integers(3, 128, 9)), "a": _words(generator.integers(3, 128, 40))} for _ in range(200)
    ]
    source = _rows(tmp_path / "p.jsonl", rows)
    one = tokenize([source], tiny_tokenizer, tmp_path / "one", validation_ratio=0.3, **KEYS)
    two = tokenize([source], tiny_tokenizer, tmp_path / "two", validation_ratio=0.3, **KEYS | {"workers": 2})
    assert (one.digest, one.documents) == (two.digest, two.documents)
    held = load(tmp_path / "one-validation")
    assert held.documents + one.documents == 200
    assert 20 < held.documents < 100
    assert held.kind == "pairs"
    both = merge([tmp_path / "one", tmp_path / "one-validation"], tmp_path / "both")
    assert (both.kind, both.documents, both.sequences) == ("pairs", 200, 400)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompt_key": "q"}, "a pair has two keys"),
        (KEYS | {"shuffle": True}, "training draws them in an order of its own"),
        (KEYS | {"response_key": "b"}, "--prompt-key and --response-key; now 'q and b'"),
    ],
)
def test_what_cannot_be_pairs_is_said(tmp_path, tiny_tokenizer, settings, says):
    source = _rows(tmp_path / "p.jsonl", [{"q": "w3", "a": "w4"}])
    with pytest.raises(SteelError) as caught:
        tokenize([source], tiny_tokenizer, tmp_path / "p", **settings)
    assert says in str(caught.value)


def test_pairs_and_texts_are_not_merged(tmp_path, tiny_tokenizer):
    source = _rows(tmp_path / "p.jsonl", [{"q": "w3", "a": "w4"}])
    tokenize([source], tiny_tokenizer, tmp_path / "pairs", **KEYS)
    tokenize([source], tiny_tokenizer, tmp_path / "texts", text_key="q", workers=1)
    with pytest.raises(SteelError, match="some of the data sets are pairs"):
        merge([tmp_path / "pairs", tmp_path / "texts"], tmp_path / "both")


PAIRS = [(list(range(3, 3 + n % 11 + 1)), [n % 100 + 3] * (n % 70 + 1)) for n in range(50)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("pairs") / "p"
    with IndexedWriter(prefix, np.uint16) as writer:
        for prompt, response in PAIRS:
            ids = np.array([*prompt, EOS, *response, EOS])
            writer.add_documents(ids, np.array([len(prompt) + 1, len(response) + 1]), sequences_each=2)
    return IndexedDataset(prefix)


def _members(*sets):
    return [Member(s.prefix, s.prefix, counted_as_tokens(s.documents), None, True) for s in sets]


def _dataset(data, samples=200, longest=40):
    return PairDataset(plan(None, _members(data), 1, 10, samples, seed=5), {data.prefix: data}, longest)


def test_an_epoch_is_every_pair_once_and_the_next_another_order(pairs):
    data = _dataset(pairs, longest=1000)
    seen = [(p[:-1].tolist(), r[:-1].tolist()) for p, r in (data.pair(n) for n in range(100))]
    assert sorted(seen[:50]) == sorted(seen[50:]) == sorted(PAIRS)
    assert seen[:50] != seen[50:]
    assert all(part[-1] == EOS for part in data.pair(7))
    assert read_pair(pairs, 4, 3)[0].tolist() == [3, 4, 5]


def test_pairs_that_are_added_move_nothing_that_is_past(pairs, tmp_path):
    with IndexedWriter(tmp_path / "more", np.uint16) as writer:
        writer.add_documents(np.array([9, EOS, 9, EOS]), np.array([2, 2]), sequences_each=2)
    more = IndexedDataset(tmp_path / "more")
    before = plan(None, _members(pairs), 1, 10, 200, seed=5).after_steps(3)
    after = plan(before, _members(pairs, more), 1, 10, 200, seed=5)
    assert [after.locate(n) for n in range(30)] == [before.locate(n) for n in range(30)]
    places = [after.locate(n) for n in range(51)]
    assert sorted(p.start for p in places if p.digest == pairs.prefix) == list(range(50))


def test_a_batch_is_padded_to_whole_buckets_and_counts_what_is_a_response(pairs):
    data = _dataset(pairs)
    batch = pair_batch(data, [0, 1, 2], rows=4)
    longest = [max(len(data.pair(n)[side]) for n in (0, 1, 2)) for side in (0, 1)]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 32)
    assert batch["labels"].shape == (4, 32 if longest[1] <= 32 else 40)
    for row, number in enumerate((0, 1, 2)):
        prompt, response = data.pair(number)
        assert batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist() == prompt.tolist()
        assert batch["labels"][row][batch["labels"][row] != -100].tolist() == response.tolist()
    assert (batch["labels"][3] == -100).all()
    assert cut_share(pairs, 40) == sum(len(r) + 1 > 40 for _, r in PAIRS) / 50


def test_ranks_cut_the_same_step_and_labels_are_counted(pairs):
    data = _dataset(pairs)
    alone = Loader(data, data.order, 10, 5)
    ranks = [Loader(data, data.order, 10, 5, rank, 2) for rank in (0, 1)]
    assert alone.labels_ahead() == sum(r.labels_ahead() for r in ranks)
    steps = [loader.step() for loader in (alone, *ranks)]
    for one, other in zip(steps[0], (steps[1][0], steps[2][0]), strict=True):
        assert all((one[name] == other[name]).all() for name in ("input_ids", "attention_mask", "labels"))
    assert counted(steps[0]) == sum(len(data.pair(n)[1]) for n in range(10))
    held = list(validation_batches(data, range(7), 4, 1, 2))
    assert counted(held) == sum(len(data.pair(n)[1]) for n in (4, 5, 6))
    for loader in (alone, *ranks):
        loader.close()


def test_texts_are_no_pairs(tmp_path):
    with IndexedWriter(tmp_path / "t", np.uint16) as writer:
        for _ in range(3):
            writer.add_document(np.array([5, EOS]))
    data = IndexedDataset(tmp_path / "t")
    with pytest.raises(SteelError, match="3 documents of 3 sequences"):
        _dataset(data)
    with pytest.raises(SteelError, match=r"document 1 .* is no pair"):
        read_pair(data, 1, 9)
