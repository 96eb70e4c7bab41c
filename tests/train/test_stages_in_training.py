"""A run in stages equals the same run made by hand: stopped at each boundary and continued with a changed recipe."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_steel import cli, inspect_run
from megatron_steel.checkpoint import zero
from megatron_steel.checkpoint.commit import published, read_manifest
from megatron_steel.convert import card_facts
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.errors import SteelError
from megatron_steel.train import state

DECAY = {"name": "linear", "warmup_steps": 1, "min_lr_ratio": 0.0}
TOLD = ("loss", "grad_norm", "lr", "tokens", "samples", "validation_loss")


@pytest.fixture(scope="module")
def better(tmp_path_factory) -> Path:
    """A second data set."""
    prefix = tmp_path_factory.mktemp("better") / "better"
    generator = np.random.default_rng(3)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(40):
            writer.add_document(np.append(generator.integers(3, 128, 80), 1).astype(np.uint16))
    return prefix


@pytest.fixture(scope="module")
def staged(tiny_recipe, tiny_data, better, tmp_path_factory) -> Path:
    """Steps 1 to 4 as `tiny_recipe`; then two data sets, sequences twice as long, a quarter of the batch, a schedule of its own;
    then another peak rate within that schedule."""
    tree = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    tree["train"] |= {"steps": 9, "eval_every_steps": 4, "save_every_steps": 3, "keep_last": 9}
    tree["stages"] = [
        {"name": "first", "steps": 4},
        {"name": "decay", "schedule": DECAY, "train": {"global_batch_size": 2, "micro_batch_size": 1},
         "data": {"sequence_length": 64, "train": [{"prefix": str(tiny_data / "train"), "weight": 1.0},
                                                   {"prefix": str(better), "weight": 3.0}]}},
        {"name": "end", "ratio": 0.25, "optim": {"lr": 3e-3}},
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("staged") / "staged.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def train(metrics, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")

    def run(recipe, name, *words, expect=0):
        assert cli.main(["pretrain", str(recipe), f"run.dir={root / name}", *words]) == expect
        return metrics(root / name)

    run.root = root
    return run


@pytest.fixture(scope="module")
def straight(train, staged):
    return train(staged, "straight")


def _told(rows):
    return {step: {key: row[key] for key in TOLD if key in row} for step, row in rows.items()}


def _state(folder):
    """Every fp32 weight and moment of the newest checkpoint."""
    stored = zero.contents(published(folder / "checkpoints")[-1])
    return {
        p.name: [p.read(q, 0, int(np.prod(p.shape))).clone() for q in (zero.WEIGHT, *zero.MOMENTS)]
        for p in stored.trained
    }


def _equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


def test_a_staged_run_is_the_one_made_by_hand(train, straight, staged, tiny_data, better, tmp_path):
    tree = yaml.safe_load(staged.read_text(encoding="utf-8"))
    decay = tree.pop("stages")[1]
    by_hand = tmp_path / "by_hand.yaml"
    for changes in (
        {"train": {"steps": 4}},
        {"train": {"steps": 7, **decay["train"]}, "data": decay["data"], "schedule": DECAY | {"span": [4, 9]}},
        {"train": {"steps": 9}, "optim": {"lr": 3e-3}},
    ):
        for section, keys in changes.items():
            tree[section] = keys if section == "schedule" else tree[section] | keys
        by_hand.write_text(yaml.safe_dump(tree), encoding="utf-8")
        rows = train(by_hand, "by_hand")
    assert _told(rows) == _told(straight)
    assert [row["stage"] for row in straight.values()] == [1] * 4 + [2] * 3 + [3] * 2
    assert [row["tokens"] for row in straight.values()] == [*range(256, 1025, 256), *range(1152, 1665, 128)]
    assert straight[4]["lr"] != straight[5]["lr"] == 1e-2  # the warm-up of one step
    assert straight[7]["lr"] == pytest.approx(1e-2 * 2 / 4)
    assert straight[8]["lr"] == pytest.approx(3e-3 / 4)
    assert straight[9]["lr"] == 0.0
    _equal(_state(train.root / "straight"), _state(train.root / "by_hand"))


@pytest.mark.parametrize("stop", [6, pytest.param(4, marks=pytest.mark.slow)])  # inside a stage, between two
def test_an_interrupted_run_equals_one_that_was_not(stop, train, straight, staged):
    cut = shutil.copytree(train.root / "straight", train.root / f"cut{stop}")
    for checkpoint in published(cut / "checkpoints"):
        if int(checkpoint.name.removeprefix("step-")) > stop:
            shutil.rmtree(checkpoint)
    assert _told(train(staged, f"cut{stop}")) == _told(straight)
    _equal(_state(cut), _state(train.root / "straight"))


@pytest.mark.slow
def test_a_stop_that_is_asked_for_at_a_boundary_comes_there(train, straight, staged, monkeypatch):
    save = state.save

    def save_and_ask(*arguments):
        path = save(*arguments)
        if path.name == "step-00000004":
            os.kill(os.getpid(), signal.SIGTERM)
        return path

    with monkeypatch.context() as patched:
        patched.setattr(state, "save", save_and_ask)
        assert max(train(staged, "stopped", expect=75)) == 4
    assert _told(train(staged, "stopped")) == _told(straight)


def test_checkpoints_say_where_they_belong(train, straight):
    found = [read_manifest(path) for path in published(train.root / "straight" / "checkpoints")]
    assert [(c.step, c.manifest["stages"][c.manifest["stage"] - 1]["name"]) for c in found] == [
        (3, "first"), (4, "first"), (6, "decay"), (7, "decay"), (9, "end"),
    ]  # fmt: skip
    assert [c.manifest["recipe"]["data"]["sequence_length"] for c in found] == [32, 32, 64, 64, 64]
    card = dict(card_facts.training(found[2].manifest, []))
    assert card["the run's length"] == "9 steps: this is a checkpoint from its middle"
    assert card["stages"].startswith(
        "first (steps 1 to 4, 1,024 tokens), decay (steps 5 to 7, 384 tokens), end (steps 8 to 9"
    )
    assert card["stages"].endswith("what follows is of stage 2 (decay)")
    assert card["global batch"].startswith("2 sequences of 64 tokens")


def test_steps_to_come_are_shown_as_they_will_be(train, straight, staged):
    folder = train.root / "straight"
    was = {step: inspect_run.to_json(inspect_run.look(folder, step)) for step in (2, 5, 6, 9)}
    early = shutil.copytree(folder, train.root / "early")
    for checkpoint in published(early / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    for step, seen in was.items():
        told = inspect_run.to_json(inspect_run.look(early, step))
        assert told["samples"] == seen["samples"]
        assert told["trained"] == (step <= 3)
    with pytest.raises(SteelError, match="the run has 9 steps"):
        inspect_run.look(early, 10)


@pytest.mark.slow
def test_ranks_change_nothing_but_the_last_bits(train, straight, staged, launch, metrics):
    """Two ranks from the start, and from the boundary that one rank has left. In fp32 sums over two ranks round otherwise."""
    cut = shutil.copytree(train.root / "straight", train.root / "cut-for-two")
    for checkpoint in published(cut / "checkpoints")[2:]:
        shutil.rmtree(checkpoint)
    for folder in (train.root / "two", cut):
        launch(2, staged, f"run.dir={folder}")
        rows = metrics(folder)
        for key in ("samples", "tokens", "lr", "stage"):
            assert [row[key] for row in rows.values()] == [row[key] for row in straight.values()]
        losses = [[row["loss"] for row in each.values()] for each in (rows, straight)]
        assert losses[0] == pytest.approx(losses[1], abs=2e-5)
