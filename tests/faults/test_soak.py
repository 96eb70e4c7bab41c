"""Half an hour under random SIGKILLs, four minutes apart on average: goodput, and weights bitwise the undisturbed run's.

    pytest -m slow -s tests/faults/test_soak.py            SOAK_MINUTES=5 for a short one

A step is made a second longer by a sleep, as on a GPU, where the processor has time for a restart. Goodput is what the
steps of the whole run take when nothing disturbs them (the sleep and the undisturbed run's median step), against all
seconds from the first command to the end.
"""

import os
import random
import statistics
import time

import pytest
import torch
from jobs import Job, curve

from megatron_steel.checkpoint.commit import newest_whole, verify
from megatron_steel.checkpoint.zero import stream_weights

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
SECONDS_BETWEEN_KILLS = 240.0
STEP_SECONDS = 1.0
VICTIMS = ("rank 0", "rank 1", "launch.py", "deepspeed")
FAULT = ("megatron_steel.train.loop", "train_step", f"import time; time.sleep({STEP_SECONDS})")


def kill(job: Job, victim: str) -> bool:
    """False where it does not live at the moment."""
    try:
        if victim.startswith("rank"):
            job.ranks()[int(victim[-1])].kill()
        else:
            (job.node_launcher() if victim == "launch.py" else job.runner()).kill()
    except (ValueError, IndexError):  # between two starts
        return False
    return True


@pytest.mark.slow
def test_soak(tiny_recipe, metrics, tmp_path):
    steps = int(60 * MINUTES * 0.85 / STEP_SECONDS)
    settings = (f"train.steps={steps}", f"train.eval_every_steps={steps}", "schedule.name=constant",
                "train.log_every_steps=5")  # fmt: skip
    with Job(tiny_recipe, tmp_path / "straight", *settings) as job:
        assert job.end(3600) == 0, job.output()[-6000:]
    dice, kills, inside = random.Random(43), [], 0
    begin = time.monotonic()
    next_kill = begin + dice.expovariate(1 / SECONDS_BETWEEN_KILLS)
    often = "train.save_every_steps=20"
    with Job(tiny_recipe, tmp_path / "run", *settings, often, supervised=True, fault=FAULT) as job:
        while job.process.poll() is None:
            victim = dice.choice(VICTIMS)
            if time.monotonic() >= next_kill and kill(job, victim):
                inside += any((tmp_path / "run" / "checkpoints").glob(".step-*.tmp"))
                kills.append(victim)
                next_kill = time.monotonic() + dice.expovariate(1 / SECONDS_BETWEEN_KILLS)
            time.sleep(0.1)
        seconds = time.monotonic() - begin
        assert job.process.returncode == 0, job.output()[-6000:]
    rows = metrics(tmp_path / "straight").values()
    undisturbed = STEP_SECONDS + statistics.median(row["seconds_step"] for row in rows if "seconds_step" in row)
    goodput = steps * undisturbed / seconds
    print(f"figure: soak: {seconds / 60:.1f} min, {len(kills)} kills ({', '.join(kills)}; {inside} inside a save), "
          f"{steps} steps, goodput {goodput:.1%}, the sleep alone {steps * STEP_SECONDS / seconds:.1%}")  # fmt: skip
    assert curve(metrics(tmp_path / "run")) == curve(metrics(tmp_path / "straight"))
    ends = [newest_whole(tmp_path / name / "checkpoints")[0] for name in ("run", "straight")]
    assert all(end.step == steps and verify(end.path) for end in ends)
    for (name, ours), (other, theirs) in zip(*(stream_weights(end.path) for end in ends), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name
    assert goodput >= 0.8
