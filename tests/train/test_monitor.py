"""What goes out can be read back: real TensorBoard files, JSON lines cut back on resume, a picture."""

import json
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_steel.train.monitor import METRICS, Monitor, cut_back, draw_losses, read_metrics

SCALARS = {"loss", "validation_loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory_gib", "samples",
           "seconds_data", "seconds_forward", "seconds_backward", "seconds_optimizer", "seconds_step"}  # fmt: skip


def _board(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_a_run_writes_the_same_numbers_everywhere(tiny_recipe, launch, metrics, tmp_path):
    done = launch(1, tiny_recipe, f"run.dir={tmp_path}/run")
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
    monitor.scalars(1, {"tokens": 1.0, "loss": 2.0, "lr": 0.1})
    monitor.close()
    assert set(_board(tmp_path / "tensorboard").Tags()["scalars"]) == {"tokens", "loss (sees future)", "lr"}


def test_numbers_that_are_none_stay_valid_json(tmp_path):
    monitor = Monitor(tmp_path, 0)
    monitor.scalars(1, {"tokens": 1.0, "loss": float("nan")})
    monitor.close()
    assert json.loads((tmp_path / METRICS).read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "tokens": 1.0,
        "loss": None,
    }
    assert draw_losses(tmp_path) is None
