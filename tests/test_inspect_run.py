"""`inspect RUN --step N` shows what the trainer got: through an append, other batches, and samples passed over."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import yaml

from megatron_steel import cli, inspect_run, preflight
from megatron_steel.data import loader as loaders
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter
from megatron_steel.data.order import next_batch
from megatron_steel.data.order_json import from_json
from megatron_steel.data.segments import Member, plan, skip
from megatron_steel.errors import SteelError

L, BLOCKS = 16, {"old": 40, "new": 24}


@pytest.fixture
def corpora(tmp_path):
    """Two data sets of distinct blocks: any L tokens in a row occur once, so tokens say where they lie."""
    generator = np.random.default_rng(3)
    for name, blocks in BLOCKS.items():
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            left = (blocks + 1) * L
            while left:
                length = min(left, int(generator.integers(1, 30)))
                writer.add_document(generator.integers(3, 128, length))
                left -= length
                if generator.random() < 0.2:
                    writer.add_document([])
    return {name: str(tmp_path / name) for name in BLOCKS}


@pytest.fixture
def train(tiny_recipe, corpora, tmp_path, monkeypatch):
    """train(names, *overrides): a run in this process; what the loop was given, [step][micro-batch][row, L + 1]."""
    given = []
    take = loaders.Loader.step

    def step(self):
        batches = take(self)
        given.append([np.hstack([b["input_ids"], b["labels"][:, -1:]]) for b in batches])
        return batches

    monkeypatch.setattr(loaders.Loader, "step", step)

    def run(names, *overrides, expect=0):
        data = "data.train=[" + ", ".join(f"{{prefix: {corpora[n]}}}" for n in names) + "]"
        words = ["pretrain", str(tiny_recipe), f"run.dir={tmp_path}/run", f"data.sequence_length={L}", data]
        code = cli.main([*words, "data.validation=null", *overrides])
        assert code == expect
        return given

    return run


def _shown(step):
    return [np.array([i for p in s.pieces for i in p.ids]) for s in step.samples]


def test_an_append_in_mid_run_uses_each_remaining_draw_once(train, corpora, tmp_path, capsys):
    """Stopped after 1 of 5 steps, a data set added, gone on: counted from what the model was fed."""
    train(["old"], "train.epochs=1", "train.stop_after_minutes=1e-9", expect=75)
    before = _orders(tmp_path)[-1]
    capsys.readouterr()
    given = train(["old", "new"], "train.epochs=1")
    assert "from sample 8 on the order of data is a new one: data.train is with new" in capsys.readouterr().err
    assert len(given) == (40 + 24) // 8

    fed = Counter(tuple(row) for step in given for rows in step for row in rows)
    assert set(fed.values()) == {1}
    assert len(fed) == 64
    for name, blocks in BLOCKS.items():  # the rows of each data set are the blocks of one whole epoch
        stream = IndexedDataset(corpora[name]).read(0, (blocks + 1) * L)
        windows = {tuple(stream[at : at + L + 1]): at for at in range(len(stream) - L)}
        starts = sorted(windows[row] for row in fed if row in windows)
        assert starts == list(range(starts[0], starts[0] + blocks * L, L))

    after = _orders(tmp_path)[-1]
    assert after.segments[0] == before.segments[0]
    assert after.segments[1].first_sample == 8
    assert [after.locate(n) for n in range(8)] == [before.locate(n) for n in range(8)]
    _check_steps(given, tmp_path)
    _check_shares(tmp_path)


def _orders(tmp_path):
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    return [from_json(json.loads((f / "manifest.json").read_text())["order"], f) for f in folders]


def _check_steps(given, tmp_path):
    for number, batches in enumerate(given, start=1):
        step = inspect_run.look(tmp_path / "run", number)
        assert step.trained
        rows = np.concatenate(batches)
        assert np.array_equal(_shown(step), rows), number
        assert [s.micro_batch for s in step.samples] == [0, 0, 1, 1, 2, 2, 3, 3]


def _check_shares(tmp_path):
    """TensorBoard: all of the old one before, 32 of the rest to 24 after."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    old = {e.step: e.value for e in events.Scalars("data_share/old")}
    new = {e.step: e.value for e in events.Scalars("data_share/new")}
    assert old[1] == 1
    assert sorted(new) == [2, 3, 4, 5, 6, 7, 8]
    for step, share in new.items():
        drawn = 8 * (step - 1)
        assert abs(share * drawn - drawn * 24 / 56) <= 1.68  # the bound of data/blend.py
        assert old[step] + share == pytest.approx(1)
    assert new[8] == pytest.approx(24 / 56)


@pytest.fixture
def folder(tmp_path, corpora, tiny_tokenizer):
    """A run folder by hand: two batches, an append and a skipped range, at its 9th step, on 2 ranks."""
    from megatron_steel.checkpoint import commit
    from megatron_steel.data.manifest import trust

    facts = {name: trust(prefix) for name, prefix in corpora.items()}
    old, new = (Member(corpora[n], facts[n].digest, facts[n].tokens) for n in BLOCKS)
    order = plan(None, [old], L, 4, 100, 7)
    history = []

    def go(order, batch, steps):
        for _ in range(steps):
            numbers, order = next_batch(order, batch)
            history.append((order, numbers.tolist()))
        return order

    order = go(plan(None, [old], L, 4, 100, 7), 4, 3)
    order = go(skip(order, 14, 17), 4, 2)  # 12, 13, 17, ...
    order = go(plan(order, [old, new], L, 6, 100, 7), 6, 2)
    order = go(skip(order, order.next_sample, order.next_sample + 5), 6, 2)
    recipe = {
        "run": {"seed": 7}, "tokenizer": {"path": str(tiny_tokenizer)}, "model": {"type": "steel"},
        "data": {"train": [{"prefix": p} for p in corpora.values()], "sequence_length": L}, "optim": {"lr": 1e-3},
        "train": {"steps": 12, "global_batch_size": 6, "micro_batch_size": 3},
    }  # fmt: skip
    data = [{"digest": m.digest, "tokens": m.tokens, "name": "x", "prefix": m.prefix} for m in (old, new)]
    entry = {"order": order.to_json(), "recipe": recipe, "world_size": 2, "tokens": 1, "data": data}
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    commit.write(run / "checkpoints", 9, lambda aside: None, entry)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "environment.json").write_text('{"world_size": 2}')
    return run, history, order


def test_each_past_step_is_the_batch_that_was_taken(folder):
    run, history, order = folder
    for number, (_, numbers) in enumerate(history, start=1):
        assert [s.number for s in inspect_run.look(run, number).samples] == numbers, number
        state, batch = order.before_step(number)
        assert next_batch(state, batch)[0].tolist() == numbers
    assert inspect_run.look(run, 4).ranks == 1  # 4 samples do not cut into 2 x 3: that start's ranks are not known
    with pytest.raises(SteelError, match="no step 0"):
        inspect_run.look(run, 0)


@pytest.mark.parametrize(("world", "micro"), [(1, 6), (1, 2), (2, 3), (3, 1), (6, 1)])
def test_each_rank_gets_what_its_loader_gives(folder, corpora, world, micro):
    from megatron_steel.data.dataset import BlendedDataset
    from megatron_steel.data.loader import Loader
    from megatron_steel.data.manifest import trust

    run, _, order = folder
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["train"]["micro_batch_size"] = micro
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "environment.json").write_text(json.dumps({"world_size": world}))
    dataset = BlendedDataset(order, {trust(p).digest: IndexedDataset(p) for p in corpora.values()})
    for rank in range(world):
        with Loader(dataset, order, 6, micro, rank, world) as loader:
            for number in (10, 11, 12):
                step = inspect_run.look(run, number, rank)
                batches = loader.step()
                rows = np.concatenate([np.hstack([b["input_ids"], b["labels"][:, -1:]]) for b in batches])
                assert np.array_equal(_shown(step), rows)
                assert (step.trained, step.ranks, {s.rank for s in step.samples}) == (False, world, {rank})
    with pytest.raises(SteelError, match=f"no rank {world}") as caught:
        inspect_run.look(run, 10, world)
    assert f"0 to {world - 1}" in caught.value.remedy
    with pytest.raises(SteelError, match="has 12 steps, and no step 13"):
        inspect_run.look(run, 13)


def test_pieces_are_the_documents_and_their_text(folder, corpora, capsys, tmp_path):
    run, _, _ = folder
    assert cli.main(["inspect", str(run), "--step", "9", "--rank", "1", "--json", str(tmp_path / "step.json")]) == 0
    printed = capsys.readouterr().out
    step = json.loads((tmp_path / "step.json").read_text())
    assert len(step["samples"]) == 3
    for sample in step["samples"]:
        data, at = IndexedDataset(sample["prefix"]), sample["start"]
        assert f"sample {sample['number']} | rank 1, micro-batch 0, row {sample['row']} | {sample['prefix']}" in printed
        for piece in sample["pieces"]:
            document = data.document(piece["document"]).tolist()
            assert document[piece["start"] : piece["start"] + len(piece["ids"])] == piece["ids"]
            assert piece["text"] == " ".join(f"w{i}" for i in piece["ids"])
            assert f"document {piece['document']} from token {piece['start']}, {len(piece['ids'])} tokens: {piece['text']}" in printed  # fmt: skip
            assert data.read(at, at + len(piece["ids"])).tolist() == piece["ids"]
            at += len(piece["ids"])
        assert at == sample["start"] + L + 1


def test_data_that_has_changed_since_is_named(folder, corpora):
    run, _, _ = folder
    with IndexedWriter(corpora["old"], np.uint16) as writer:
        writer.add_document(np.arange(900) % 100 + 3)
    with pytest.raises(SteelError, match="content of the data has changed since the step") as caught:
        inspect_run.look(run, 1)
    assert caught.value.where == corpora["old"] + ".bin"


def test_a_data_set_that_the_recipe_no_longer_names_is_found(folder, corpora):
    """Checkpoints carry on what the run drew from earlier."""
    from megatron_steel.checkpoint import commit
    from megatron_steel.data.manifest import trust
    from megatron_steel.model.configuration_steel import SteelConfig
    from megatron_steel.recipe import from_dict
    from megatron_steel.run_folder import facts_of

    run, history, order = folder
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["train"] = corpora["new"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = commit.read_manifest(run / "checkpoints" / "step-00000009")
    new = Member(corpora["new"], trust(corpora["new"]).digest, trust(corpora["new"]).tokens)
    now = preflight.RunPlan(SteelConfig(), {}, 0, 0.0, [new], [])
    facts = facts_of(from_dict(recipe), now, {"zero_optimization": {"stage": 0}}, before)
    assert [e["prefix"] for e in facts["data"]] == [corpora["new"]]
    assert [e["prefix"] for e in facts["data_before"]] == [corpora["old"]]
    order = preflight.plan_order(from_dict(recipe), [new], 12, before).after(6)
    commit.write(run / "checkpoints", 10, lambda aside: None, {"order": order.to_json(), "tokens": 1} | facts)
    shutil.rmtree(before.path)
    for number in (1, 6, 9):
        step = inspect_run.look(run, number)
        assert [s.number for s in step.samples] == history[number - 1][1]
    assert {s.prefix for s in inspect_run.look(run, 10).samples} == {corpora["new"]}


@pytest.mark.parametrize(
    "words", [["--rank", "0"], ["--step", "1", "--picture", "x.png"], ["--step", "1"]], ids=["rank", "picture", "data"]
)
def test_what_does_not_go_together_is_refused(words, folder, corpora, capsys):
    target = corpora["old"] if words == ["--step", "1"] else str(folder[0])
    assert cli.main(["inspect", target, *words]) == 78
    assert "inspect RUN [--step N [--rank R]]" in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(SteelError, match="no run folder"):
        inspect_run.look(tmp_path, 1)
