"""A T5 on pairs through the whole road: equal to torch alone, to its own resume, to other numbers of ranks, to its export."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM

from megatron_steel import cli, inspect_run, preflight
from megatron_steel.audit import load_for_audit
from megatron_steel.data.order import next_batch
from megatron_steel.data.pairs import pair_batch
from megatron_steel.data.tokenize import tokenize
from megatron_steel.errors import SteelError
from megatron_steel.model import build
from megatron_steel.post.generate import generate
from megatron_steel.post.load import load, load_tokenizer
from megatron_steel.recipe import load_recipe

STEPS, TOLERANCE = 6, 2e-6  # of a loss
KEYS = ("loss", "grad_norm", "tokens", "samples", "validation_loss")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_tokenizer):
    """A T5 of two layers each, and 80 pairs whose response is the beginning of the prompt, one word on."""
    folder, generator = tmp_path_factory.mktemp("pairs"), np.random.default_rng(3)
    with open(folder / "p.jsonl", "w") as file:
        for _ in range(100):
            ids = generator.integers(3, 127, generator.integers(4, 40))
            words = [" ".join(f"w{i}" for i in part) for part in (ids, ids[: len(ids) // 2 + 1] + 1)]
            file.write(json.dumps(dict(zip(("prompt", "response"), words, strict=True))) + "\n")
    keys = {"prompt_key": "prompt", "response_key": "response"}
    tokenize([folder / "p.jsonl"], tiny_tokenizer, folder / "p", workers=1, validation_ratio=0.2, **keys)
    config = {
        "vocab_size": 128,
        "d_model": 32,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "d_kv": 8,
        "dropout_rate": 0.0,
    }
    tree = {
        "run": {"seed": 11},
        "tokenizer": {"path": str(tiny_tokenizer)},
        "model": {"type": "t5", "config": config},
        "data": {"train": f"{folder}/p", "validation": f"{folder}/p-validation", "sequence_length": 36},
        "optim": {"lr": 1e-2, "name": "adafactor", "weight_decay": 0.0},
        "schedule": {"name": "constant"},
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "log_every_steps": 1,
                  "eval_every_steps": 3, "eval_samples": 10, "save_every_steps": 3},
        "deepspeed": {"config": "zero0.json"},
    }  # fmt: skip
    path = folder / "t5.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(recipe, launch_many, tmp_path_factory):
    """Six steps at once, and three and three with dropout as an interrupted run and its twin."""
    folder = tmp_path_factory.mktemp("runs")
    dropout = "model.config.dropout_rate=0.1"
    launch_many(1, recipe, [f"run.dir={folder}/plain"], [f"run.dir={folder}/straight", dropout],
                [f"run.dir={folder}/cut", dropout, "train.steps=3"], [f"run.dir={folder}/cut", dropout])  # fmt: skip
    return folder


def _plain_losses(recipe):
    """torch alone: T5's own mean loss over the whole batch of a step, torch's Adafactor, no accumulation, no engine."""
    plan = preflight.plan_run(recipe)
    order = preflight.plan_order(recipe, plan.train, STEPS, None)
    data = preflight.open_dataset(plan.train, order, recipe.data.sequence_length)
    model = build.build_model(plan.config, recipe.run.seed).train()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2, eps=(1e-18, 1e-3), weight_decay=0.0)
    losses, labels = [], 0
    for _ in range(STEPS):
        numbers, order = next_batch(order, 8)
        batch = {name: torch.from_numpy(x) for name, x in pair_batch(data, numbers.tolist()).items()}
        labels += int((batch["labels"] != -100).sum())
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, labels


def test_the_losses_are_those_of_torch_alone(recipe, runs, metrics):
    rows = metrics(runs / "plain")
    losses, labels = _plain_losses(load_recipe(str(recipe)))
    assert max(abs(rows[step]["loss"] - losses[step - 1]) for step in rows) <= TOLERANCE
    assert rows[STEPS]["tokens"] == labels
    assert losses[-1] < losses[0] - 0.1  # it learned something, so the comparison means something


def test_an_interrupted_run_is_bitwise_the_uninterrupted_one(runs, metrics):
    straight, cut = metrics(runs / "straight"), metrics(runs / "cut")
    assert sorted(straight) == sorted(cut) == list(range(1, STEPS + 1))
    assert [[row.get(key) for key in KEYS] for row in straight.values()] == [
        [row.get(key) for key in KEYS] for row in cut.values()
    ]
    assert straight[1]["loss"] != metrics(runs / "plain")[1]["loss"]  # dropout was on


def test_the_export_gives_the_trained_logits_and_answers(runs, tmp_path):
    assert cli.main(["export", str(runs / "plain"), str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    exported, trained = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf"), load_for_audit(runs / "plain", False)
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (m.eval()(input_ids=ids, decoder_input_ids=ids).logits for m in (exported, trained))
    assert torch.equal(one, other)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["decoder_start_token_id"] == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in card
    assert "8 pairs of a prompt and a response of up to 36 tokens each" in card

    prompt = torch.tensor([[5, 6, 7, 1]])  # with its end of document, as in training
    written = exported.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    words = [f"w{i}" for i in written[0, 1:].tolist() if i > 2]
    assert generate(str(tmp_path / "hf"), "w5 w6 w7", 5, greedy=True).split() == words
    for load_it in (load, load_tokenizer):  # what evaluate, chat, sft and dpo open a folder with
        with pytest.raises(SteelError, match=r"this is an encoder-decoder \(t5\), and here a causal model is needed"):
            load_it(str(tmp_path / "hf"))


def test_a_step_is_looked_at_as_pairs(runs, tiny_tokenizer):
    found = inspect_run.look(runs / "plain", 2, None, str(tiny_tokenizer))
    assert len(found.samples) == 8
    for sample in found.samples:
        prompt, response = sample.pieces
        assert (prompt.ids[-1], response.ids[-1]) == (1, 1)
        assert [i + 1 for i in prompt.ids[: len(response.ids) - 1]] == response.ids[:-1]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.train=TEXT"], "an encoder-decoder learns responses to prompts, and this is text"),
        (["train.tokens=100"], "nothing can be planned in tokens"),
        (["schedule.warmup_tokens=100"], "nothing can be planned in tokens"),
        (["train.sample_prompts=[w3]"], "does not go on with a text"),
        (["data.document_mask=true"], "not proven to keep packed documents apart"),
    ],
)
def test_what_does_not_fit_pairs_is_refused(recipe, tiny_data, overrides, says):
    overrides = [word.replace("TEXT", str(tiny_data / "train")) for word in overrides]
    with pytest.raises(SteelError, match=says):
        preflight.plan_run(load_recipe(str(recipe), overrides))


def test_a_causal_model_does_not_train_on_pairs(recipe, tiny_recipe):
    prefix = load_recipe(str(recipe)).data.train
    with pytest.raises(SteelError, match="a causal model learns text, and this is pairs"):
        preflight.plan_run(load_recipe(str(tiny_recipe), [f"data.train={prefix}"]))


@pytest.mark.slow
def test_two_ranks_are_one_at_every_stage(recipe, runs, launch_many, metrics, tmp_path):
    adamw = ["optim.name=adamw", "optim.lr=1e-3"]
    launch_many(1, recipe, [f"run.dir={tmp_path}/one", *adamw])
    launch_many(2, recipe, [f"run.dir={tmp_path}/two"],
                *([f"run.dir={tmp_path}/zero{n}", *adamw, f"deepspeed.config=zero{n}.json"] for n in (1, 2, 3)))  # fmt: skip
    for mine, other in ((runs / "plain", "two"), *((tmp_path / "one", f"zero{n}") for n in (1, 2, 3))):
        one, two = metrics(mine), metrics(tmp_path / other)
        assert max(abs(one[step]["loss"] - two[step]["loss"]) for step in one) <= TOLERANCE, other
        assert one[STEPS]["tokens"] == two[STEPS]["tokens"]
    # A run goes on with another number of ranks.
    shutil.copytree(tmp_path / "zero1", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    launch_many(1, recipe, [f"run.dir={tmp_path}/cut", *adamw, "deepspeed.config=zero1.json"])
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "cut")
    assert max(abs(one[step]["loss"] - two[step]["loss"]) for step in one) <= TOLERANCE
