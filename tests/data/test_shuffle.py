"""Documents in another order, and where each came from."""

from collections import Counter

import numpy as np
import pytest
from corpora import content, documents, lines, numbered

from megatron_steel import cli
from megatron_steel.data import parts, shuffle
from megatron_steel.data import tokenize as room
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.data.manifest import verify
from megatron_steel.data.merge import merge
from megatron_steel.data.permutation import permute
from megatron_steel.data.tokenize import tokenize
from megatron_steel.data.tokenizer import load_tokenizer


def test_shuffle_is_the_stated_permutation_whatever_the_parts_and_workers(tmp_path, tiny_tokenizer, monkeypatch):
    source, ratio = numbered(tmp_path / "a.jsonl"), 0.1
    tokenize([source], tiny_tokenizer, tmp_path / "plain", workers=1, validation_ratio=ratio)
    tokenize([source], tiny_tokenizer, tmp_path / "one", workers=1, validation_ratio=ratio, shuffle=True, seed=7)
    monkeypatch.setattr(room, "_LEAST_UNIT_BYTES", 10_000)
    monkeypatch.setattr(shuffle, "_BUCKET_BYTES", 2_000)
    monkeypatch.setattr(shuffle, "_PIECE_TOKENS", 500)
    made = tokenize([source], tiny_tokenizer, tmp_path / "two", workers=2, validation_ratio=ratio, shuffle=True, seed=7)
    for suffix, kind in (("", "training"), ("-validation", "validation")):
        plain = documents(tmp_path / f"plain{suffix}")
        places = permute(np.arange(len(plain)), len(plain), room.shuffle_key(7, kind)).tolist()
        assert documents(tmp_path / f"two{suffix}") == [plain[i] for i in places] != plain
        assert content(tmp_path / f"one{suffix}") == content(tmp_path / f"two{suffix}")
    shuffled = {"key": room.shuffle_key(7, "training"), "documents": made.documents}
    assert [entry["shuffled"] for entry in made.provenance] == [shuffled]
    assert verify(tmp_path / "two").documents == made.documents
    assert not list(tmp_path.glob("*.parts"))


def test_every_document_knows_the_file_that_it_came_from(tmp_path, tiny_tokenizer):
    """Through a permutation of several files, and through a merge."""
    sources, texts = [], {}
    for i, name in enumerate(("a", "b", "c")):
        texts[f"{name}.jsonl"] = [f"w{10 + i} w{20 + j}" for j in range(7 + i)]
        sources.append(tmp_path / f"{name}.jsonl")
        sources[-1].write_bytes(lines(["", *texts[f"{name}.jsonl"]]))
    tokenize(sources, tiny_tokenizer, tmp_path / "plain", workers=1)
    tokenize(sources[:2], tiny_tokenizer, tmp_path / "mixed", workers=1, shuffle=True, seed=3)
    tokenize(sources[2:], tiny_tokenizer, tmp_path / "also", workers=1, shuffle=True, seed=3)
    merged = merge([tmp_path / "mixed", tmp_path / "plain", tmp_path / "also"], tmp_path / "merged")
    decode = load_tokenizer(tiny_tokenizer).decode
    seen = Counter()
    with IndexedDataset(tmp_path / "merged") as data:
        for number in range(data.documents):
            name, inside = merged.origin(number)
            assert decode(data.document(number)[:-1].tolist()) == texts[name][inside]
            seen[name, inside] += 1
    assert seen == {(name, i): 2 for name, known in texts.items() for i in range(len(known))}
    with IndexedWriter(tmp_path / "foreign", np.uint16) as writer:
        writer.add_document([3, 4])
    assert merge([tmp_path / "foreign", tmp_path / "plain"], tmp_path / "more").origin(1) is None


def test_another_seed_is_another_order(tmp_path, tiny_tokenizer):
    source = numbered(tmp_path / "a.jsonl", 200)
    command = ["tokenize", str(source), "--tokenizer", str(tiny_tokenizer), "--workers", "1", "--shuffle"]
    for seed in ("0", "1"):
        assert cli.main([*command, "--seed", seed, "--output", str(tmp_path / seed)]) == 0
    zero, one = documents(tmp_path / "0"), documents(tmp_path / "1")
    assert zero != one
    assert sorted(zero) == sorted(one)


def test_a_stopped_shuffle_begins_again_from_the_parts(tmp_path, tiny_tokenizer, small_units, monkeypatch):
    source, whole = numbered(tmp_path / "a.jsonl"), shuffle._gather_bucket
    monkeypatch.setattr(shuffle, "_BUCKET_BYTES", 2_000)
    tokenize([source], tiny_tokenizer, tmp_path / "straight", workers=1, shuffle=True)

    def stops(writer, scratch, bucket, dtype):
        if bucket == 3:
            raise KeyboardInterrupt
        whole(writer, scratch, bucket, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(shuffle, "_gather_bucket", stops)
        with pytest.raises(KeyboardInterrupt):
            tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1, shuffle=True)
    assert not list(tmp_path.glob("out.[bim]*"))
    monkeypatch.setattr(parts, "make", lambda item, encoder: pytest.fail("a finished part was made again"))
    tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1, shuffle=True)
    assert content(tmp_path / "out") == content(tmp_path / "straight")
