"""Files of every kind to the same documents; workers and bad rows."""

import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from corpora import content, documents, lines, many

from megatron_steel import cli
from megatron_steel.data import readers
from megatron_steel.data import tokenize as room
from megatron_steel.data.indexed import IndexedDataset
from megatron_steel.data.manifest import load, trust, verify
from megatron_steel.data.tokenize import tokenize
from megatron_steel.errors import SteelError

EOS = 1


TEXTS = ["w3 w4", "", "w5", "w6 w7 w8\nw9", "w100"]


IDS = [[3, 4, EOS], [5, EOS], [6, 7, 8, 9, EOS], [100, EOS]]


def write_input(folder, kind):
    path = folder / f"in.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(pa.table({"id": range(5), "text": TEXTS}), path, row_group_size=2)
        return path
    array = json.dumps([{"text": text} for text in TEXTS], indent=2).encode()
    data = {"jsonl": lines(TEXTS), "json": array if "array" not in kind else b""}.get(kind.split(".")[0], b"")
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(kind.split(".")[-1], lambda raw: raw)
    path.write_bytes(pack(data))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst", "parquet"])
def test_every_kind_of_file(tmp_path, tiny_tokenizer, kind):
    result = tokenize([write_input(tmp_path, kind)], tiny_tokenizer, tmp_path / "out", workers=1)
    assert documents(tmp_path / "out") == IDS
    assert (result.tokens, result.documents, result.dtype, result.max_token_id) == (12, 4, "uint16", 100)
    assert result.max_token_document == 3
    (entry,) = result.provenance
    assert entry["name"] == f"in.{kind}"
    assert [entry[key] for key in ("rows", "documents", "empty", "malformed")] == [5, 4, 1, 0]
    assert load(tmp_path / "out") == result == trust(tmp_path / "out", 128) == verify(tmp_path / "out")
    assert result.tokenizer["eos_id"] == EOS
    assert str(tmp_path) not in (tmp_path / "out.manifest.json").read_text()
    assert not (tmp_path / "out.parts").exists()


def test_a_text_file_is_one_document(tmp_path, tiny_tokenizer):
    (tmp_path / "a.txt").write_text("w3\n\nw4\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfw5"))
    (tmp_path / "c.txt").write_text("")
    tokenize([tmp_path / name for name in ("a.txt", "b.txt.gz", "c.txt")], tiny_tokenizer, tmp_path / "out")
    assert documents(tmp_path / "out") == [[3, 4, EOS], [5, EOS]]


def test_json_may_hold_lines_and_begin_with_a_mark(tmp_path, tiny_tokenizer):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + lines(["w3"]).rstrip() + b"\r\n\n" + lines(["w4"]).rstrip())
    tokenize([tmp_path / "a.json"], tiny_tokenizer, tmp_path / "out", workers=1)
    assert documents(tmp_path / "out") == [[3, EOS], [4, EOS]]


def test_end_of_document_comes_once_whatever_the_text_says(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(["w3", "w4 <|im_end|>", None], key="body"))
    result = tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", text_key="body", workers=1)
    assert documents(tmp_path / "out") == [[3, EOS], [4, EOS, EOS]]
    assert result.provenance[0]["empty"] == 1


def test_any_cut_of_a_file_gives_every_line_once(tmp_path):
    texts = ["x" * (i % 13) for i in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(texts).rstrip())
    for size in (1, 7, 19, 20, 21, 64, 10_000):
        units = readers.units(path, size)
        rows = [list(readers.rows(unit, "text")) for unit in units]
        assert [row.text for unit in rows for row in unit] == texts
        assert all([row.number for row in unit] == list(range(1, len(unit) + 1)) for unit in rows)


def test_the_bytes_do_not_depend_on_workers_or_parts(tmp_path, tiny_tokenizer, monkeypatch):
    inputs = [many(tmp_path / "a.jsonl"), write_input(tmp_path, "parquet"), write_input(tmp_path, "json.gz")]
    tokenize(inputs, tiny_tokenizer, tmp_path / "one", workers=1, validation_ratio=0.1)
    monkeypatch.setattr(room, "_LEAST_UNIT_BYTES", 10_000)
    assert len(room._bundles(inputs)) > 10
    tokenize(inputs, tiny_tokenizer, tmp_path / "two", workers=2, validation_ratio=0.1)
    for suffix in ("", "-validation"):
        assert content(tmp_path / f"one{suffix}") == content(tmp_path / f"two{suffix}")
        assert load(tmp_path / f"one{suffix}").digest == load(tmp_path / f"two{suffix}").digest


def test_short_documents_are_left_out_as_if_they_had_not_been_there(tmp_path, tiny_tokenizer, small_units):
    """Characters and tokens are two limits; over several parts all is counted, and validation is not moved."""
    texts = [f"w{3 + i % 120} " * (1 + i % 7) + "x" * (i % 3) for i in range(1000)] + ["", "w5"]
    kept = [t for t in texts if len(t) >= 12 and len(t.split()) >= 4]
    (tmp_path / "all.jsonl").write_bytes(lines(texts))
    (tmp_path / "kept.jsonl").write_bytes(lines(kept))
    limits = {"min_tokens": 4, "min_chars": 12, "validation_ratio": 0.1}
    dropped = tokenize([tmp_path / "all.jsonl"], tiny_tokenizer, tmp_path / "a", workers=1, **limits)
    filtered = tokenize([tmp_path / "kept.jsonl"], tiny_tokenizer, tmp_path / "b", workers=1, validation_ratio=0.1)
    for suffix in ("", "-validation"):
        assert content(tmp_path / f"a{suffix}") == content(tmp_path / f"b{suffix}")
    assert min(len(ids) for ids in documents(tmp_path / "a")) == 5
    (entry,) = dropped.provenance
    assert {key: entry[key] for key in ("rows", "empty", "short", "min_tokens", "min_chars")} == {
        "rows": len(texts), "empty": 1, "short": len(texts) - 1 - len(kept), "min_tokens": 4, "min_chars": 12,
    }  # fmt: skip
    assert "short" not in filtered.provenance[0]
    assert any(len(t) < 12 and len(t.split()) >= 4 for t in texts)  # each limit acts alone
    assert any(len(t) >= 12 and len(t.split()) < 4 for t in texts)


def test_parts_made_with_other_limits_are_not_used(tmp_path, tiny_tokenizer, small_units, monkeypatch):
    """Killed after its parts, and started again: the same command uses them, one with a limit makes its own."""
    source = many(tmp_path / "a.jsonl")

    def killed(*arguments):
        raise OSError("killed")

    with monkeypatch.context() as broken:
        broken.setattr(room, "_publish", killed)
        with pytest.raises(SteelError, match="cannot write"):
            tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1, min_tokens=3)
    made = []
    real = room.parts.make
    monkeypatch.setattr(room.parts, "make", lambda item, encoder: made.append(item[0]) or real(item, encoder))
    tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1, min_tokens=3)
    assert made == []
    with monkeypatch.context() as broken:
        broken.setattr(room, "_publish", killed)
        with pytest.raises(SteelError, match="cannot write"):
            tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1, min_tokens=3)
    made.clear()
    result = tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1, min_tokens=4)
    assert len(made) > 2
    assert result.documents == sum(1 + i % 7 >= 4 for i in range(3000))


def test_validation_is_chosen_by_content(tmp_path, tiny_tokenizer):
    texts = [f"w{i % 100 + 3} w{i // 100 + 3}" for i in range(2000)]
    for name, order in (("a", texts), ("b", texts[::-1] + texts)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(order))
        tokenize([tmp_path / f"{name}.jsonl"], tiny_tokenizer, tmp_path / name, workers=1, validation_ratio=0.1)
    held = [{tuple(ids) for ids in documents(tmp_path / f"{name}-validation")} for name in "ab"]
    assert held[0] == held[1]
    assert 140 < len(held[0]) < 260  # 200 expected, more than four standard deviations each way
    seen = {tuple(ids) for ids in documents(tmp_path / "b")}
    assert not seen & held[1]
    assert len(seen | held[1]) == 2000


def test_a_validation_set_that_stays_empty_is_an_error(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(["w3", "w4"]))
    with pytest.raises(SteelError, match="no document for validation among 2 rows"):
        tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1, validation_ratio=1e-9)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


BAD_ROWS = {
    "not JSON": (b'{"text": "w3"\n', "not JSON"),
    "not an object": (b"[1]\n", "a JSON list, not an object"),
    "no key": (b'{"content": "w3"}\n', r"no key 'text' \(it has: content\)"),
    "a number": (b'{"text": 3}\n', "'text' holds a int, not a string"),
    "a surrogate": (b'{"text": "\\ud800"}\n', "'text' holds half a character"),
    "not UTF-8": (b'{"text": "\xff"}\n', "not JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_malformed_rows_are_named_and_too_many_fail(tmp_path, tiny_tokenizer, name, caplog, monkeypatch):
    monkeypatch.setattr(room.log, "propagate", True)
    row, problem = BAD_ROWS[name]
    (tmp_path / "a.jsonl").write_bytes(lines(["w3"]) + b"\n" + row + lines(["w4"]))
    with pytest.raises(SteelError, match="1 of 3 rows are malformed") as caught:
        tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1)
    assert caught.value.where == f"{tmp_path}/a.jsonl:3"
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    result = tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1, max_malformed_ratio=0.5)
    assert documents(tmp_path / "out") == [[3, EOS], [4, EOS]]
    assert result.provenance[0]["malformed"] == 1
    assert re.search(f"a.jsonl:3: {problem}", caplog.text)


def test_a_line_in_a_later_part_has_its_number_in_the_file(tmp_path, tiny_tokenizer, small_units):
    good = many(tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    good.insert(2500, b"oops\n")
    (tmp_path / "a.jsonl").write_bytes(b"".join(good))
    with pytest.raises(SteelError) as caught:
        tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1, max_malformed_ratio=0)
    assert caught.value.where.endswith("a.jsonl:2501")


def test_the_wrong_key_fails_at_once(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(["w3"] * 20, key="content"))
    with pytest.raises(SteelError, match=r"all 20 rows .* no key 'text' \(it has: id, content\)"):
        tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1, max_malformed_ratio=1)
    pa.parquet.write_table(pa.table({"content": ["w3"]}), tmp_path / "a.parquet")
    with pytest.raises(SteelError, match="no column 'text'") as caught:
        tokenize([tmp_path / "a.parquet"], tiny_tokenizer, tmp_path / "out", workers=1)
    assert "content" in caught.value.remedy


BAD_FILES = {
    "gz": ("a.jsonl.gz", gzip.compress(lines(["w3"] * 1000))[:-20], "cannot be read: Compressed file ended"),
    "zst": ("a.jsonl.zst", zstandard.compress(lines(["w3"] * 1000))[:-9], "cannot be read: the compressed file ended"),
    "parquet": ("a.parquet", b"PAR1 nonsense PAR1", "cannot be read"),
    "array": ("a.json", b'[{"text": "w3"}, {"text": ', "cannot be read: element 2 of its JSON array"),
    "text": ("a.txt", b"\xff\xfe", "cannot be read: 'utf-8'"),
    "kind": ("a.docx", b"x", "files that end in .docx are not known"),
    "empty": ("a.jsonl", b"", "no document for training among 0 rows"),
    "blank": ("a.jsonl", lines([""]), "no document for training among 1 rows"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_and_leave_nothing(tmp_path, tiny_tokenizer, name):
    file, raw, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(SteelError, match=message) as caught:
        tokenize([tmp_path / file], tiny_tokenizer, tmp_path / "out", workers=1)
    assert file in caught.value.where or "out" in caught.value.where
    assert [p.name for p in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("name", ["out.idx", "out.manifest.json", "out-validation.bin"])
def test_a_folder_where_a_file_of_the_output_goes(tmp_path, tiny_tokenizer, name):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / name).mkdir()
    with pytest.raises(SteelError, match="a folder has the name") as caught:
        tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1, validation_ratio=0.5)
    assert caught.value.where == str(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", name}


def test_files_of_one_name_in_several_folders_are_told_apart(tmp_path, tiny_tokenizer, monkeypatch):
    for folder, word in (("in/wiki/x", "w3"), ("in/web", "w4"), ("in/web/x", "w5")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "part-0.jsonl").write_bytes(lines([word]))
    (tmp_path / "in" / "web" / "part-1.jsonl").write_bytes(lines(["w6"]))
    monkeypatch.chdir(tmp_path / "in" / "web")
    inputs = ["../wiki/x/part-0.jsonl", "part-0.jsonl", tmp_path / "in/web/x/part-0.jsonl", "part-1.jsonl"]
    result = tokenize(inputs, tiny_tokenizer, tmp_path / "out", workers=1)
    names = ["wiki/x/part-0.jsonl", "web/part-0.jsonl", "web/x/part-0.jsonl", "web/part-1.jsonl"]
    assert [result.origin(i) for i in range(4)] == [(name, 0) for name in names]
    assert str(tmp_path) not in (tmp_path / "out.manifest.json").read_text()
    alone = tokenize([inputs[0], inputs[3]], tiny_tokenizer, tmp_path / "two", workers=1)
    assert [entry["name"] for entry in alone.provenance] == ["part-0.jsonl", "part-1.jsonl"]


def test_bad_arguments(tmp_path, tiny_tokenizer):
    for workers in (0, -2):
        with pytest.raises(SteelError, match=f"{workers} workers"):
            tokenize(["x.jsonl"], tiny_tokenizer, tmp_path / "out", workers=workers)
    for inputs, ratio, message in (([], 0, "no input"), (["x.jsonl"], 0, "no such input"), ([tmp_path], 0, "a folder")):
        with pytest.raises(SteelError, match=message):
            tokenize(inputs, tiny_tokenizer, tmp_path / "out", validation_ratio=ratio)
    with pytest.raises(SteelError, match="validation ratio of 1"):
        tokenize(["x.jsonl"], tiny_tokenizer, tmp_path / "out", validation_ratio=1)
    with pytest.raises(SteelError, match="ratio of nan malformed rows"):
        tokenize(["x.jsonl"], tiny_tokenizer, tmp_path / "out", max_malformed_ratio=float("nan"))
    for folder in (f"{tmp_path}/", ".", f"{tmp_path}/.."):
        with pytest.raises(SteelError, match="the output is a folder"):
            tokenize(["x.jsonl"], tiny_tokenizer, folder)
    with pytest.raises(SteelError, match="given twice") as caught:
        tokenize(["x.jsonl", "y.jsonl", "./x.jsonl"], tiny_tokenizer, tmp_path / "out")
    assert caught.value.where == "x.jsonl, ./x.jsonl"
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_how_many_rows_may_be_malformed(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(["w3"]) + b"oops\n")
    command = ["tokenize", str(tmp_path / "a.jsonl"), "--tokenizer", str(tiny_tokenizer), "--workers", "1"]
    command += ["--output", str(tmp_path / "out")]
    assert cli.main([*command, "--max-malformed-ratio", "0.4"]) == 78
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert cli.main([*command, "--max-malformed-ratio", "0.5"]) == 0
    assert documents(tmp_path / "out") == [[3, EOS]]


def test_a_validation_set_whose_documents_would_be_trained_on_is_refused(tmp_path, tiny_tokenizer):
    source = many(tmp_path / "a.jsonl", 100)
    tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1, validation_ratio=0.5)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SteelError, match="an earlier validation set") as caught:
        tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1)
    stale = sorted(tmp_path.glob("out-validation.*"))
    assert sorted(caught.value.where.split(", ")) == [str(path) for path in stale]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for path in stale:
        path.unlink()
    assert tokenize([source], tiny_tokenizer, tmp_path / "out", workers=1).documents == 100


def test_a_bad_file_fails_the_workers_too(tmp_path, tiny_tokenizer, small_units):
    good, bad = many(tmp_path / "a.jsonl"), tmp_path / "z.jsonl.gz"
    bad.write_bytes(BAD_FILES["gz"][1])
    with pytest.raises(SteelError, match="Compressed file ended"):
        tokenize([bad, good], tiny_tokenizer, tmp_path / "out", workers=2)
    with pytest.raises(SteelError, match="no key 'body'"):
        tokenize([good], tiny_tokenizer, tmp_path / "out", "body", workers=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "z.jsonl.gz"]


def test_rows_that_hold_a_special_string_are_counted(tmp_path, tiny_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(room.log, "propagate", True)
    texts = ["w3", "w4 <|im_end|> w5 <|im_end|>", "no such word", "<|endoftext|> w6", "<|im_end", "w7 <|im_end|>"]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    with caplog.at_level("INFO"):
        result = tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1)
    assert result.provenance[0]["special"] == 3
    assert "3 hold a special string of the tokenizer" in caplog.text
    assert documents(tmp_path / "out")[1] == [4, EOS, 5, EOS, EOS]


def test_a_text_of_which_the_tokenizer_keeps_nothing_is_empty(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(["w3", " \n ", "w4"]))
    result = tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1)
    assert documents(tmp_path / "out") == [[3, EOS], [4, EOS]]
    assert [result.provenance[0][key] for key in ("rows", "documents", "empty")] == [3, 2, 1]


def test_awkward_rows_keep_their_text_to_the_byte(tmp_path, tiny_tokenizer):
    """CRLF, NUL, NaN beside it, deep nesting beside it, a mark inside: the text is what JSON says, or the row is named."""
    deep = b'{"text": "w5", "x": ' + b"[" * 300 + b"]" * 300 + b"}"
    rows = [
        b'{"text": "w3\\r\\n\\u0000 w4"}\r',
        b'{"text": "w4", "x": NaN, "y": -Infinity}',
        deep,
        b'{"text": "\xef\xbb\xbfw6"}',
    ]
    rows += [b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b'{"text": "w7"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    result = tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1, max_malformed_ratio=0.5)
    assert [result.provenance[0][key] for key in ("rows", "documents", "malformed")] == [6, 5, 1]
    found = [row.text for unit in readers.units(tmp_path / "a.jsonl", 1 << 20) for row in readers.rows(unit, "text")]
    assert found == ["w3\r\n\0 w4", "w4", "w5", "\ufeffw6", None, "w7"]


def test_a_file_that_is_not_what_its_name_says(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl.gz").write_bytes(lines(["w3"]))
    with pytest.raises(SteelError, match="cannot be read: Not a gzipped file") as caught:
        tokenize([tmp_path / "a.jsonl.gz"], tiny_tokenizer, tmp_path / "out", workers=1)
    assert caught.value.where.endswith("a.jsonl.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl.gz"]


@pytest.mark.slow
def test_a_document_of_50_mb(tmp_path, tiny_tokenizer):
    words = 50_000
    (tmp_path / "a.jsonl").write_bytes(lines(["w3", ("w45" + " " * 997) * words, "w4"]))
    result = tokenize([tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1)
    data = IndexedDataset(tmp_path / "out")
    assert data.lengths(0, 3).tolist() == [2, words + 1, 2]
    assert (result.tokens, result.documents) == (words + 5, 3)
    assert data.document(1).tolist() == [45] * words + [EOS]


@pytest.mark.shared
@pytest.mark.parametrize(("name", "key"), [("sky", "text"), ("wanjuan", "content")])
def test_real_rows_with_the_qwen_tokenizer(tmp_path, shared_data, name, key):
    from transformers import AutoTokenizer

    (source,) = (shared_data / "steel_samples" / name).iterdir()
    result = tokenize([source], shared_data / "qwen_tokenizer", tmp_path / "out", text_key=key, workers=1)
    data = IndexedDataset(tmp_path / "out")
    texts = [json.loads(line)[key] for line in source.read_text("utf-8").splitlines()]
    hf = AutoTokenizer.from_pretrained(shared_data / "qwen_tokenizer", local_files_only=True)
    assert (data.documents, data.dtype) == (len(texts), np.int32)
    for i, text in enumerate(texts):
        ids = data.document(i).tolist()
        assert ids[:-1] == hf(text)["input_ids"]
        assert ids.index(151645) == len(ids) - 1
    assert result.max_token_id == 151645
