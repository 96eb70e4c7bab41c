"""What goes out can be read back: real TensorBoard files, JSON lines cut back on resume, a picture."""

import json
import re
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.train.monitor import METRICS, SAMPLES, STARTS, Monitor, cut_back, draw_losses, read_metrics

SCALARS = {"loss", "validation_loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory_gib", "samples",
           "seconds_data", "seconds_forward", "seconds_backward", "seconds_optimizer", "seconds_step"}  # fmt: skip


def _board(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_a_run_writes_the_same_numbers_everywhere(tiny_recipe, tiny_data, launch, metrics, tmp_path):
    with IndexedWriter(tmp_path / "other", np.uint16) as writer:
        writer.add_document(np.arange(3, 100).repeat(4).astype(np.uint16))
    sets = f"data.validation=[{{prefix: {tiny_data}/validation}}, {{prefix: {tmp_path}/other}}]"
    done = launch(
        1, tiny_recipe, f"run.dir={tmp_path}/run", sets, "train.sample_prompts=['w5 w6', '']", "train.sample_tokens=5"
    )
    events, rows = _board(tmp_path / "run" / "tensorboard"), metrics(tmp_path / "run")
    assert set(events.Tags()["scalars"]) >= SCALARS
    for tag in SCALARS - {"validation_loss"}:
        assert [e.step for e in events.Scalars(tag) if e.step not in (3, 6)] == [1, 2, 4, 5], tag
    for event in events.Scalars("loss"):
        assert event.value == pytest.approx(rows[event.step]["loss"], rel=1e-6)
    assert [e.step for e in events.Scalars("validation_loss")] == [3, 6]
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "hidden_size: 32" in text
    assert "step      6/6 | loss" in done.stdout + done.stderr
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("recipe.yaml", "ds_config.json", "environment.json"):
        assert (tmp_path / "run" / name).is_file()
    _every_tag_has_its_chart(events)
    _texts_are_in_both_places(events, read_metrics(tmp_path / "run" / SAMPLES))
    by_set = {name: rows[6][f"validation_loss/{name}"] for name in ("validation", "other")}
    low, high = sorted(by_set.values())
    assert low < rows[6]["validation_loss"] < high  # 10 samples of both
    starts = [json.loads(line) for line in (tmp_path / "run" / STARTS).read_text().splitlines()]
    assert [(s["event"], s["from_step"], s["steps"], s["ranks"]) for s in starts] == [("start", 0, 6, 1), ("end", 0, 6, 1)]  # fmt: skip
    assert starts[0]["time"] <= rows[1]["time"] <= rows[6]["time"] <= starts[1]["time"]


def _every_tag_has_its_chart(events):
    """TensorBoard's plugin shows in a chart what `re.match` of one of its expressions finds."""
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors(metadata.CONFIG_SUMMARY_TAG)[-1].tensor_proto.string_val[0])
    assert [group.title for group in layout.category] == ["learning", "speed", "health", "data"]
    tags = events.Tags()["scalars"]
    shown = {
        chart.title: [tag for tag in tags if any(re.match(e, tag) for e in chart.multiline.tag)]
        for group in layout.category
        for chart in group.chart
    }
    assert sorted(tag for found in shown.values() for tag in found) == sorted(tags)  # each once
    assert {title for title, found in shown.items() if not found} == {
        "share of peak",
        "spikes gone back from",
        "loss scale (fp16)",
    }
    assert shown["loss"] == ["loss", "validation_loss"]
    of_loss = next(c.multiline.tag for g in layout.category for c in g.chart if c.title == "loss")
    assert [t for t in ("loss (sees future)", "loss_scale") if any(re.match(e, t) for e in of_loss)] == [
        "loss (sees future)"
    ]
    assert set(shown["validation loss by data set"]) == {"validation_loss/validation", "validation_loss/other"}


def _texts_are_in_both_places(events, rows):
    assert [(r["step"], r["prompt"]) for r in rows] == [(3, "w5 w6"), (3, ""), (6, "w5 w6"), (6, "")]
    for number in (1, 2):
        shown = events.Tensors(f"samples/{number}/text_summary")
        assert [e.step for e in shown] == [3, 6]
        of_file = [f"    {r['prompt']}|{r['text']}" for r in rows[number - 1 :: 2]]
        assert [e.tensor_proto.string_val[0].decode() for e in shown] == of_file


def test_lines_after_the_checkpoint_and_torn_lines_are_cut(tmp_path):
    file = tmp_path / METRICS
    file.write_text("".join(json.dumps({"step": s, "loss": s / 2}) + "\n" for s in (1, 2, 3, 4)) + '{"step": 5, "lo')
    cut_back(file, 3)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": s, "loss": s / 2} for s in (1, 2, 3)
    ]


def test_a_resumed_board_shows_each_step_once(tmp_path):
    for first, from_step, value in ((1, 0, 1.0), (3, 2, 2.0)):
        time.sleep(1.1)  # TensorBoard orders its files by the second in their names, then by a counter as text
        monitor = Monitor(tmp_path, from_step)
        for step in range(first, 5):
            monitor.scalars(step, {"tokens": step * 10.0, "loss": value})
        monitor.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / METRICS)] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert [(e.step, e.value) for e in _board(tmp_path / "tensorboard").Scalars("loss")] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
    ]


def test_a_loss_that_sees_the_future_says_so_in_its_tag(tmp_path):
    monitor = Monitor(tmp_path, 0, sees_future=True)
    monitor.scalars(1, {"tokens": 1.0, "loss": 2.0, "validation_loss/zh": 2.5, "lr": 0.1})
    monitor.close()
    marked = {"loss (sees future)", "validation_loss/zh (sees future)"}
    assert set(_board(tmp_path / "tensorboard").Tags()["scalars"]) == {"tokens", "lr", *marked}


def test_a_text_with_strange_line_ends_survives_a_resume(tmp_path):
    strange = "a\u2028b\x85c\n\n``` d|e\r钢"
    for from_step in (0, 4):
        monitor = Monitor(tmp_path, from_step)
        for step in (from_step + 2, from_step + 4):
            monitor.samples(step, 10 * step, ["p"], [strange])
        monitor.go_back(from_step + 2)
        monitor.samples(from_step + 4, 0, ["p"], [strange])
        monitor.close()
    rows = read_metrics(tmp_path / SAMPLES)
    assert [(r["step"], r["text"]) for r in rows] == [(step, strange) for step in (2, 4, 6, 8)]


def test_numbers_that_are_none_stay_valid_json(tmp_path):
    monitor = Monitor(tmp_path, 0)
    monitor.scalars(1, {"tokens": 1.0, "loss": float("nan")})
    monitor.close()
    row = json.loads((tmp_path / METRICS).read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "time": row["time"], "tokens": 1.0, "loss": None}
    assert draw_losses(tmp_path) is None
