"""Resumed == uninterrupted, bitwise on the CPU; a stop on request loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import launch_command, one_thread


def _curve(rows):
    keys = ("loss", "grad_norm", "lr", "tokens", "samples")
    return {step: [row[k] for k in keys] + [row.get("validation_loss")] for step, row in rows.items()}


@pytest.mark.parametrize("ranks", [1, 2])
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


def test_sigterm_to_one_rank_saves_together_and_exits_75(tiny_recipe, launch, metrics, tmp_path):
    run = tmp_path / "run"
    arguments = (
        tiny_recipe,
        f"run.dir={run}",
        "train.steps=400",
        "train.save_every_steps=400",
        "train.eval_every_steps=400",
    )
    process = subprocess.Popen(launch_command(2, *arguments), env=one_thread(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
        if process.poll() is not None or time.time() > deadline:
            pytest.fail(process.communicate()[0][-4000:])
        time.sleep(0.2)
    os.kill(int((run / "run.lock").read_text().split()[0]), signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output[-4000:]
    assert "on request (SIGTERM)" in output
    (checkpoint,) = (run / "checkpoints").iterdir()
    step = json.loads((checkpoint / "manifest.json").read_text())["step"]
    assert 1 <= step < 400
    launch(2, *arguments, f"train.steps={step + 2}")
    assert sorted(metrics(run)) == list(range(1, step + 3))
    assert not list((run / "checkpoints").glob(".*"))
