"""The tables of docs/scale.md and docs/plan.md are the planner's own."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_steel.planner import scale, traffic
from megatron_steel.planner.hardware import parse_cluster
from megatron_steel.planner.work import work_of_model
from megatron_steel.recipe import load_recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"


WORK = work_of_model(load_recipe("tinyllama-1.1b").model, 2048)
FAST, SLOW = (parse_cluster("2x8xH100", link) for link in ("3200Gb/s", "100Gb/s"))


@pytest.fixture(scope="module")
def rows():
    return scale.table(WORK, FAST, micro_batch=8)


def test_the_tables_of_the_page_are_what_the_functions_say(rows):
    page = (DOCS / "scale.md").read_text(encoding="utf-8")
    assert scale.as_markdown(rows) in page
    assert scale.as_markdown(scale.table(WORK, SLOW, micro_batch=8, nodes=(1, 8, 1000))) in page
    for nodes in (8, 64, 1000):
        budget = scale.hop_budget(WORK, replace(FAST, nodes=nodes), 8)
        assert f"| {nodes:,} | {nodes * 8 - 1:,} | {budget * 1e6:.1f} |" in page


def test_volumes_are_those_of_the_papers():
    """In units of the model's 16-bit values: 2, 3 and, between nodes with ZeRO++, 0.75 (arXiv 2306.10209, table 1)."""
    p, ranks = 10**9, 10**6
    values = {scheme: traffic.traffic(p, scheme, ranks).of_step(1) / (2 * p) for scheme in (0, 2, 3, "zero++")}
    assert values == pytest.approx({0: 2, 2: 2, 3: 3, "zero++": 0.75}, rel=1e-5)
    assert traffic.traffic(p, 3, 1).of_step(8) == 0
    assert traffic.traffic(p, 3, 8).of_step(4) == 4 * traffic.traffic(p, 3, 8).of_step(1)
    assert traffic.traffic(p, 1, 8).of_step(4) == traffic.traffic(p, 1, 8).of_step(1)


def test_what_grows_and_what_does_not(rows):
    by = {(row.scheme, row.nodes): row for row in rows}
    assert by["ZeRO-1", 1000].state_bytes < by["ZeRO-1", 1].state_bytes
    assert by["ZeRO-3", 1000].communication == pytest.approx(by["ZeRO-3", 8].communication, rel=0.03)
    assert by["ZeRO++", 1000].communication == pytest.approx(by["ZeRO-3", 1000].communication / 4, rel=0.01)
    assert by["ZeRO-1", 1000].tokens_per_step == 1000 * by["ZeRO-1", 1].tokens_per_step
    assert all(row.efficiency <= 1 for row in rows)
