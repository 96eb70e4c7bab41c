"""A dry run is a start that leaves nothing behind; the run after it is the run without it."""

import hashlib
import re

import pytest

from megatron_steel import cli
from megatron_steel.checkpoint import commit
from megatron_steel.planner.disk import checkpoints_at_most
from megatron_steel.recipe import Train
from megatron_steel.rehearsal import duration


def _tree(folder):
    """Every path below a folder with what it holds and when it was written."""
    return {
        str(p.relative_to(folder)): (
            p.stat().st_mtime_ns,
            hashlib.md5(p.read_bytes()).hexdigest() if p.is_file() else "",
        )
        for p in folder.rglob("*")
    }


def _losses(rows):
    return [(step, rows[step]["loss"], rows[step]["grad_norm"]) for step in sorted(rows)]


def test_a_dry_run_leaves_nothing_and_changes_nothing(tiny_recipe, metrics, capsys, tmp_path, monkeypatch):
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # torch's own, for every process

    def pretrain(name, *words):
        assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={tmp_path / name}", *words]) == 0
        return capsys.readouterr().err

    for steps in (3, 6):  # at the beginning, and from a checkpoint
        words = (f"train.steps={steps}", "schedule.name=constant")
        pretrain("without", *words)
        before = _tree(tmp_path / "run") if (tmp_path / "run").exists() else None
        said = pretrain("run", *words, "--dry-run")
        assert (_tree(tmp_path / "run") if (tmp_path / "run").exists() else None) == before
        assert not list(scratch.iterdir())
        pretrain("run", *words)
    assert _losses(metrics(tmp_path / "run")) == _losses(metrics(tmp_path / "without"))
    losses = [float(loss) for loss in re.findall(r"dry run: step \d \| loss ([\d.]+)", said)]
    assert losses == [round(metrics(tmp_path / "run")[step]["loss"], 4) for step in (4, 5)]
    for wanted in ("audit:     causal", "s a step", "left:      3 steps, 768 tokens", "memory: ", "(2 at a time)"):
        assert wanted in said, said
    assert "nothing to do" in pretrain("run", *words, "--dry-run")


def test_a_duration_beyond_the_calendar_has_no_date():
    assert re.fullmatch(r"1 day, 0:00:01 \(1\.0 days\), until \d{4}-\d\d-\d\d \d\d:\d\d", duration(86401.0))
    year = 365.25 * 86400
    assert duration(9000 * year) == "3,287,250 days (9,000 years)"
    assert duration(1e12 * year) == "365,250,000,000,000 days (1,000,000,000,000 years)"


@pytest.mark.parametrize("steps", [1, 10, 11, 30, 40, 65, 90])
@pytest.mark.parametrize(("keep_last", "keep_every"), [(1, None), (2, None), (3, 20), (2, 10), (4, 40)])
def test_as_many_checkpoints_as_are_counted_lie_beside_each_other(tmp_path, steps, keep_last, keep_every):
    train = Train(
        global_batch_size=1,
        micro_batch_size=1,
        steps=steps,
        save_every_steps=10,
        keep_last=keep_last,
        keep_every_steps=keep_every,
    )
    most = 0
    for step in (*range(10, steps, 10), steps):
        commit.write(tmp_path, step, lambda aside: None, {})
        most = max(most, len(commit.published(tmp_path)))
        commit.delete(commit.hide_old(tmp_path, keep_last, step, keep_every))
    assert checkpoints_at_most(train, steps) == most
