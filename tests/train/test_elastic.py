"""A run goes on with other ranks, micro-batches, ZeRO stages and precisions: the same state, the same batches, the same losses.

The recipes have two parameter groups, and under ZeRO-3 sub-groups of 2,000 values, so that there are eight of them.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import finished, launcher

from megatron_steel import cli, dist
from megatron_steel.checkpoint import commit, zero
from megatron_steel.train import state

LAYOUTS = [(stage, precision) for stage in ("0", "1", "2", "3", "3_offload") for precision in ("fp32", "bf16")]
SCRIPT = str(Path(__file__).with_name("resave.py"))
# In fp32 the largest difference of a loss from the uninterrupted run's was 3.6e-7 (1 to 2 to 1 ranks), and 0 on one rank.
NOISE = 1e-6


@pytest.fixture(scope="module")
def sharding(tmp_path_factory):
    """sharding(stage): a DeepSpeed file; ZeRO-3 in small sub-groups, with some weights kept whole and some not."""
    folder = tmp_path_factory.mktemp("sharding")
    shipped = Path(__file__).parents[2] / "ds_configs"

    def path(stage: str) -> str:
        tree = json.loads((shipped / f"zero{stage}.json").read_text())
        if stage.startswith("3"):
            tree["zero_optimization"] |= {"sub_group_size": 2000, "stage3_param_persistence_threshold": 40}
        (folder / f"{stage}.json").write_text(json.dumps(tree))
        return str(folder / f"{stage}.json")

    return path


@pytest.fixture(scope="module")
def tree_of(tiny_recipe, sharding):
    """tree_of(stage, precision, seed): a whole recipe as plain values."""
    base = yaml.safe_load(tiny_recipe.read_text())

    def tree(stage: str, precision: str, seed: int) -> dict:
        tree = copy.deepcopy(base)
        tree["run"] = {"dir": "unused", "seed": seed}
        tree["deepspeed"]["config"] = sharding(stage)
        tree["train"] |= {"precision": precision, "global_batch_size": 12}  # for three ranks too
        return tree

    return tree


def _copy_until(source: Path, target: Path, step: int) -> None:
    """A run folder as it was when `step` had been saved."""
    shutil.copytree(source, target)
    for path in commit.published(target / "checkpoints"):
        if path.name > commit.name_of(step):
            shutil.rmtree(path)


def _compare_state(source: Path, target: Path) -> None:
    """fp32 weights, moments and counters of two checkpoints are the same bits."""
    before, after = zero.contents(source), zero.contents(target)
    assert (after.step, after.counters) == (before.step, before.counters)
    assert before.step > 0
    there = {p.name: p for p in after.trained}
    assert sorted(there) == sorted(p.name for p in before.trained)
    for p in before.trained:
        for quantity in (zero.WEIGHT, *zero.MOMENTS):
            assert torch.equal(there[p.name].read(quantity), p.read(quantity)), (p.name, quantity)
    assert sorted(after.others) == sorted(before.others)
    for name, tensor in before.others.items():
        assert torch.equal(after.others[name], tensor.to(after.others[name].dtype)), name
    _compare_module_copies(target, there)


def _compare_module_copies(checkpoint: Path, trained: dict) -> None:
    """What the model computes with is the fp32 weight in the model's dtype (ZeRO-3 does not save it)."""
    file = checkpoint / "engine" / "mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=True)["module"] if file.is_file() else {}
    for name in set(module) & set(trained):
        assert torch.equal(module[name].flatten(), trained[name].read(zero.WEIGHT).to(module[name].dtype)), name


def _curve(rows: dict) -> tuple[list, list]:
    """Losses, and what must be equal to the bit whatever the ranks: samples and tokens spent, learning rate."""
    steps = sorted(rows)
    losses = [rows[s][k] for s in steps for k in ("loss", "validation_loss") if k in rows[s]]
    return losses, [(s, rows[s]["samples"], rows[s]["tokens"], rows[s]["lr"]) for s in steps]


def _difference(straight: dict, changed: dict) -> float:
    """The largest difference of a loss; all that must be equal is."""
    losses, exact = _curve(straight)
    other, same = _curve(changed)
    assert same == exact
    assert losses[0] - losses[-1] > 0.1  # it learns, so equality means something
    return max(abs(a - b) for a, b in zip(losses, other, strict=True))


def test_one_rank_two_ranks_one_rank(tiny_recipe, sharding, tree_of, launch, metrics, tmp_path, capsys):
    """1 rank with ZeRO-1, from step 2 on 2 ranks with ZeRO-3, from step 4 on 1 rank with ZeRO-1 again."""
    import resave

    words = ["train.save_every_steps=2", "train.keep_last=5"]

    def on_one(folder: str, stage: str) -> None:
        run = [f"run.dir={tmp_path / folder}", f"deepspeed.config={sharding(stage)}", "train.micro_batch_size=4"]
        assert cli.main(["pretrain", str(tiny_recipe), *words, *run]) == 0

    on_one("straight", "1")
    _copy_until(tmp_path / "straight", tmp_path / "two", 2)
    done = launch(2, tiny_recipe, *words, f"run.dir={tmp_path}/two", f"deepspeed.config={sharding('3')}")
    assert "written by 1 rank with ZeRO 1 in float32; going on with 2 ranks with ZeRO 3 in float32" in done.stderr
    _copy_until(tmp_path / "two", tmp_path / "one", 4)
    capsys.readouterr()
    on_one("one", "1")
    assert "written by 2 ranks with ZeRO 3 in float32; going on with 1 rank with ZeRO 1" in capsys.readouterr().err
    for folder in ("two", "one"):
        difference = _difference(metrics(tmp_path / "straight"), metrics(tmp_path / folder))
        print(f"{folder}: {difference:.1e}")
        assert difference <= NOISE

    # From two shards of ZeRO-3 to one rank of every stage: the state is the same right after loading.
    source = tmp_path / "two" / "checkpoints" / commit.name_of(4)
    for layout in (("0", "bf16"), ("1", "fp32"), ("2", "bf16"), ("3", "bf16")):
        target = tmp_path / "-".join(layout)
        job = {"recipe": tree_of(*layout, seed=6), "from": str(source), "to": str(target), "plain": True}
        resave.run(job, dist.start())
        _compare_state(source, target / commit.name_of(4))


def test_another_stage_on_one_rank(tiny_recipe, sharding, metrics, tmp_path):
    """Stage 0 for three steps, then ZeRO-3 in eight sub-groups with offload."""

    def run(folder: str, config: str) -> None:
        words = [f"run.dir={tmp_path / folder}", f"deepspeed.config={config}"]
        assert cli.main(["pretrain", str(tiny_recipe), *words]) == 0

    run("straight", "zero0.json")
    _copy_until(tmp_path / "straight", tmp_path / "changed", 3)
    run("changed", sharding("3_offload"))
    difference = _difference(metrics(tmp_path / "straight"), metrics(tmp_path / "changed"))
    print(f"stage 0 to 3: {difference:.1e}")
    assert difference <= NOISE


def test_a_checkpoint_that_does_not_say_how_it_is_cut(tiny_recipe, metrics, tmp_path, capsys):
    """Checkpoints of the previous release have no layout in their manifest: they are read and cut anew."""
    words = ["pretrain", str(tiny_recipe), f"run.dir={tmp_path}/run"]
    assert cli.main(words) == 0
    _copy_until(tmp_path / "run", tmp_path / "old", 3)
    file = tmp_path / "old" / "checkpoints" / commit.name_of(3) / commit.MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["layout"]
    file.write_text(json.dumps(commit.sealed(manifest)))
    capsys.readouterr()
    assert cli.main([*words[:2], f"run.dir={tmp_path}/old"]) == 0
    assert "does not say how its shards are cut" in capsys.readouterr().err
    assert _curve(metrics(tmp_path / "old")) == _curve(metrics(tmp_path / "run"))  # bitwise: one rank to one rank


@pytest.mark.parametrize(("first", "second"), [("3", "1"), ("0", "3"), ("2", "0"), ("3", "3"), ("2", "2")])
def test_frozen_weights_buffers_and_a_live_engine(first, second, tree_of, tmp_path):
    """What is not trained comes along; an engine that has trained on can be taken back (bitwise, also to its moments)."""
    import resave

    device = dist.start()
    resave.run({"recipe": tree_of(first, "fp32", seed=5), "to": str(tmp_path / "from")}, device)
    source = tmp_path / "from" / commit.name_of(3)
    assert sorted(zero.contents(source).others) == ["counts", "frozen"]
    engine, recipe, group_names = resave.start(tree_of(second, "fp32", seed=6), device)
    resave.train(engine, recipe)
    for folder in ("to", "back"):
        progress = state.restore(engine, commit.verify(source))
        state.save(engine, tmp_path / folder, progress, {"parameters": 1}, group_names, keep_last=2)
        _compare_state(source, tmp_path / folder / commit.name_of(3))
        resave.train(engine, recipe)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2), (2, 3)])
def test_state_from_every_layout_to_every_other(before, after, tree_of, tmp_path):
    """100 pairs of (stage, offload, precision), each way: the bits of the fp32 state right after loading.

    Three ranks cut no tensor of the model evenly, so that every cut is padded.
    """

    def run(ranks: int, jobs: list[dict]) -> None:
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        if ranks > 1:
            finished([*launcher(ranks), SCRIPT, str(tmp_path / "jobs.json")])
        else:
            finished([sys.executable, SCRIPT, str(tmp_path / "jobs.json")])

    sources = {layout: tmp_path / "from" / "-".join(layout) for layout in LAYOUTS}
    run(before, [{"recipe": tree_of(*layout, seed=5), "to": str(to)} for layout, to in sources.items()])
    pairs = {(sources[a] / commit.name_of(3), tmp_path / "to" / "-".join(a + b)): b for a in LAYOUTS for b in LAYOUTS}
    run(after, [{"recipe": tree_of(*b, seed=6), "from": str(a), "to": str(to)} for (a, to), b in pairs.items()])
    for source, target in pairs:
        _compare_state(source, target / commit.name_of(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("3", "0"), ("0", "3"), ("1", "2"), ("2", "3_offload"), ("3_offload", "1")]
)
@pytest.mark.parametrize(("precision", "noise"), [("fp32", NOISE), ("bf16", 2e-2)])
def test_losses_go_on_as_if_nothing_had_changed(
    first, second, precision, noise, tiny_recipe, sharding, launch, metrics, tmp_path
):
    """2 ranks, then 1 rank with another stage and micro-batch, against the run that stays as it began."""
    words = [f"train.precision={precision}"]
    launch(2, tiny_recipe, *words, f"run.dir={tmp_path}/straight", f"deepspeed.config={sharding(first)}")
    _copy_until(tmp_path / "straight", tmp_path / "changed", 3)
    launch(
        1,
        tiny_recipe,
        *words,
        f"run.dir={tmp_path}/changed",
        f"deepspeed.config={sharding(second)}",
        "train.micro_batch_size=8",
    )
    difference = _difference(metrics(tmp_path / "straight"), metrics(tmp_path / "changed"))
    print(f"{precision}: 2 ranks with ZeRO {first} to 1 with ZeRO {second}: {difference:.1e}")
    assert difference <= noise
