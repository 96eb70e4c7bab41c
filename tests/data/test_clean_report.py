"""The account of a cleaning: sums that must hold, and the table and picture made from them."""

import pytest

from megatron_steel.data.clean import report

STEPS = [
    {"operator": "load", "seconds": 0.0, "by_source": {"a": 9, "b": 5}},
    {"operator": "mapper", "seconds": 0.1, "by_source": {"a": 9, "b": 5}, "changed": {"rows": 3, "characters": -7}},
    {"operator": "filter", "seconds": 0.1, "by_source": {"a": 4, "b": 5}},
    {"operator": "filter", "seconds": 0.1, "by_source": {"b": 2}},
]
GIVEN = {"a": 10, "b": 5}


def test_every_row_is_accounted_for():
    found = report.build(STEPS, GIVEN, 2)
    assert (found["rows_in"], found["kept"], found["dropped"]) == (15, 2, 13)
    assert [(e["operator"], e["in"], e["kept"], e["dropped"]) for e in found["operators"]] == [
        ("load", 15, 14, 1), ("mapper", 14, 14, 0), ("filter", 14, 9, 5), ("filter", 9, 2, 7)
    ]  # fmt: skip
    assert found["operators"][3]["dropped_by_source"] == {"a": 4, "b": 3}
    assert found["sources"] == {"a": {"in": 10, "kept": 0}, "b": {"in": 5, "kept": 2}}
    assert found["operators"][1]["rows_changed"] == 3


def test_loading_that_loses_nothing_is_no_operator():
    steps = [{"operator": "load", "seconds": 0.0, "by_source": GIVEN}]
    assert report.build(steps, GIVEN, 15)["operators"] == []


def test_an_export_of_another_length_is_refused():
    with pytest.raises(RuntimeError, match="counted 2 rows and exported 1"):
        report.build(STEPS, GIVEN, 1)


@pytest.mark.parametrize("by_source", [{"a": 10, "b": 5}, {"b": 2, "c": 1}])
def test_rows_from_nowhere_are_refused(by_source):
    more = {"operator": "more", "seconds": 0.0, "by_source": by_source}
    with pytest.raises(RuntimeError, match="more left more rows"):
        report.build([*STEPS, more], GIVEN, 15)


def test_the_table_holds_every_figure():
    found = {**report.build(STEPS, GIVEN, 2), "left_out": [{"operator": "x", "reason": "needs y"}]}
    lines = report.table(found).splitlines()
    assert lines[0] == "| operator | in | dropped | a | b | rows changed |"
    assert lines[3] == "| mapper | 14 | 0 |  |  | 3 |"
    assert lines[5] == "| filter | 9 | 7 | 4 | 3 |  |"
    assert lines[6] == "| **kept** | 15 | 2 left | 0 of 10 | 2 of 5 | |"
    assert lines[-1] == "Left out: x (needs y)."
    assert len({line.count("|") for line in lines[:7]}) == 1, "each row as many cells as the head"


def test_the_picture_is_a_png_and_the_same_each_time(tmp_path):
    found = report.build(STEPS, GIVEN, 2)
    for name in ("one.png", "two.png"):
        report.draw({"mine": found, "theirs": found}, tmp_path / name)
    one = (tmp_path / "one.png").read_bytes()
    assert one.startswith(b"\x89PNG")
    assert one == (tmp_path / "two.png").read_bytes()
