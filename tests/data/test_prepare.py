"""The job: every kind of file, every row accounted for, the same bytes for any number of workers, all or nothing."""

import gzip
import hashlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from processes import wait_for

from megatron_steel import cli
from megatron_steel.data import prepare as room
from megatron_steel.data import readers
from megatron_steel.data.prepare import prepare
from megatron_steel.errors import SteelError

LONG = "一段二十个字以上的文字，不然就会被当作太短而退回。"


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def made(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_bytes().split(b"\n")[:-1]]


def prepared(tmp_path, raw, name="in.jsonl", source="text", **settings):
    (tmp_path / name).write_bytes(raw)
    report = prepare(source, [tmp_path / name], tmp_path / "out.jsonl", **{"workers": 1, **settings})
    return report, made(tmp_path / "out.jsonl")


KINDS = ("jsonl", "json", "json.array", "jsonl.gz", "json.zst", "array.json.gz", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    rows = [{"text": f"{i}{LONG}\r\n", "id": f"n{i}", "meta": {"a": [i, None]}} for i in range(5)]
    data = json.dumps(rows, indent=1).encode() if "array" in kind else jsonl(rows)
    path = tmp_path / ("in.json" if kind == "json.array" else f"in.{kind}")
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(kind.split(".")[-1], bytes)(data))
    prepare("text", [path], tmp_path / "out.jsonl", workers=1)
    assert made(tmp_path / "out.jsonl") == [
        {"text": row["text"], "source": "text", "file": path.name, "row": i, "id": row["id"]}
        for i, row in enumerate(rows, 1)
    ]
    units = readers.units(path, 1 << 20)
    records = [record for unit in units for record in readers.records(unit)]
    assert [record.fields for record in records] == rows
    assert [record.fields["text"] for record in records] == [
        row.text for unit in units for row in readers.rows(unit, "text")
    ]
    if len(units) > 1:
        assert [readers.numbers(unit) for unit in units] == [2, 2, 1]


def test_a_text_file_is_one_row(tmp_path):
    report, (row,) = prepared(tmp_path, b"\xef\xbb\xbf" + LONG.encode() + b"\r\n\r\n", "in.txt")
    assert row == {"text": LONG + "\r\n\r\n", "source": "text", "file": "in.txt", "row": 1}
    assert report["rows"] == report["kept"] == 1


@pytest.mark.parametrize("end", [b"\n", b""])
def test_numbers_are_those_of_the_lines_wherever_a_file_is_cut(tmp_path, end):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(b"" if i % 5 == 3 else b'"%s"' % (b"x" * (i % 7)) for i in range(40)) + end)
    for size in (1, 2, 3, 5, 8, 1000):
        units = readers.units(path, size)
        counts = [sum(1 for _ in readers.records(unit)) for unit in units]
        assert [readers.numbers(unit) for unit in units] == counts
        assert sum(counts) == 40


def test_the_bytes_do_not_depend_on_workers_or_units(tmp_path, monkeypatch):
    rows = [{"text": f"{i} {LONG}"} if i % 7 else {"text": "short"} for i in range(900)]
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.json.gz"]
    inputs[0].write_bytes(jsonl(rows).replace(b"\n", b"\n\n", 50))
    pa.parquet.write_table(pa.Table.from_pylist(rows), inputs[1], row_group_size=400)
    inputs[2].write_bytes(gzip.compress(json.dumps(rows).encode()))
    results = []
    for name, size, workers in (("one", 1 << 24, 1), ("two", 5000, 2)):
        monkeypatch.setattr(room, "_UNIT_BYTES", size)
        prepare("text", inputs, tmp_path / f"{name}.jsonl", workers=workers)
        results.append([(tmp_path / f"{name}.jsonl{suffix}").read_bytes() for suffix in ("", ".report.json")])
    assert results[0] == results[1]
    lines = inputs[0].read_bytes().split(b"\n")
    for row in made(tmp_path / "two.jsonl"):
        if row["file"] == "a.jsonl":
            assert json.loads(lines[row["row"] - 1])["text"] == row["text"]
    assert not list(tmp_path.glob("*.parts")) + list(tmp_path.glob("*.lock"))


def test_every_row_is_accounted_for(tmp_path, capsys):
    rows = [{"text": LONG}] * 3 + [
        {"text": ""},
        {"text": None},
        {"text": " \n"},
        {"text": "短"},
        {"text": LONG + "<|im_end|>"},
    ]
    (tmp_path / "in.jsonl").write_bytes(jsonl(rows) + b"\n[1]\n")
    words = ["prepare", "text", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--workers", "1"]
    assert cli.main([*words, "--max-malformed-ratio", "0.2"]) == 0
    said = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {name.strip(): int(count) for name, count in said} == {
        "rows": 9, "kept": 4, "rejected: empty": 3, "rejected: short": 1, "broken": 1,
        "rows with control strings, made harmless": 1,
    }  # fmt: skip
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text(encoding="utf-8"))
    assert report["rows"] == report["kept"] + sum(report["rejected"].values()) + report["broken"] == 9
    assert report["sha256"] == hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest()
    assert [(entry["name"], entry["rows"], entry["kept"]) for entry in report["files"]] == [("in.jsonl", 9, 4)]
    assert str(tmp_path) not in (tmp_path / "out.jsonl.report.json").read_text()


BAD_LINES = {
    "bad utf-8": (b'{"text": "\xff\xfe"}', "not JSON"),
    "NUL outside of a string": (b'\0{"text": "w3"}', "not JSON"),
    "a lone surrogate": (b'{"text": "' + b"w" * 30 + b'\\ud800"}', "lone surrogate"),
    "no key": (b'{"body": "w3"}', "no key 'text'"),
    "a number": (b'{"text": 3}', "holds a int"),
    "a list": (b'["w3"]', "a JSON list, not an object"),
    "too deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    "cut off": (b'{"text": "w3', "not JSON"),
    "a huge number": (b'{"text": "w3", "n": ' + b"9" * 5000 + b"}", "not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_row_is_broken_and_counted_and_the_rest_stays(tmp_path, name, caplog):
    line, says = BAD_LINES[name]
    report, rows = prepared(
        tmp_path, jsonl([{"text": LONG}]) + line + b"\n" + jsonl([{"text": LONG + "2"}]), max_malformed_ratio=0.5
    )
    assert [(row["text"], row["row"]) for row in rows] == [(LONG, 1), (LONG + "2", 3)]
    assert (report["rows"], report["broken"]) == (3, 1)
    assert "in.jsonl:2: " in caplog.text
    assert says in caplog.text
    with pytest.raises(SteelError, match=r"1 of 3 rows are broken, more than 0\.10%"):
        prepare("text", [tmp_path / "in.jsonl"], tmp_path / "other.jsonl", workers=1)
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.report.json"}


def test_what_is_odd_and_good(tmp_path):
    odd = ["\x00" + LONG, "\ufeff" + LONG, LONG + "\u2028\x85\r", LONG + "👩\u200d👩", "﷽" * 20]
    raw = b"\xef\xbb\xbf" + b"\r\n".join(
        json.dumps({"text": text, "id": i, "x": float("nan")}).encode() for i, text in enumerate(odd)
    )
    report, rows = prepared(tmp_path, raw)  # a byte order mark, CRLF, NaN in a field that is not read, no last newline
    assert [(row["text"], row["id"]) for row in rows] == list(zip(odd, range(5), strict=True))
    assert report["kept"] == 5


@pytest.mark.parametrize("name", ["NaN", "1e400", "[1]", "true", "null", '"\\ud800"', "1.0"])
def test_an_id_that_json_cannot_hold_is_left_out(tmp_path, name):
    _, (row,) = prepared(tmp_path, f'{{"text": "{LONG}", "id": {name}}}'.encode())
    assert row.get("id") == (1 if name == "1.0" else None)
    assert row["text"] == LONG


def test_a_document_of_50_mb_is_one_row(tmp_path):
    text = "钢铁" * (50 * 10**6 // 6)
    report, (row,) = prepared(tmp_path, jsonl([{"text": text}]))
    assert row["text"] == text
    assert report["bytes"] > 50 * 10**6 - 10


BROKEN_FILES = {
    "a truncated gz": ("a.jsonl.gz", gzip.compress(jsonl([{"text": LONG + str(i)} for i in range(999)]))[:-20], "cannot be read"),
    "no gz at all": ("a.jsonl.gz", b'{"text": "w3"}\n', "cannot be read"),
    "a truncated zst": ("a.jsonl.zst", zstandard.compress(jsonl([{"text": LONG}] * 999))[:-4], "ended before its last frame"),
    "a truncated parquet": ("a.parquet", b"PAR1" + b"x" * 99, "cannot be read"),
    "a cut array": ("a.json", b'[{"text": "w3"},', "element 2 of its JSON array"),
    "a deep array": ("a.json", b"[" * 200_000, "recursion"),
    "bad utf-8 in text": ("a.txt", b"\xff\xfe", "cannot be read"),
    "an empty gz": ("a.jsonl.gz", b"", "0 bytes"),
    "an empty zst": ("a.json.zst", b"", "0 bytes"),
    "an unknown kind": ("a.csv", b"text\n", "are not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_stops_the_job_and_publishes_nothing(tmp_path, name):
    file, raw, says = BROKEN_FILES[name]
    (tmp_path / "out.jsonl").write_text("earlier")
    (tmp_path / "good.jsonl").write_bytes(jsonl([{"text": LONG}] * 9))
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(SteelError, match=says) as caught:
        prepare("text", [tmp_path / "good.jsonl", tmp_path / file], tmp_path / "out.jsonl", workers=1)
    assert file in caught.value.where
    assert {p.name for p in tmp_path.iterdir()} == {"out.jsonl", "good.jsonl", file}
    assert (tmp_path / "out.jsonl").read_text() == "earlier"


def test_a_string_of_a_parquet_file_that_is_not_utf8_is_a_broken_row(tmp_path):
    texts = pa.array([LONG.encode(), b"\xff\xfe" + LONG.encode(), LONG.encode()]).cast(pa.string(), safe=False)
    pa.parquet.write_table(pa.table({"text": texts, "id": ["a", "b", "c"]}), tmp_path / "in.parquet")
    report = prepare("text", [tmp_path / "in.parquet"], tmp_path / "out.jsonl", workers=1, max_malformed_ratio=0.5)
    assert [row["id"] for row in made(tmp_path / "out.jsonl")] == ["a", "c"]
    assert (report["rows"], report["broken"]) == (3, 1)
    (unit,) = readers.units(tmp_path / "in.parquet", 1)
    assert [row.problem for row in readers.rows(unit, "text")] == ["", "bad UTF-8", ""]


def test_files_of_one_name_are_told_apart_and_every_way_to_write_a_path_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("d1", "d2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_bytes(jsonl([{"text": LONG}]))
    report = prepare("text", ["./d1/x.jsonl", "d2//x.jsonl"], "out.jsonl", workers=1)
    assert [row["file"] for row in made(tmp_path / "out.jsonl")] == ["d1/x.jsonl", "d2/x.jsonl"]
    assert [(file["name"], file["kept"]) for file in report["files"]] == [("d1/x.jsonl", 1), ("d2/x.jsonl", 1)]
    report = prepare("text", ["./d1/x.jsonl"], "out.jsonl", workers=1)
    assert [(file["name"], file["kept"]) for file in report["files"]] == [("x.jsonl", 1)]


def test_rows_of_another_corpus_stop_at_once(tmp_path):
    rows = [{"conversations": []}] * 12
    with pytest.raises(SteelError, match="all 12 rows of a part are broken: no key 'text'"):
        prepared(tmp_path, jsonl(rows), max_malformed_ratio=1)


def test_a_limit_on_rejected_rows(tmp_path):
    raw = jsonl([{"text": LONG}, {"text": "短"}, {"text": ""}])
    with pytest.raises(SteelError, match=r"2 of 3 rows are rejected, more than 50.00% \(empty: 1, short: 1\)"):
        prepared(tmp_path, raw, max_reject_ratio=0.5)
    assert prepared(tmp_path, raw, max_reject_ratio=0.67)[0]["kept"] == 1
    with pytest.raises(SteelError, match=r"none of 1 rows is kept \(short: 1\)"):
        prepared(tmp_path, jsonl([{"text": "短"}]))
    with pytest.raises(SteelError, match="there is no row"):
        prepared(tmp_path, b"\n\n")


def test_only_real_content_counts(tmp_path):
    for turns, kept in ((["问" * 10, "答" * 10], 1), (["问" * 10, "答" * 9 + " "], 0), (["问" * 30, " "], 0)):
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]
        messages.insert(0, {"role": "system", "content": "you " * 20})
        rows = [{"messages": messages}, {"messages": [{**turn, "content": "足够长的内容" * 5} for turn in messages]}]
        report, _ = prepared(tmp_path, jsonl(rows), source="messages")
        assert report["kept"] == 1 + kept


def test_nfkc_is_for_text_alone(tmp_path):
    fullwidth = "ＡＢＣ，１２３：ﬁ　" * 3
    assert prepared(tmp_path, jsonl([{"text": fullwidth}]))[1][0]["text"] == fullwidth
    assert prepared(tmp_path, jsonl([{"text": fullwidth}]), nfkc=True)[1][0]["text"] == "ABC,123:fi " * 3
    code = {"text": fullwidth, "red_pajama_subset": "github"}
    assert prepared(tmp_path, jsonl([code]), source="redpajama", nfkc=True)[1][0]["text"] == fullwidth
    with pytest.raises(SteelError, match="NFKC is not for code"):
        prepared(tmp_path, jsonl([{"content": fullwidth}]), source="starcoder", nfkc=True)


def test_line_ends_of_documents_stay_and_those_of_fields_are_one(tmp_path):
    qa = {"title": "问\r\n题" * 5, "desc": "", "answer": "答\r\r\n案" * 5}
    assert "问\n题" * 5 + "<|im_end|>" in prepared(tmp_path, jsonl([qa]), source="baidu-qa")[1][0]["text"]
    assert prepared(tmp_path, jsonl([{"text": "a\r\nb\rc" * 9}]), source="pile")[1][0]["text"] == "a\r\nb\rc" * 9


def test_arguments_that_cannot_be(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl([{"text": LONG}]))
    out = tmp_path / "out.jsonl"
    for source, inputs, output, settings, says in (
        ("texts", [path], out, {}, "no source 'texts'"),
        ("text", [], out, {}, "no input"),
        ("text", [path, tmp_path / "." / "in.jsonl"], out, {}, "given twice"),
        ("text", [path], path, {}, "also an input"),
        ("text", [path], tmp_path / "out.json", {}, r"one \.jsonl file"),
        ("text", [tmp_path], out, {}, "is a folder"),
        ("text", [path], out, {"max_reject_ratio": 2}, r"not in \[0, 1\]"),
        ("text", [path], out, {"remove_contaminated": True}, "no benchmark"),
    ):
        with pytest.raises(SteelError, match=says):
            prepare(source, inputs, output, workers=1, **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def command(path, output, *options):
    return [sys.executable, "-m", "megatron_steel.cli", "prepare", "text", str(path), "--output", str(output), *options]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(jsonl([{"text": LONG + str(i)} for i in range(20_000)]))
    out.write_text("earlier")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    done = subprocess.run(command(path, out, "--workers", "1"), preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 78, done.stderr
    assert "cannot write: File too large" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}
    assert out.read_text() == "earlier"


@pytest.mark.slow
def test_a_killed_worker_is_named_and_nothing_is_published(tmp_path):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(jsonl([{"text": LONG * 50 + str(i)} for i in range(60_000)]))
    child = subprocess.Popen(command(path, out, "--workers", "2"), stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "out.jsonl.parts"
    wait_for(lambda: parts.is_dir() and len(list(parts.iterdir())) > 2)
    workers = subprocess.run(["pgrep", "-P", str(child.pid), "-f", "spawn_main"], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[0]), signal.SIGKILL)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 78, said
    assert "a worker process died" in said
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.slow
def test_a_killed_job_publishes_nothing_and_a_repeat_is_whole(tmp_path):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(jsonl([{"text": LONG * 50 + str(i)} for i in range(30_000)]))
    child = subprocess.Popen(command(path, out, "--workers", "1"), stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "out.jsonl.parts" / "000001").exists)
    child.kill()
    child.wait()
    assert not out.exists()
    subprocess.run(command(path, out, "--workers", "1"), check=True, stdout=subprocess.DEVNULL)
    assert [row["row"] for row in made(out)] == list(itertools.islice(itertools.count(1), 30_000))
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.report.json"}
