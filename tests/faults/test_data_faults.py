"""Damaged data is named before the first step, or where it is met; nothing is trained on silently."""

import gzip
import json
import os
import shutil
import signal
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_steel import cli
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.data.manifest import trust, verify
from megatron_steel.data.tokenize import tokenize
from megatron_steel.errors import SteelError

EOS = 1


@pytest.fixture
def pretrain(tiny_recipe, capsys, tmp_path):
    """pretrain(exit code, *overrides): in this process, in `tmp_path/run`. Returns what it said."""

    def run(expect: int, *overrides: str) -> str:
        code = cli.main(["pretrain", str(tiny_recipe), f"run.dir={tmp_path / 'run'}", *overrides])
        said = capsys.readouterr().err
        assert code == expect, said
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def prefix(tiny_data, tmp_path):
    """A copy of the tiny training data with its manifest."""
    trust(tiny_data / "train")
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy2(f"{tiny_data / 'train'}{suffix}", f"{tmp_path / 'd'}{suffix}")
    return tmp_path / "d"


def patch(path, at, raw):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(raw)


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("left", [lambda n: n - 1, lambda n: n - 2, lambda n: n // 4 * 2, lambda n: 0])
def test_a_cut_bin_is_named_before_anything_is_made(pretrain, prefix, tmp_path, manifest, left):
    if not manifest:
        Path(f"{prefix}.manifest.json").unlink()
    os.truncate(f"{prefix}.bin", left(os.path.getsize(f"{prefix}.bin")))
    said = pretrain(78, f"data.train={prefix}")
    assert f"{prefix}.bin" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_every_rank_leaves_over_a_cut_bin(launch, tiny_recipe, prefix, tmp_path):
    os.truncate(f"{prefix}.bin", 1000)
    done = launch(2, tiny_recipe, f"data.train={prefix}", f"run.dir={tmp_path}/run", expect=78)
    assert (done.stdout + done.stderr).count("the tokens are truncated: 1000 bytes") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [np.uint16, pytest.param(np.int32, marks=pytest.mark.slow)])
def test_every_bit_of_an_index_counts(tmp_path, dtype):
    """Each single bit of a whole `.idx`, flipped: refused at once, in little memory. What stays consistent (a document
    that begins at another sequence) is known by the digest."""
    with IndexedWriter(tmp_path / "d", dtype) as writer:
        for document in ([3, 4, 5], [6], [7, 8], [9, 10, 11, 12]):
            writer.add_document(document)
    before = trust(tmp_path / "d")
    whole = (tmp_path / "d.idx").read_bytes()
    documents_at = 34 + 4 * 12
    silent = []
    tracemalloc.start()
    for bit in range(8 * len(whole)):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        (tmp_path / "d.idx").write_bytes(raw)
        (tmp_path / "d.manifest.json").unlink(missing_ok=True)
        began = time.monotonic()
        try:
            found = trust(tmp_path / "d").digest
        except SteelError as error:
            found = error.where
        if not str(found).startswith(str(tmp_path / "d.")):
            assert found != before.digest
            silent.append(bit // 8)
        assert time.monotonic() - began < 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20
    assert len(silent) < 10
    assert all(at >= documents_at for at in silent)


def test_other_content_of_the_same_size_is_refused_at_resume(pretrain, prefix, tmp_path):
    pretrain(0, f"data.train={prefix}", "train.steps=3", "schedule.name=constant")
    right = Path(f"{prefix}.bin").read_bytes()
    patch(f"{prefix}.bin", 2000, b"\x05\x00")
    said = pretrain(78, f"data.train={prefix}")
    assert f"the content of {prefix} has changed since the checkpoint" in said
    assert f"{prefix}.bin, {prefix}.idx" in said
    Path(f"{prefix}.bin").write_bytes(right)
    assert "going on from" in pretrain(0, f"data.train={prefix}", "train.steps=4", "schedule.name=constant")


def test_a_change_that_keeps_size_and_time_is_found_by_verify(prefix):
    before = os.stat(f"{prefix}.bin").st_mtime_ns
    patch(f"{prefix}.bin", 2000, b"\x05\x00")
    os.utime(f"{prefix}.bin", ns=(before, before))
    assert trust(prefix) is not None  # opened at once, as promised
    with pytest.raises(SteelError, match="digest is"):
        verify(prefix)


def test_a_bin_that_shrinks_while_it_is_trained_on(pretrain, prefix, tmp_path):
    """No SIGBUS: a data fault that names the file, and exit code 78."""

    def shrink():
        while not ((file := tmp_path / "run" / "metrics.jsonl").is_file() and file.read_text()):
            time.sleep(0.01)
        os.truncate(f"{prefix}.bin", 5000)

    thread = threading.Thread(target=shrink, daemon=True)
    thread.start()
    said = pretrain(78, f"data.train={prefix}", "train.steps=100000", "train.log_every_steps=1")
    thread.join()
    assert "the file ends at byte 5000: it was cut after it was opened" in said
    assert f"{prefix}.bin" in said


@pytest.mark.parametrize("token", [128, 65535])
def test_ids_outside_the_vocabulary(pretrain, tmp_path, token):
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        for last in (1, token, 2):
            writer.add_document(np.array([*range(3, 90), last], np.uint16))
    said = pretrain(78, f"data.train={tmp_path}/d")
    assert f"document 1 (counted from 0) holds token id {token}, but the vocabulary has 128 ids" in said
    assert not (tmp_path / "run").exists()


def word_tokenizer(folder, words, added):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel({"<unk>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, words)}}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([f"<added{i}>" for i in range(added)])
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize(
    ("words", "added", "dtype"),
    [(65_498, 1, "uint16"), (65_499, 1, "int32"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (65_499, 0, "uint16"), (65_500, 0, "int32"), (65_536, 0, "int32"), (65_000, 1000, "int32"), (70_000, 0, "int32"),
    ))],
)  # fmt: skip
def test_the_dtype_follows_the_largest_id_added_tokens_included(tmp_path, words, added, dtype):
    word_tokenizer(tmp_path / "tokenizer", words, added)
    ids = [2, words - 1, words - 2, *range(words, words + added)]
    texts = [f"w{i}" for i in ids[:3]] + [f"<added{i}>" for i in range(added)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": " ".join(texts)}) + "\n")
    made = tokenize([tmp_path / "a.jsonl"], tmp_path / "tokenizer", tmp_path / "out", workers=1)
    assert (made.dtype, made.max_token_id) == (dtype, max(ids))
    assert IndexedDataset(tmp_path / "out").document(0).tolist() == [*ids, 1]


ROWS = {  # line -> its ids; "empty" or "malformed" where it is counted and skipped
    "plain": (b'{"text": "w3 w4"}\n', [3, 4]),
    "bad UTF-8": (b'{"text": "w3 \xff"}\n', "malformed"),
    "empty": (b'{"text": ""}\n', "empty"),
    "null": (b'{"text": null}\n', "empty"),
    "no key": (b'{"content": "w3"}\n', "malformed"),
    "not a string": (b'{"text": ["w3"]}\n', "malformed"),
    "CRLF": (b'{"text": "w6"}\r\n', [6]),
    "nested": (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b', "text": "w7"}\n', None),  # read or counted, no crash
    "NaN": (b'{"text": "w8", "score": NaN}\n', [8]),
    "NUL": (b'{"text": "w9\\u0000 w10"}\n', [2, 10]),  # a word that the vocabulary has not
    "raw NUL": (b'{"text": "w9\x00"}\n', "malformed"),
    "surrogate": (b'{"text": "\\ud800"}\n', "malformed"),
    "emoji": ('{"text": "😀 w11"}\n'.encode(), [2, 11]),
    "blank line": (b"\n", "nothing"),
    "no newline at the end": (b'{"text": "w12"}', [12]),
}


def test_nasty_rows_have_a_stated_rule_and_are_counted(tmp_path, tiny_tokenizer):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"".join(line for line, _ in ROWS.values()))
    with pytest.raises(SteelError, match="rows are malformed"):
        tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert (
        cli.main(["tokenize", str(source), "--tokenizer", str(tiny_tokenizer), "--output", str(tmp_path / "out")]) == 78
    )
    made = tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1, max_malformed_ratio=0.6)
    data = IndexedDataset(tmp_path / "out")
    found = [data.document(i).tolist() for i in range(data.documents)]
    wanted = [[*rule, EOS] for _, rule in ROWS.values() if isinstance(rule, list)]
    nested = [7, EOS] in found
    assert [ids for ids in found if ids != [7, EOS]] == wanted
    (entry,) = made.provenance
    malformed = sum(rule == "malformed" for _, rule in ROWS.values()) + (not nested)
    assert (entry["malformed"], entry["empty"]) == (malformed, 2)
    assert entry["documents"] == len(found)
    assert entry["rows"] == entry["documents"] + entry["malformed"] + entry["empty"]


@pytest.mark.slow
def test_a_row_of_fifty_megabytes(tmp_path, tiny_tokenizer):
    words = 12_000_000
    with open(tmp_path / "a.jsonl", "w") as file:
        file.write('{"text": "w3"}\n{"text": "' + "w5  " * words + 'w6"}\n{"text": "w4"}\n')
    assert os.path.getsize(tmp_path / "a.jsonl") > 45 << 20
    made = tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1)
    data = IndexedDataset(tmp_path / "out")
    assert (made.documents, made.tokens) == (3, 2 + words + 2 + 2)
    assert [data.document(i).tolist() for i in (0, 2)] == [[3, EOS], [4, EOS]]
    assert data.document(1)[-3:].tolist() == [5, 6, EOS]


def test_a_packed_file_cut_anywhere_is_named_and_leaves_nothing(tmp_path, tiny_tokenizer):
    rows = "".join(json.dumps({"text": f"w{3 + i % 100} w{3 + i % 90}"}) + "\n" for i in range(5000)).encode()
    whole = gzip.compress(rows)
    for tenth in range(10):
        (tmp_path / "a.jsonl.gz").write_bytes(whole[: 1 + tenth * (len(whole) - 2) // 9])
        with pytest.raises(SteelError, match="cannot be read") as caught:
            tokenize([tmp_path / "a.jsonl.gz"], tiny_tokenizer, tmp_path / "out", workers=1)
        assert caught.value.where == f"{tmp_path}/a.jsonl.gz"
        assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl.gz"]
    (tmp_path / "a.jsonl.gz").write_bytes(rows)  # plain text under that name
    with pytest.raises(SteelError, match="cannot be read: Not a gzipped file"):
        tokenize([tmp_path / "a.jsonl.gz"], tiny_tokenizer, tmp_path / "out", workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl.gz"]


def test_the_same_shard_twice_in_a_blend(pretrain, prefix, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"copy{suffix}")
    for other in (prefix, tmp_path / "copy"):
        said = pretrain(78, f"data.train=[{{prefix: {prefix}, weight: 1}}, {{prefix: {other}, weight: 2}}]")
        assert f"the same data twice: {prefix} and {other}" in said


def test_a_scan_that_is_killed_and_scans_at_once(stub_server):
    """The manifest is the one thing that is remembered: whole or not there, and the order is the same."""
    stub = stub_server.below("scans")
    stub.run(stub.root / "alone", steps=3)
    manifests = [Path(f"{prefix}.manifest.json") for prefix in stub.data]
    wanted = [json.loads(path.read_text()) for path in manifests]
    for delay in range(8):
        for path in manifests:
            path.unlink(missing_ok=True)
        pid = stub.start(stub.root / f"killed-{delay}", steps=10**6)
        time.sleep(delay * 0.005)
        os.kill(pid, signal.SIGKILL)
        stub.wait(pid)
        assert all(
            json.loads(path.read_text()) == want for path, want in zip(manifests, wanted, strict=True) if path.exists()
        )
    for path in manifests:
        path.unlink(missing_ok=True)
    pids = [stub.start(stub.root / f"together-{i}", steps=3) for i in range(4)]
    assert [stub.wait(pid) for pid in pids] == [0] * 4
    assert [json.loads(path.read_text()) for path in manifests] == wanted
    curves = {
        (stub.root / name / "curve-0.jsonl").read_text() for name in ("alone", *(f"together-{i}" for i in range(4)))
    }
    assert len(curves) == 1
