"""What a model writes during training is what it writes as shipped, on any number of ranks; and training does not notice."""

import shutil

import numpy as np
import pytest
import torch

from megatron_steel import cli, preflight
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.recipe import load_recipe
from megatron_steel.train import samples
from megatron_steel.train.monitor import METRICS, SAMPLES, read_metrics

PROMPTS = "train.sample_prompts=['w5 w6 w8', 'w100', '']"
WRITE = [PROMPTS, "train.sample_tokens=9"]
DROPOUT = ("model={type: gpt2, config: {vocab_size: 128, n_embd: 32, n_layer: 2, n_head: 4, n_positions: 64, resid_pdrop: 0.3, "
           "embd_pdrop: 0.3, attn_pdrop: 0.0}}")  # fmt: skip


def _pretrain(recipe, folder, *words):
    assert cli.main(["pretrain", str(recipe), f"run.dir={folder}", *words]) == 0


def _numbers(folder):
    keys = ("step", "tokens", "loss", "grad_norm", "samples")
    return [{k: row.get(k) for k in keys} for row in read_metrics(folder / METRICS)]


def _texts(folder):
    return [(r["step"], r["tokens"], r["prompt"], r["text"]) for r in read_metrics(folder / SAMPLES)]


def test_training_does_not_notice_also_over_a_resume(tiny_recipe, tmp_path):
    # Without an evaluation behind the texts, which would put the model back into training mode by itself.
    settings = [
        DROPOUT,
        "data.validation=null",
        "train.save_every_steps=3",
        "train.eval_every_steps=1",
        "train.keep_last=9",
    ]
    _pretrain(tiny_recipe, tmp_path / "without", *settings)
    _pretrain(tiny_recipe, tmp_path / "with", *settings, *WRITE)
    assert _numbers(tmp_path / "with") == _numbers(tmp_path / "without")
    texts = _texts(tmp_path / "with")
    assert [(step, prompt) for step, _, prompt, _ in texts] == [
        (step, prompt) for step in range(1, 7) for prompt in ("w5 w6 w8", "w100", "")
    ]
    for name, words in (("again", WRITE), ("stopped-writing", [])):
        shutil.copytree(tmp_path / "with", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000006")
        _pretrain(tiny_recipe, tmp_path / name, *settings, *words)
        assert _numbers(tmp_path / name) == _numbers(tmp_path / "without")
        assert _texts(tmp_path / name) == (texts if words else texts[:9])


@pytest.fixture(scope="module")
def one_rank(tiny_recipe, tiny_data, tmp_path_factory):
    """(folder, overrides): a run of 6 steps with two held-out data sets and prompts, with its checkpoints."""
    root = tmp_path_factory.mktemp("one-rank")
    with IndexedWriter(root / "other", np.uint16) as writer:
        writer.add_document(np.arange(3, 100).repeat(5).astype(np.uint16))
    sets = f"data.validation=[{{prefix: {tiny_data}/validation}}, {{prefix: {root}/other}}]"
    words = [sets, *WRITE, "train.eval_samples=13", "train.keep_last=9"]
    _pretrain(tiny_recipe, root / "run", *words)
    return root / "run", words


def test_the_export_writes_the_same_and_has_the_same_losses(one_rank, tiny_recipe, tmp_path):
    """transformers' own greedy generation; and the exported model's loss on the blocks of each held-out data set."""
    from megatron_steel.post.load import load_as

    run, words = one_rank
    assert cli.main(["export", str(run), str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    model, tokenizer = load_as(str(tmp_path / "hf"), False, torch.float32)
    for _, _, prompt, text in _texts(run)[-3:]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]])
        shipped = model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False)[0, ids.shape[1] :]
        assert text.split() == tokenizer.decode(shipped, skip_special_tokens=True).split()
    recipe, last = load_recipe(str(tiny_recipe), words), {}
    sums = {}
    for name, batches in preflight.validation_batches_of(recipe, preflight.plan_run(recipe)).items():
        ids, labels = (torch.cat([b[key] for b in batches()]) for key in ("input_ids", "labels"))
        real = (labels != -100).all(dim=1)
        steps = ids[real].diff(dim=1)
        assert ((steps >= 0) & (steps <= 1)).all(dim=1).tolist() == [name == "other"] * int(real.sum())
        with torch.no_grad():
            logits = model(input_ids=ids[real]).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[real].flatten(), reduction="none")
        sums[name] = losses.double().sum(), losses.numel()
        last[f"validation_loss/{name}"] = float(losses.double().mean())
    last["validation_loss"] = float(sum(s for s, _ in sums.values()) / (13 * 32))
    assert sum(n for _, n in sums.values()) == 13 * 32
    found = read_metrics(run / METRICS)[-1]
    assert {key: found[key] for key in last} == pytest.approx(last, abs=2e-6)


@pytest.mark.slow
def test_two_ranks_write_and_validate_as_one(one_rank, tiny_recipe, launch_many, tmp_path):
    """Three prompts over two ranks under ZeRO-3; and a dry run of two ranks over a checkpoint of one."""
    run, words = one_rank
    shutil.copytree(run, tmp_path / "dry")
    shutil.rmtree(tmp_path / "dry" / "checkpoints" / "step-00000006")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dry").rglob("*")}
    two = [f"run.dir={tmp_path}/two", *words]
    done = launch_many(2, tiny_recipe, [f"run.dir={tmp_path}/dry", *words, "--dry-run"], two)
    assert "dry run: everything checks" in done.stdout + done.stderr
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "dry").rglob("*")} == before
    assert _texts(tmp_path / "two") == _texts(run)
    theirs, ours = ([r for r in read_metrics(f / METRICS) if "validation_loss" in r] for f in (tmp_path / "two", run))
    for a, b in zip(theirs, ours, strict=True):
        for key in ("validation_loss", "validation_loss/validation", "validation_loss/other"):
            assert a[key] == pytest.approx(b[key], abs=2e-6)


@pytest.mark.slow
def test_nothing_is_compiled_for_a_text():
    """The compiler counts what it is asked for; it takes seconds to load."""
    import torch._dynamo

    asked = []

    def count(graph, inputs):
        asked.append(graph)
        return graph.forward

    layer = torch.compile(torch.nn.Linear(3, 3), backend=count)
    with samples._uncompiled():
        eager = [layer(torch.ones(1, n, 3)) for n in (1, 2, 3)]
    assert not asked
    assert torch.equal(layer(torch.ones(1, 2, 3)), eager[1])
    assert len(asked) == 1
