"""Hours and disk of the data stages: samples are cut right, and the real corpora take what was planned."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_steel.data.indexed import bin_path, idx_path
from megatron_steel.data.prepare import prepare
from megatron_steel.data.tokenize import tokenize
from megatron_steel.errors import SteelError
from megatron_steel.planner import corpus

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
    taken, stands = corpus.cut(str(jsonl), tmp_path / "s", 20_000)
    text = Path(taken).read_text()
    assert "".join(lines).startswith(text)
    assert text.endswith("\n")
    assert 20_000 <= stands == len(text) < 20_200
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": [f"row {i} " + "x" * 90 for i in range(1000)]}), table, row_group_size=100)
    taken, stands = corpus.cut(str(table), tmp_path / "s", table.stat().st_size // 4)
    assert pq.read_table(taken).to_pylist() == pq.read_table(table).to_pylist()[:250]
    assert stands == pytest.approx(table.stat().st_size / 4, rel=0.01)
    whole, stands = corpus.cut(str(jsonl), tmp_path / "s", 10**9)
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


def test_bad_sizes_are_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a long enough row of text"}\n')
    with pytest.raises(SteelError, match="is no size"):
        corpus.plan([str(file)], total_size="many")
    with pytest.raises(SteelError, match="0 cores"):
        corpus.plan([str(file)], cores=0)


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
