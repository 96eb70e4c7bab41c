"""Resumed == uninterrupted, bitwise on the CPU (stops on request: tests/faults/test_stop.py)."""

import shutil

import pytest


def _curve(rows):
    keys = ("loss", "grad_norm", "lr", "tokens", "samples")
    return {step: [row[k] for k in keys] + [row.get("validation_loss")] for step, row in rows.items()}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stop_and_resume_in_a_fresh_process_is_bitwise(ranks, tiny_recipe, launch, metrics, tmp_path):
    launch(ranks, tiny_recipe, f"run.dir={tmp_path}/straight")
    # Without its last checkpoint a copy of the run has only the one of step 3, and lines that go on to step 6.
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    done = launch(ranks, tiny_recipe, f"run.dir={tmp_path}/cut")
    assert "going on from" in done.stdout + done.stderr
    straight, cut = metrics(tmp_path / "straight"), metrics(tmp_path / "cut")
    assert sorted(straight) == [1, 2, 3, 4, 5, 6]
    assert _curve(straight) == _curve(cut)
