"""Numbers that are none: no rank's weights or moments move, every rank agrees, it is counted, the curve says so.

NaN and infinite losses and gradients on one rank of two, in every engine configuration; loss spikes, which the run goes back
behind; bits that flip on one rank.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import free_port, one_thread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = str(Path(__file__).with_name("run_spoiled.py"))
FAULTS = ["2:1:nan-loss", "3:1:nan-gradient", "4:0:inf-loss", "5:1:-inf-gradient"]
RUN = ["train.save_every_steps=1", "train.keep_last=9", "train.eval_every_steps=100", "data.validation=null"]
FILES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]


def tensors_of(checkpoint: Path) -> dict[str, "object"]:
    """Every tensor in DeepSpeed's files of a checkpoint, by file and path within it."""
    import torch

    found = {}

    def walk(path, value):
        if torch.is_tensor(value):
            found[path] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}/{key}", inner)
        elif isinstance(value, (list, tuple)):
            for number, inner in enumerate(value):
                walk(f"{path}/{number}", inner)

    for file in sorted((checkpoint / "engine").glob("*.pt")):
        walk(file.name, torch.load(file, map_location="cpu", weights_only=False))
    assert found
    return found


def differing(a: Path, b: Path) -> list[str]:
    import torch

    one, two = tensors_of(a), tensors_of(b)
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]


def spoiled(ranks: int, recipe, *words, expect: int = 0) -> str:
    """Run the script on `ranks` ranks without a launcher; every rank must exit with `expect`. Returns what all said."""
    together = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = [
        subprocess.Popen([sys.executable, SCRIPT, str(recipe), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         env={**one_thread(), **together, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [expect] * ranks, "\n".join(text[-4000:] for text in said)
    return "\n".join(said)


def step_folder(run, step: int) -> Path:
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def _runs(tmp_path, wanted):
    words = []
    for precision, file in wanted:
        words += ["+"] if words else []
        words += [
            *FAULTS,
            f"run.dir={tmp_path}/{precision}-{file}",
            f"deepspeed.config={file}.json",
            f"train.precision={precision}",
            *RUN,
        ]
    return words


@pytest.mark.parametrize("wanted", [
    pytest.param([("fp32", "zero3"), ("bf16", "zero1")], id="two"),
    pytest.param([(p, f) for p in ("fp32", "bf16") for f in FILES], id="all", marks=pytest.mark.slow),
])  # fmt: skip
def test_no_weight_moves_and_every_rank_agrees(wanted, tiny_recipe, metrics, tmp_path):
    said = spoiled(2, tiny_recipe, *_runs(tmp_path, wanted))
    for precision, file in wanted:
        run = tmp_path / f"{precision}-{file}"
        for step in (2, 3, 4, 5):
            assert differing(step_folder(run, 1), step_folder(run, step)) == [], (run.name, step)
        assert differing(step_folder(run, 5), step_folder(run, 6)), run.name
        rows = metrics(run)
        assert [rows[s]["loss"] is None for s in range(1, 7)] == [False, True, False, True, False, False], run.name
        assert [rows[s]["skipped_steps"] for s in range(1, 7)] == [0, 1, 2, 3, 4, 4], run.name
        assert math.isfinite(rows[6]["grad_norm"])
        assert json.loads((step_folder(run, 5) / "manifest.json").read_text())["skipped_steps"] == 4
    assert said.count("the weights were left as they are") == 4 * len(wanted)  # told once


@pytest.mark.slow
def test_ten_in_a_row_end_the_run_and_what_was_saved_is_good(tiny_recipe, metrics, tmp_path):
    """Exit 70, told once. The checkpoint saved in between holds the weights of the last step that counted."""
    faults = [f"{step}:{step % 2}:nan-loss" for step in range(3, 13)]
    run = [f"run.dir={tmp_path}/run", "train.steps=14", "train.eval_every_steps=100", "train.save_every_steps=2",
           "train.keep_last=9", "schedule.name=constant"]  # fmt: skip
    said = spoiled(2, tiny_recipe, *faults, *run, expect=70)
    assert said.count("of 10 steps in a row are not finite") == 1
    assert sorted(p.name[-2:] for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["02", "04", "06", "08", "10"]
    assert differing(step_folder(tmp_path / "run", 2), step_folder(tmp_path / "run", 10)) == []
    spoiled(2, tiny_recipe, *run)
    rows = metrics(tmp_path / "run")
    assert rows[14]["skipped_steps"] == 8
    assert all(rows[step]["loss"] for step in range(11, 15))


@pytest.mark.parametrize(
    ("ranks", "config", "precision", "fault", "says"),
    [
        (2, "zero1", "fp32", "3:1:flip", "ranks 0, 1 among each other"),
        pytest.param(2, "zero0", "fp32", "2:1:flip", "ranks 0, 1 among each other", marks=pytest.mark.slow),
        pytest.param(3, "zero0", "bf16", "3:1:flip", "rank 1", marks=pytest.mark.slow),
        pytest.param(3, "zero2", "bf16", "3:2:flip", "rank 2", marks=pytest.mark.slow),
    ],
)
def test_a_bit_that_flips_on_one_rank_is_found_at_the_save(
    ranks, config, precision, fault, says, tiny_recipe, tmp_path
):
    """Row 36. At stage 0 in fp32 it is found at a later save too: nothing renews that weight."""
    said = spoiled(ranks, tiny_recipe, fault, f"run.dir={tmp_path}/run", f"deepspeed.config={config}.json", "train.steps=6",
                   f"train.precision={precision}", "train.global_batch_size=12", "data.validation=null", expect=70)  # fmt: skip
    assert said.count("the ranks' copies of model.embed_tokens.weight differ") == 1
    assert f"differ: {says}, at step 3" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


SPIKE = ["train.steps=60", "train.save_every_steps=10", "train.keep_last=9", "train.spike_score=6", "train.eval_every_steps=20",
         "schedule.name=constant", "optim.lr=3e-3"]  # fmt: skip
AT, BATCH = 45, 8  # the step whose batch is cursed; save_every 10: the run goes back to 40, without batches 44 and 45


def _names(recipe) -> list[str]:
    """Samples 0, 1, ... of the run, by name."""
    from run_spoiled import name_of

    from megatron_steel import preflight
    from megatron_steel.recipe import load_recipe

    resolved = load_recipe(str(recipe), SPIKE)
    plan = preflight.plan_run(resolved)
    order = preflight.plan_order(resolved, plan.train, 60, None)
    dataset = preflight.open_dataset(plan.train, order)
    return [name_of(dataset.tokens(n)[:-1]) for n in range(64 * BATCH)]


def _curve(rows) -> dict:
    keep = ("loss", "grad_norm", "lr", "tokens", "samples", "validation_loss")
    return {step: [row.get(key) for key in keep] for step, row in rows.items()}


def _with_the_skip_in_its_state(run: Path, to: Path, start: int, stop: int) -> None:
    """A copy of a run that ends at step 40, whose state says from there on that these samples are passed over."""
    from megatron_steel.checkpoint import commit
    from megatron_steel.data.order_json import from_json
    from megatron_steel.data.segments import skip

    shutil.copytree(run, to)
    for step in (50, 60):
        shutil.rmtree(step_folder(to, step))
    manifest = json.loads((step_folder(to, 40) / "manifest.json").read_text())
    manifest["order"] = skip(from_json(manifest["order"], to), start, stop).to_json()
    (step_folder(to, 40) / "manifest.json").write_text(json.dumps(commit.sealed(manifest)))


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, ["deepspeed.config=zero1.json"]),
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(2, ["deepspeed.config=zero0.json"], marks=pytest.mark.slow),
        pytest.param(2, ["deepspeed.config=zero1.json", "train.precision=bf16"], marks=pytest.mark.slow),
        pytest.param(2, ["deepspeed.config=zero2.json"], marks=pytest.mark.slow),
        pytest.param(2, ["deepspeed.config=zero3_offload.json", "train.precision=bf16"], marks=pytest.mark.slow),
    ],
)
def test_a_spike_is_gone_back_behind_and_its_samples_passed_over(ranks, settings, tiny_recipe, metrics, tmp_path):
    """Row 35. Twice from scratch, resumed after it, and from a state that has the window: all four bitwise the same."""
    names = _names(tiny_recipe)
    (tmp_path / "cursed").write_text(json.dumps([names[(AT - 1) * BATCH + 5]]))
    words = [f"cursed:{tmp_path}/cursed", *SPIKE, *settings]
    said = spoiled(ranks, tiny_recipe, *words, f"ids:{tmp_path}/ids", f"run.dir={tmp_path}/a",
                   "+", *words, f"run.dir={tmp_path}/b")  # fmt: skip
    told = f"spiked at step {AT}: back to {step_folder(tmp_path / 'a', 40)}, and on without samples 344 to 359"
    assert said.count(told) == 1

    handed: dict[int, list[list[str]]] = {}
    for line in (tmp_path / "ids").read_text().splitlines():
        handed.setdefault(json.loads(line)["step"], []).append(json.loads(line)["rows"])
    assert [step for step in handed if len(handed[step]) == 2] == [41, 42, 43, 44, 45]
    per_pass = 2 * ranks
    mine = [
        n for n in [*range(43 * BATCH), *range(45 * BATCH, 62 * BATCH)] if n % per_pass < 2
    ]  # rank 0's of each pass
    assert [row for step in range(1, 61) for row in handed[step][-1]] == [names[n] for n in mine]

    shutil.copytree(tmp_path / "a", tmp_path / "resumed")
    shutil.rmtree(step_folder(tmp_path / "resumed", 60))
    _with_the_skip_in_its_state(tmp_path / "a", tmp_path / "recorded", 43 * BATCH, 45 * BATCH)
    spoiled(ranks, tiny_recipe, *words, f"run.dir={tmp_path}/resumed",
            "+", *words, f"run.dir={tmp_path}/recorded", "train.spike_score=null")  # fmt: skip
    straight = metrics(tmp_path / "a")
    assert sorted(straight) == list(range(1, 61))
    assert straight[40] | {"spike_at_step": AT, "skipped_from_sample": 344, "skipped_to_sample": 360} == straight[40]
    assert (straight[60]["tokens"], straight[60]["samples"]) == (60 * BATCH * 32, 62 * BATCH)
    assert max(row["loss"] for row in straight.values()) < 5
    for other in ("b", "resumed", "recorded"):
        assert _curve(metrics(tmp_path / other)) == _curve(straight), other
        assert differing(step_folder(tmp_path / "a", 60), step_folder(tmp_path / other, 60)) == [], other
    manifest, resumed = (
        json.loads((step_folder(tmp_path / name, 60) / "manifest.json").read_text()) for name in ("a", "resumed")
    )
    assert resumed["spikes"] == manifest["spikes"]  # 58 losses and what was done: judged by the same numbers
    assert len(manifest["spikes"]["losses"]) == 60
    assert manifest["order"]["skipped"] == [[344, 360]]
    assert manifest["spikes"]["rollbacks"] == [{"step": AT, "attempt": 1, "start": 344, "stop": 360}]
    boards = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    boards.Reload()
    assert [(e.step, e.value) for e in boards.Scalars("spike_at_step")] == [(40, AT)]
    assert [e.step for e in boards.Scalars("loss")] == list(range(1, 61))
