"""Hours and disk of the data stages: samples are cut right, and the real corpora take what was planned."""

import errno
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_steel.data.clean import run
from megatron_steel.data.indexed import bin_path, idx_path
from megatron_steel.data.prepare import prepare
from megatron_steel.data.tokenize import tokenize
from megatron_steel.errors import SteelError
from megatron_steel.planner import corpus, sample

SOURCES = {
    "skypile": "sky/*.jsonl", "wanjuan": "wanjuan/*.jsonl", "wiki-cn": "wiki_cn/*.json", "baidu-baike": "baidu_baike/*.json",
    "baidu-qa": "baidu_QA/*.json", "zhihu-kol": "zhihu/*.parquet", "belle-2m": "BELLE/*2M*.json",
    "belle-3.5m": "BELLE/*3.5M*.json", "firefly": "firefly/*.jsonl", "starcoder": "starcode/*/*.parquet",
}  # fmt: skip
WITHIN = 0.25  # of CPU seconds and of disk, the bound


def test_a_sample_is_the_beginning_in_the_same_format(tmp_path):
    lines = [json.dumps({"text": f"row {i} " + "x" * 90}) + "\n" for i in range(1000)]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(lines))
    taken, stands = sample.cut(str(jsonl), tmp_path / "s", 20_000)
    text = Path(taken).read_text()
    assert "".join(lines).startswith(text)
    assert text.endswith("\n")
    assert 20_000 <= stands == len(text) < 20_200
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": [f"row {i} " + "x" * 90 for i in range(1000)]}), table, row_group_size=100)
    taken, stands = sample.cut(str(table), tmp_path / "s", table.stat().st_size // 4)
    assert pq.read_table(taken).to_pylist() == pq.read_table(table).to_pylist()[:250]
    assert stands == pytest.approx(table.stat().st_size / 4, rel=0.01)
    whole, stands = sample.cut(str(jsonl), tmp_path / "s", 10**9)
    assert Path(whole).read_bytes() == jsonl.read_bytes()
    assert stands == jsonl.stat().st_size


def test_cores_share_the_work_and_not_the_start_nor_the_join():
    points = [{"bytes": b, "stages": {"prepare": corpus._Point(0.0, 2 + 4e-6 * b, 1e-6 * b, b // 2)}}
              for b in (10**6, 4 * 10**6)]  # fmt: skip
    one, many = (corpus._stage("prepare", points, 10**9, cores) for cores in (1, 16))
    assert one.start_seconds == many.start_seconds == pytest.approx(2)
    assert one.join_seconds == many.join_seconds == pytest.approx(1000)
    assert one.core_seconds == many.core_seconds == pytest.approx(3000)
    assert one.hours * 3600 == pytest.approx(4002)
    assert many.hours * 3600 == pytest.approx(1002 + 3000 / 16)
    assert one.bytes == 5 * 10**8


def test_what_is_timed_by_itself_is_start_and_no_rate():
    """3 s to load the tokenizer, as the larger sample needs them, beside 1 us a byte of tokenizing."""
    points = [{"bytes": b, "stages": {"tokenize": corpus._Point(start, 1e-6 * b, 0.0, 4 * b)}}
              for b, start in ((10**5, 2.5), (4 * 10**5, 3.0))]  # fmt: skip
    found = corpus._stage("tokenize", points, 10**8, 1)
    assert found.start_seconds == pytest.approx(3.0)
    assert found.core_seconds == pytest.approx(100)


def _lines(file: Path, *rows: str) -> str:
    file.write_text("".join(row + "\n" for row in rows))
    return str(file)


ROW = json.dumps({"text": "a long enough row of text"})


def test_bad_sizes_are_named(tmp_path):
    file = _lines(tmp_path / "a.jsonl", ROW)
    with pytest.raises(SteelError, match="is no size"):
        corpus.plan([file], total_size="many")
    with pytest.raises(SteelError, match="0 cores"):
        corpus.plan([file], cores=0)
    size = len(ROW) + 1
    with pytest.raises(SteelError, match=f"{size - 1}B is less than the {size} bytes of the files given"):
        corpus.plan([file], total_size=f"{size - 1}B")
    assert corpus.plan([file], total_size=f"{size}B")["bytes"] == size


@pytest.mark.parametrize(("good", "bad"), [(76, 1), (4, 73), (1, 0)])
def test_broken_rows_of_a_sample_stop_no_plan(good, bad, tmp_path):
    file = _lines(tmp_path / "a.jsonl", *[ROW] * good, *["{"] * bad)
    kept = prepare("text", [file], tmp_path / "all.jsonl", workers=1, max_malformed_ratio=1.0)
    (stage,) = corpus.plan([file])["stages"]
    assert stage["bytes"] == kept["bytes"]


@pytest.mark.parametrize(
    ("rows", "words", "what", "where"),
    [
        ([], [], "the file is empty", ""),
        (["", ""], [], "none of 0 rows is kept", ""),
        (["{"], [], "none of 1 rows is kept", ""),
        ([ROW] * 40, ["wiki-cn"], "all 10 rows of a part are broken: no key 'completion'", ":1"),
    ],
)
def test_what_is_wrong_with_a_sample_is_told_of_the_file(rows, words, what, where, tmp_path):
    file = _lines(tmp_path / "a.jsonl", *rows)
    with pytest.raises(SteelError) as told:
        corpus.plan([*words, file])
    assert told.value.what.startswith(what)
    assert told.value.where.split(", ")[0] == file + where
    assert "megatron-steel-plan-" not in str(told.value)
    assert "--max" not in told.value.remedy


def test_a_table_without_rows_is_empty(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(SteelError, match="the file is empty"):
        corpus.plan([str(tmp_path / "a.parquet")])


def test_a_damaged_table_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(20_000)]}), file)
    content = bytearray(file.read_bytes())
    content[100:20_000] = b"\xff" * 19_900
    file.write_bytes(content)
    with pytest.raises(SteelError, match="the file cannot be read") as told:
        corpus.plan([str(file)], sample_bytes=10_000)
    assert told.value.where == str(file)


def test_a_word_that_is_no_file_has_its_nearest_source(tmp_path):
    with pytest.raises(SteelError, match="no such input file, and no source of that name") as told:
        corpus.plan(["skypil", _lines(tmp_path / "a.jsonl", ROW)])
    assert told.value.where == "skypil"
    assert told.value.remedy.startswith("did you mean skypile")


def test_what_a_stage_made_is_told_of_all_files(tmp_path):
    files = ["a.jsonl", "b.jsonl"]
    with pytest.raises(SteelError) as told, sample.told_of(files, "text", tmp_path):
        raise SteelError("there is no document", tmp_path / "text.jsonl", "give more text")
    assert told.value.where == "a.jsonl, b.jsonl"


def _full_disk():
    raise OSError(errno.ENOSPC, "full")


def _stage_on_a_full_disk():
    try:
        _full_disk()
    except OSError:
        raise SteelError("cannot write", "data.parts", "mend it and repeat") from None


@pytest.mark.parametrize("action", [_full_disk, _stage_on_a_full_disk])
def test_a_full_disk_is_no_fault_of_the_files(action, tmp_path):
    with pytest.raises(SteelError, match="there is no room") as told, sample.told_of(["a.jsonl"], "text", tmp_path):
        action()
    assert told.value.where == tempfile.gettempdir()


def test_a_remedy_names_no_option_of_another_verb(tmp_path):
    with pytest.raises(SteelError) as told, sample.told_of(["a.jsonl"], "text", tmp_path / "sample"):
        run._interpreter(tmp_path / "none")
    assert told.value.where == str(tmp_path / "none")
    assert told.value.remedy == "bash launch/clean_environment.sh makes it"


def test_a_chain_that_keeps_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "clean", lambda inputs, chain, output, workers: output.touch())
    with pytest.raises(SteelError, match="the chain keeps no row") as told:
        corpus.plan([_lines(tmp_path / "a.jsonl", ROW)], chain="text")
    assert told.value.where == "--chain text"


@pytest.mark.shared
@pytest.mark.slow
def test_the_real_corpora_take_what_was_planned(shared_data, tmp_path):
    """Planned from the first two fifths of every file, then run on all of it: seconds and bytes of each stage."""
    tokenizer = str(shared_data / "qwen_tokenizer")
    planned: dict[str, list[float]] = {"prepare": [0, 0], "tokenize": [0, 0]}
    real: dict[str, list[float]] = {"prepare": [0, 0], "tokenize": [0, 0]}
    for source, pattern in SOURCES.items():
        files = sorted(map(str, (shared_data / "steel_samples").glob(pattern)))
        size = sum(Path(f).stat().st_size for f in files)
        found = corpus.plan([source, *files], tokenizer, cores=1, sample_bytes=round(0.4 * size))
        for stage in found["stages"]:
            planned[stage["name"]][0] += stage["hours"] * 3600
            planned[stage["name"]][1] += stage["bytes"]
        for name, (seconds, written) in _taken(source, files, tokenizer, tmp_path).items():
            real[name][0] += seconds
            real[name][1] += written
    print({name: [p / r - 1 for p, r in zip(planned[name], real[name], strict=True)] for name in planned})
    for name in planned:
        for expected, measured in zip(planned[name], real[name], strict=True):
            assert expected == pytest.approx(measured, rel=WITHIN), name


def _taken(source: str, files: list[str], tokenizer: str, folder: Path) -> dict[str, tuple[float, int]]:
    text, prefix = folder / "text.jsonl", folder / "data"
    prepared = corpus._cpu_seconds(lambda: prepare(source, files, text, workers=1))
    tokenized = corpus._cpu_seconds(lambda: tokenize([text], tokenizer, prefix, workers=1))
    tokens = bin_path(prefix).stat().st_size + idx_path(prefix).stat().st_size
    return {"prepare": (prepared, text.stat().st_size), "tokenize": (tokenized, tokens)}
