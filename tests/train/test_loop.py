"""The loop's promises on one rank, in this process: equalities between runs that must not differ."""

import collections
import json
import math
import shutil

import numpy as np
import pytest
import torch

from megatron_steel import cli
from megatron_steel.checkpoint import commit
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.data.loader import Loader
from megatron_steel.errors import TrainingError
from megatron_steel.train import loop
from megatron_steel.train.watch import Watch


@pytest.fixture
def train(tiny_recipe, metrics, tmp_path):
    """train(name, *overrides): a run in this process; returns its metrics."""

    def run(name: str, *overrides: str, expect: int = 0) -> dict[int, dict]:
        assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={tmp_path / name}", *overrides]) == expect
        return metrics(tmp_path / name) if (tmp_path / name).exists() else {}

    return run


def _losses(rows):
    return [rows[step]["loss"] for step in sorted(rows)]


def test_activation_checkpointing_changes_no_number(train):
    plain, checkpointed = train("plain"), train("checkpointed", "train.activation_checkpointing=true")
    assert _losses(plain) == _losses(checkpointed)
    assert [r["grad_norm"] for r in plain.values()] == [r["grad_norm"] for r in checkpointed.values()]


def test_micro_batches_only_cut_the_batch(train):
    """8 samples as 8 x 1 or 1 x 8: the sum of token losses is the same up to the order of additions in fp32."""
    assert _losses(train("eight", "train.micro_batch_size=8")) == pytest.approx(
        _losses(train("one", "train.micro_batch_size=1")), abs=2e-6
    )


def test_steps_tokens_and_epochs_name_the_same_run(train, tiny_data):
    steps = train("steps", "train.steps=3")
    assert _losses(train("tokens", f"train.tokens={3 * 8 * 32 - 5}")) == _losses(steps)  # rounded up to whole steps
    blocks = (np.fromfile(tiny_data / "train.bin", np.uint16).size - 32) // 32
    epochs = train("epochs", "train.epochs=1", "train.log_every_steps=1000")
    assert max(epochs) == blocks // 8
    assert epochs[max(epochs)]["epochs_train"] == pytest.approx(max(epochs) * 8 / blocks)


def test_a_token_budget_counts_what_was_trained_also_when_the_batch_changes(train):
    train("run", "train.steps=6")  # 6 steps of 8 x 32 tokens
    rows = train("run", f"train.tokens={12 * 8 * 32}", "train.global_batch_size=16", "train.micro_batch_size=4")
    assert max(rows) == 6 + 3
    assert rows[9]["tokens"] == 12 * 8 * 32
    assert rows[9]["samples"] == 12 * 8


@pytest.mark.parametrize(("words", "fetched"), [([], 2), (["train.spike_score=6"], 5)])
def test_a_step_has_one_exchange_and_only_a_wanted_loss_is_fetched(train, monkeypatch, words, fetched):
    """5 steps, logged at 4 and at the end; the first batch is counted when there was no step before it to do so."""
    counts = collections.Counter()

    def spy(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: counts.update([name]) or original(*args))

    spy(loop.dist, "sum_over_ranks")
    spy(loop.dist, "any_rank")
    spy(loop, "on_its_way")
    rows = train("run", "train.steps=5", "train.log_every_steps=4", "data.validation=null", "train.save_every_steps=9",
                 "train.micro_batch_size=8", *words)  # fmt: skip
    assert sorted(rows) == [4, 5]
    assert counts == {"sum_over_ranks": 1 + 5, "on_its_way": fetched, "any_rank": 1}  # a stop asked for in the save?


def test_a_batch_counted_ahead_equals_one_counted_in_its_step(train, monkeypatch):
    ahead = train("ahead", "train.steps=4")
    monkeypatch.setattr(Loader, "labels_ahead", lambda self: 0)
    assert _losses(train("counted", "train.steps=4")) == _losses(ahead)


def test_validation_is_a_mean_over_tokens_however_it_is_cut(train):
    """10 samples in passes of 8, 4 and 1: the last pass is filled up with rows that count nothing."""
    losses = [
        train(f"cut{m}", "train.steps=3", f"train.micro_batch_size={m}", "train.global_batch_size=8")[3][
            "validation_loss"
        ]
        for m in (8, 4, 1)
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=2e-6)


GPT2 = ("model={type: gpt2, config: {vocab_size: 128, n_embd: 32, n_layer: 2, n_head: 4, n_positions: 64, resid_pdrop: 0.3, "
        "embd_pdrop: 0.3, attn_pdrop: 0.0}}")  # fmt: skip


def test_dropout_resumes_bitwise_and_is_off_in_validation_only(train, tmp_path):
    straight = train("straight", GPT2, "train.save_every_steps=2", "train.eval_every_steps=1", "train.keep_last=9")
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    assert _losses(train("cut", GPT2, "train.save_every_steps=2", "train.eval_every_steps=1")) == _losses(straight)
    rare = train("rare", GPT2, "train.eval_every_steps=6")
    assert _losses(rare) == _losses(straight)  # evaluating in between leaves training in training mode


def test_weights_from_a_folder_train_in_training_mode(train, tmp_path):
    train("first", GPT2)
    assert cli.main(["export", str(tmp_path / "first"), str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    wanted = (GPT2, f"model.init_from={tmp_path}/hf", "data.validation=null", "train.steps=2")
    losses = [train(name, *wanted)[1]["loss"] for name in ("a", "b")]
    assert losses[0] == losses[1]
    still = train("c", *(w.replace("0.3", "0.0") for w in wanted))[1]["loss"]
    assert still != losses[0]  # dropout was on


def test_changed_optimizer_settings_hold_after_a_resume(train, tmp_path):
    train("run", "train.steps=3", "schedule.name=constant")
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    kept = train("same", "schedule.name=constant")
    changed = train("run", "schedule.name=constant", "optim.weight_decay=5.0", "optim.betas=[0.5, 0.5]")
    assert changed[4]["loss"] == kept[4]["loss"]  # the change acts from the first step after it
    assert changed[6]["loss"] != kept[6]["loss"]


def test_a_longer_length_extends_a_finished_run(train):
    train("run", "train.steps=3", "schedule.name=constant")
    extended = train("run", "train.steps=6", "schedule.name=constant")
    assert _losses(extended) == _losses(train("straight", "train.steps=6", "schedule.name=constant"))


def test_a_finished_run_has_nothing_to_do(train, tmp_path):
    train("run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train("run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_moved_run_folder_resumes(train, tmp_path):
    train("here", "train.steps=3", "schedule.name=constant")
    (tmp_path / "here").rename(tmp_path / "there")
    assert _losses(train("there", "schedule.name=constant")) == _losses(train("straight", "schedule.name=constant"))


def test_the_time_budget_stops_with_75_and_resumes(train, tmp_path):
    rows = train("run", "train.steps=5000", "train.stop_after_minutes=0.01", expect=75)
    assert (tmp_path / "run" / "checkpoints" / f"step-{max(rows):08d}" / "manifest.json").is_file()
    assert max(rows) < 5000
    resumed = train("run", f"train.steps={max(rows) + 2}")
    assert max(resumed) == max(rows) + 2
    assert resumed[1] == rows[1]


def test_keep_last_and_what_a_manifest_says(train, tmp_path):
    train("run", "train.save_every_steps=1", "train.keep_last=3")
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005", "step-00000006"]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / kept[-1] / "manifest.json").read_text())
    assert (manifest["step"], manifest["tokens"], manifest["order"]["next_sample"]) == (6, 6 * 8 * 32, 48)
    assert str(tmp_path) not in json.dumps(manifest["data"])


def test_a_damaged_checkpoint_is_passed_over(train, tmp_path, capsys):
    straight = train("straight")
    train("run")
    shard = next((tmp_path / "run" / "checkpoints" / "step-00000006" / "engine").glob("*optim_states.pt"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    assert _losses(train("run")) == _losses(straight)
    message = capsys.readouterr().err
    assert "the content of engine/" in message
    assert "going on from" in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.config.hidden_size=64", "model.config.hidden_size was 32 and is now 64"),
        ("optim.weight_decay_on=all", "optim.weight_decay_on was matrices and is now all"),
        ("run.seed=12", "the run began with seed 11"),
        ("train.resume=never", "train.resume is never"),
    ],
)
def test_what_cannot_change_at_a_resume_is_refused(override, says, train, capsys):
    train("run", "train.steps=3")
    train("run", override, expect=78)
    assert says in capsys.readouterr().err


def test_document_mask_trains_and_is_refused_where_it_cannot_work(train, capsys, tmp_path):
    masked, plain = train("masked", "data.document_mask=true"), train("plain")
    assert masked[1]["loss"] != plain[1]["loss"]
    assert masked[6]["loss"] < masked[1]["loss"]
    train("v3", "data.document_mask=true", "model.config.FFN_type=softmoe_v3", expect=78)
    assert "mixes all tokens of a sample" in capsys.readouterr().err
    assert not (tmp_path / "v3").exists()


def test_data_or_checkpoint_of_another_tokenizer_is_refused(train, tiny_tokenizer, tiny_data, tmp_path, capsys):
    """Ids mean nothing without their tokenizer; the folder's path does not count, its content does."""
    from megatron_steel.data import manifest
    from megatron_steel.data.scan import scan
    from megatron_steel.data.tokenizer import load_tokenizer

    other = shutil.copytree(tiny_tokenizer, tmp_path / "other")
    swapped = (
        (other / "tokenizer.json").read_text().replace('"w3"', '"#"').replace('"w4"', '"w3"').replace('"#"', '"w4"')
    )
    (other / "tokenizer.json").write_text(swapped)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{tiny_data}/train{suffix}", tmp_path / f"mine{suffix}")
    manifest.write(tmp_path / "mine", scan(tmp_path / "mine"), load_tokenizer(tiny_tokenizer).facts())
    train("data", f"data.train={tmp_path}/mine", f"tokenizer.path={other}", expect=78)
    assert "tokenized with another tokenizer" in capsys.readouterr().err
    train("run", f"data.train={tmp_path}/mine", "train.steps=2")
    train("run", f"tokenizer.path={other}", "train.steps=3", expect=78)
    assert "began with another tokenizer" in capsys.readouterr().err
    moved = shutil.copytree(tiny_tokenizer, tmp_path / "moved")
    train("run", f"data.train={tmp_path}/mine", f"tokenizer.path={moved}", "train.steps=3")


def test_a_model_that_sees_the_future_says_so(train, capsys, tmp_path):
    train("v3", "model.config.FFN_type=softmoe_v3", "train.steps=2")
    assert "NOT a language-model loss" in capsys.readouterr().err


def test_a_hugging_face_class_by_name(train):
    rows = train("llama", "model={type: llama, config: {vocab_size: 128, hidden_size: 32, intermediate_size: 64, "
                 "num_hidden_layers: 2, num_attention_heads: 4, tie_word_embeddings: true}}")  # fmt: skip
    assert rows[6]["loss"] < rows[1]["loss"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_with_infinite_gradients_is_left_out(stage, train, monkeypatch, capsys):
    from megatron_steel.model import build

    original = build.build_model

    def poisoned(*args):
        model = original(*args)
        calls = {"n": 0}

        def spoil(grad):
            calls["n"] += 1
            return grad * float("inf") if calls["n"] == 2 * 4 else grad  # the last micro-batch of step 2

        model.model.layers[0].self_attn.q_proj.register_full_backward_hook(
            lambda module, inputs, outputs: (
                tuple(None if g is None else spoil(g) for g in inputs) if module.training else None  # not in the audit
            )
        )
        return model

    monkeypatch.setattr(build, "build_model", poisoned)
    rows = train(f"run{stage}", f"deepspeed.config=zero{stage}.json")
    assert "step 2: the loss or the gradients are not finite" in capsys.readouterr().err
    assert rows[6]["skipped_steps"] == 1
    assert all(math.isfinite(row["loss"]) for row in rows.values())


def test_ten_steps_in_a_row_without_numbers_end_the_run():
    watch = Watch(None)
    for step in range(1, 10):
        watch.step_done(step, applied=False)
    with pytest.raises(TrainingError, match="10 steps in a row are not finite") as caught:
        watch.step_done(10, applied=False)
    assert caught.value.exit_code == 70


def test_out_of_memory_names_what_would_fit(train, monkeypatch, capsys):

    monkeypatch.setattr("megatron_steel.device.out_of_memory", lambda *_: lambda: "train.micro_batch_size=1 would fit")
    monkeypatch.setattr(torch.nn.functional, "silu", _no_memory)
    train("run", expect=70)
    message = capsys.readouterr().err
    assert "out of memory in step 1" in message
    assert "train.micro_batch_size=1 would fit" in message


def _no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")


def _blend(*members):
    return "data.train=[" + ", ".join(f"{{prefix: {prefix}, weight: {weight}}}" for prefix, weight in members) + "]"


def test_what_orders_the_data_may_change_at_a_resume_and_is_named(train, capsys, tiny_data, tmp_path):
    """Batch, length, weights and data open a new segment at the checkpoint; nothing before it moves."""
    train("run", _blend((tiny_data / "train", 1)), "train.steps=1")
    a, b = tiny_data / "train", tmp_path / "more"
    with IndexedWriter(b, np.uint16) as writer:
        writer.add_document(np.arange(2000, dtype=np.uint16) % 120 + 3)
    settings: list[str] = [_blend((a, 1))]
    for step, changed, says in (
        (2, "train.global_batch_size=4", "train.global_batch_size was 8 and is now 4"),
        (3, "data.sequence_length=16", "data.sequence_length was 32 and is now 16"),
        (4, _blend((a, 3), (b, 1)), "data.train is with more"),
        (5, _blend((a, 1), (b, 1)), "data.train has other weights: "),
        (6, _blend((b, 1)), "data.train is without "),
    ):
        settings.append(changed)
        capsys.readouterr()
        train("run", *settings, f"train.steps={step}", "data.validation=null")
        message = capsys.readouterr().err
        assert f"on the order of data is a new one: {says}" in message
        order = _manifest(tmp_path / "run", step)["order"]
        assert order["segments"][-1]["first_sample"] == (8 if step == 2 else 8 + 4 * (step - 2))
    firsts = [s["first_sample"] for s in order["segments"]]
    assert firsts == [0, 8, 12, 16, 20, 24]


def _manifest(run, step):
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())


def test_steps_left_out_are_counted_over_a_resume(train, tmp_path):
    train("run", "train.steps=3")
    file = tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json"
    assert json.loads(file.read_text())["skipped_steps"] == 0
    file.write_text(json.dumps(commit.sealed(json.loads(file.read_text()) | {"skipped_steps": 5})))
    assert train("run")[6]["skipped_steps"] == 5
    assert _manifest(tmp_path / "run", 6)["skipped_steps"] == 5


def test_a_field_that_the_configuration_has_gained_stops_no_resume(train, tmp_path):
    """A checkpoint of an older version does not name it: then it must have the class's own value."""
    train("run", "train.steps=3")
    (manifest,) = (tmp_path / "run").glob("checkpoints/step-*/manifest.json")
    tree = json.loads(manifest.read_text())
    del tree["model_config"]["segment_length"]
    manifest.write_text(json.dumps(commit.sealed(tree)))
    train("run", "model.config.segment_length=7", expect=78)
    train("run")
