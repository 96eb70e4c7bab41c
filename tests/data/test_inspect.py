"""A look at a data set: counts that equal a walk over it, samples that are documents, a bounded look at large data."""

import json

import numpy as np
import pytest

from megatron_steel import cli
from megatron_steel.data import inspect, manifest
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.data.tokenizer import load_tokenizer


@pytest.fixture
def corpus(tmp_path):
    generator = np.random.default_rng(2)
    documents = [generator.geometric(0.05, n).clip(1, 127) for n in generator.integers(0, 700, 300)]
    documents[17] = []
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        for ids in documents:
            writer.add_document(ids)
    return tmp_path / "d", documents


def test_counts_equal_a_walk(corpus, tiny_tokenizer):
    prefix, documents = corpus
    report = inspect.look(prefix, load_tokenizer(tiny_tokenizer))
    lengths, stream = [len(d) for d in documents], np.concatenate(documents).astype(int)
    assert report.facts["documents"] == report.documents_counted == 300
    assert report.tokens_counted == len(stream)
    assert report.lengths["mean"] == round(np.mean(lengths), 1)
    assert (report.lengths["least"], report.lengths["most"]) == (0, max(lengths))
    assert report.lengths["empty"] == lengths.count(0)
    assert report.lengths["median"] in lengths
    lows = [low for low, _ in report.histogram]
    assert lows == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512][: len(lows)]
    for low, count in report.histogram:
        assert count == sum(low <= n < max(1, 2 * low) for n in lengths)
    times = np.bincount(stream)
    assert [count for _, count, _ in report.frequency] == sorted(times[times > 0], reverse=True)[:20]
    assert all(times[token] == count and text == f"w{token}" for token, count, text in report.frequency if token > 2)
    assert (report.distinct, report.vocabulary) == (len(set(stream.tolist())), 128)
    assert report.ranks[0] == (1, times.max())
    for number, length, text in report.samples:
        assert length == len(documents[number])
        assert text.split()[3:9] == [
            f"w{i}" if i > 2 else text.split()[k + 3] for k, i in enumerate(documents[number][3:9])
        ]
    assert [number for number, _, _ in report.samples] == [0, 100, 199, 299]


def test_the_verb_writes_text_json_and_a_picture(corpus, tiny_tokenizer, tmp_path, capsys):
    prefix, documents = corpus
    files = ["--json", str(tmp_path / "r.json"), "--picture", str(tmp_path / "r.png")]
    assert cli.main(["inspect", str(prefix), "--tokenizer", str(tiny_tokenizer), *files]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert "all 300 documents" in printed
    assert f"of 128 ids are used ({report['vocabulary_used']:.1%})" in printed
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert report["facts"]["tokens"] == sum(map(len, documents))
    assert cli.main(["inspect", str(prefix)]) == 0  # ids without a tokenizer
    assert " ".join(map(str, documents[0][:50])) in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "none")]) == 78


def test_one_document_and_one_token_are_enough(tmp_path):
    with IndexedWriter(tmp_path / "d", np.int32) as writer:
        writer.add_document([5])
    report = inspect.look(tmp_path / "d")
    assert (report.histogram, report.samples) == ([(1, 1)], [(0, 1, "5")])
    assert (report.distinct, report.vocabulary, report.ranks) == (1, 6, [(1, 1)])


def test_large_data_is_looked_at_evenly_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "_MOST_DOCUMENTS", 1 << 10)
    monkeypatch.setattr(inspect, "_MOST_TOKENS", 1 << 12)
    documents = 5000
    with IndexedWriter(tmp_path / "d", np.int32) as writer:
        for number in range(documents):  # lengths and ids grow with the place
            writer.add_document(np.full(1 + number // 500, number // 500, np.int32))
    report = inspect.look(tmp_path / "d")
    assert (report.documents_counted, report.tokens_counted) == (1 << 10, 1 << 12)
    assert report.lengths["mean"] == pytest.approx(5.5, abs=0.1)
    assert (report.lengths["least"], report.lengths["most"]) == (1, 10)
    share = {token: count / report.tokens_counted for token, count, _ in report.frequency}
    assert share == pytest.approx({token: (token + 1) / 55 for token in range(10)}, abs=0.01)
    assert "1,024 of 5,000 documents, evenly spread" in inspect.as_text(report)


def test_an_index_that_does_not_rise_is_named(corpus):
    prefix, _ = corpus
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(34 + 12 * IndexedDataset(prefix).sequences + 8 * 5)
        file.write((10**6).to_bytes(8, "little"))
    assert manifest.describe(prefix)["documents"] == 300
    assert cli.main(["inspect", str(prefix)]) == 78
