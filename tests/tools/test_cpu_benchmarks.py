"""What the CPU benchmarks and the prediction are made of."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
PAGE = BENCHMARKS.parents[1] / "docs" / "benchmarks" / "prediction.md"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_ways_alternate_and_ratios_are_taken_within_a_round(tmp_path, capsys):
    from cpu import pairs

    order, clock = [], iter([1.0, 2.0, 6.0, 3.0, 5.0, 10.0])

    def way(name):
        order.append(name)
        return {"seconds": next(clock)}

    found = pairs.alternate({"a": lambda: way("a"), "b": lambda: way("b")}, 3)
    assert "".join(order) == "abbaab"
    assert found["a"] == [{"seconds": 1.0}, {"seconds": 3.0}, {"seconds": 5.0}]
    assert pairs.ratio(found["b"], found["a"], "seconds") == (2.0, 2.0, 2.0)
    pairs.write(tmp_path / "out", "name", {}, found, pairs.table(["x"], [["1"]]))
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["rounds"] == found
    assert {"commit", "cpu", "versions", "load"} <= set(written)
    assert "| 1 |" in (tmp_path / "out.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_loader_gives_the_same_kind_of_batches(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    import torch
    from cpu import loader_throughput as loaders

    monkeypatch.setattr(loaders, "LENGTH", 16)
    ways = loaders.prepared(tmp_path, steps=2)
    for name in ("megatron_steel", "DataLoader, memmap", "DataLoader, HF datasets"):
        batches = list(ways[name](2 * loaders.BATCH // loaders.MICRO))
        assert len(batches) == 2 * loaders.BATCH // loaders.MICRO
        for batch in batches:
            assert batch["input_ids"].shape == batch["labels"].shape == (loaders.MICRO, 16)
            assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_heads_give_the_same_loss(monkeypatch):
    from cpu import head_variants as heads

    monkeypatch.setattr(heads, "SIZES", {"tokens": 33, "width": 8, "words": 101, "chunk": 7})
    plain, chunked = (heads.measure(way, "fp32")["loss"] for way in ("plain", "chunked"))
    assert chunked == pytest.approx(plain, rel=1e-6)


def test_a_step_costs_the_sum_of_its_pieces_and_more_where_less_is_fused():
    from roofline import EAGER, FUSED, Device, Shape, pieces, share_of_peak, tokens_per_second

    device = Device("made up", 1e15, 4e12, 80, (0.25, 0.5))
    shape = Shape("made up", hw=6e9, attention=1e9, head=1e9, weights=10**9, layers=10, hidden=1000, inner=4000,
                  heads_width=2000, words=100_000)  # fmt: skip
    parts = pieces(shape, device, FUSED, 131_072)
    assert parts["attention"] == pytest.approx(1e6 * 0.5e9 / 0.5e15)
    assert parts["head"] == pytest.approx(1e6 * 12 * 100_000 / (4.3 / 4.8 * 4e12))
    rate = tokens_per_second(shape, device, FUSED, 131_072)
    assert rate == pytest.approx(1e6 / sum(parts.values()))
    assert share_of_peak(shape, device, rate) == pytest.approx(rate * 6e9 / 1e15)
    assert share_of_peak(shape, device, rate) < 790 / 989.5
    eager, again = pieces(shape, device, EAGER, 131_072), pieces(shape, device, FUSED, 131_072, checkpointing=True)
    assert all(eager[name] >= parts[name] for name in parts)
    assert again["products"] == pytest.approx(parts["products"] * (4 * 4 / 3 + 1) / 5)  # the head is not done again


def test_the_page_is_marked_as_prediction_and_holds_no_measured_figure():
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith("# A prediction, not a measurement")
    tables = [block.split("\n") for block in text.split("\n\n") if block.startswith("| ")]
    measured = [rows for rows in tables if rows[0].endswith("| measured |")]
    assert len(measured) == 2
    for _, _, *rows in measured:
        assert rows
        assert all(row.endswith("| not run |") for row in rows)


@pytest.mark.slow
def test_the_page_is_what_the_script_writes():
    import prediction

    remedy = "run `python tools/benchmarks/prediction.py --output docs/benchmarks/prediction.md`"
    assert PAGE.read_text(encoding="utf-8") == prediction.document(), remedy
