"""`launch/slurm.sbatch` under a real Slurm of two nodes: stopped, queued again, finished; cancelled."""

import json
import re
from pathlib import Path

import psutil
import pytest
from jobs import curve
from slurm_here import Slurm, lacking

pytestmark = [pytest.mark.multihost, pytest.mark.slow]
SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
WHOLE = ("train.steps=24", "train.save_every_steps=100", "train.eval_every_steps=10", "schedule.name=constant")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := lacking():
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm") / "here") as here:
        # One rank a node, slowly; nodes get it by DeepSpeed's file.
        step = "import time; time.sleep(0.3)"
        fault = json.dumps({"module": "megatron_steel.train.loop", "function": "train_step", "code": step})
        (here.folder / "nodes.env").write_text(f"FAULT={fault}\n")
        inject = Path(__file__).resolve().parents[1] / "faults" / "inject"
        here.environment |= {
            "OMP_NUM_THREADS": "1", "SLURM_GPUS_ON_NODE": "1", "GLOO_SOCKET_IFNAME": "lo",
            "DS_ENV_FILE": f"{here.folder}/nodes.env", "PYTHONPATH": f"{inject}:{SCRIPT.parents[1]}",
        }  # fmt: skip
        yield here


def _submit(slurm, recipe, run, *overrides):
    words = ("--nodes=2", "--time=30", "--output=%j.out", str(SCRIPT), str(recipe), f"run.dir={run}", *overrides)
    said = slurm("sbatch", *words)
    assert said.startswith("Submitted batch job"), said
    return said.split()[-1]


def _until(condition, what, output, seconds=400):
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}\n{output.read_text()[-6000:] if output.exists() else 'no output'}"
        time.sleep(0.3)


def _steps(run):
    file = run / "metrics.jsonl"
    return max([int(n) for n in re.findall(r'"step": (\d+)', file.read_text())], default=0) if file.exists() else 0


def _alive(run):
    return [p for p in psutil.process_iter(["cmdline"]) if f"run.dir={run}" in (p.info["cmdline"] or ())]


def test_a_job_that_is_told_to_stop_is_queued_again_and_ends_bitwise(slurm, launch, tiny_recipe, metrics, tmp_path):
    """As before the time limit: SIGTERM to the batch shell."""
    launch(2, tiny_recipe, f"run.dir={tmp_path}/straight", *WHOLE)
    run = tmp_path / "run"
    job = _submit(slurm, tiny_recipe, run, *WHOLE)
    output = slurm.folder / f"{job}.out"
    _until(lambda: _steps(run) >= 5, "five steps", output)
    assert slurm("scancel", "--batch", "--signal=TERM", job) == ""
    _until(lambda: slurm.state(job)["Restarts"] == "1", "queued again", output)
    _until(lambda: not _alive(run), "nothing is left", output, 30)
    stopped = _steps(run)
    assert 5 <= stopped < 24
    assert (run / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()
    slurm("scontrol", "update", f"jobid={job}", "starttime=now")  # Slurm lets two minutes pass
    _until(lambda: slurm.state(job)["JobState"] == "COMPLETED", "complete", output)
    assert slurm.state(job)["ExitCode"] == "0:0"
    assert curve(metrics(run)) == curve(metrics(tmp_path / "straight"))
    assert not _alive(run)


def test_a_cancelled_job_stays_cancelled(slurm, tiny_recipe, tmp_path):
    run = tmp_path / "run"
    job = _submit(slurm, tiny_recipe, run, *WHOLE[1:], "train.steps=100000")
    output = slurm.folder / f"{job}.out"
    _until(lambda: _steps(run) >= 3, "three steps", output)
    slurm("scancel", job)
    _until(lambda: not _alive(run), "nothing is left", output, 90)
    _until(lambda: slurm.state(job)["JobState"] == "CANCELLED", "cancelled", output, 60)
    assert slurm.state(job)["Restarts"] == "0"
    assert list((run / "checkpoints").iterdir())  # the ranks were told too, and saved


def test_bad_input_is_not_queued_again(slurm, tiny_recipe, tmp_path):
    job = _submit(slurm, tiny_recipe, tmp_path / "run", "optim.lrr=1")
    _until(lambda: slurm.state(job)["JobState"] == "FAILED", "failed", slurm.folder / f"{job}.out", 90)
    assert slurm.state(job)["ExitCode"] == "78:0"
    assert "did you mean optim.lr?" in (slurm.folder / f"{job}.out").read_text()
