"""sft and dpo, whole runs in this process: true losses, a folder that loads, a run that goes on where it stopped."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_tuning import (
    conversation,
    farthest,
    logged,
    preferences,
    run,
    sums,
    token_mean,
    weights,
    write_rows,
    write_tiny,
)

from megatron_steel.data.reserve import sha256
from megatron_steel.errors import EXIT_BAD_INPUT, EXIT_STOPPED

ROWS = 12
SETTINGS = ["--global-batch-size=4", "per_device_train_batch_size=2", "learning_rate=3e-3", "num_train_epochs=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"), "prefix")


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    """One run over a folder of train and held-out rows; 6 steps of 4 rows."""
    root = tmp_path_factory.mktemp("tuned")
    write_rows(root / "data" / "train.jsonl", sums(ROWS))
    write_rows(root / "data" / "heldout.jsonl", sums(5, first=50))
    (Path(model) / "README.md").write_text("about the pretrained weights")
    (Path(model) / "audit.json").write_text(json.dumps({"causal": True}))
    before = {file.name: file.read_bytes() for file in Path(model).iterdir()}
    assert run("sft", model, root / "data", "--output", root / "out", *SETTINGS) == 0
    assert {file.name: file.read_bytes() for file in Path(model).iterdir()} == before
    return root


def test_the_output_is_a_model_like_the_one_that_was_tuned(tuned, model):
    out = tuned / "out"
    assert not (tuned / "out.partial").exists()
    assert sorted(p.name for p in tuned.iterdir()) == ["data", "out"]
    for file in Path(model).iterdir():
        if file.name == "README.md":
            assert not (out / file.name).exists()
        elif file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert weights(out).keys() == weights(Path(model)).keys()
    assert farthest(weights(out), weights(Path(model))) > 1e-3
    assert not (out / "tokens").exists()
    sums_of = [line.split("  ") for line in (out / "SHA256SUMS").read_text().splitlines()]
    assert {name: digest for digest, name in sums_of} == {
        name: sha256(out / name)
        for name in [file.name for file in Path(model).iterdir() if file.name not in ("README.md", "SHA256SUMS")]
    }


def test_transformers_and_the_verbs_read_it(tuned, monkeypatch, capsys):
    import io

    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(tuned / "out", trust_remote_code=True)
    assert type(read).__module__.startswith("transformers_modules.")
    assert farthest(dict(read.named_parameters()), weights(tuned / "out")) == 0
    assert len(AutoTokenizer.from_pretrained(tuned / "out", trust_remote_code=True)) <= read.config.vocab_size
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1 = ?\n"))
    assert run("generate", tuned / "out", "--chat", "--max-new-tokens", "4", "--greedy") == 0


def test_losses_are_means_over_supervised_tokens(model, tuned, tmp_path):
    """Rows of unlike lengths in unlike micro-batches: the first loss of one step over all of them, and the held-out loss."""
    rows = write_rows(tmp_path / "rows.jsonl", sums(ROWS))
    settings = [f"--global-batch-size={ROWS}", "per_device_train_batch_size=3", "max_steps=1"]
    assert run("sft", model, rows, "--output", tmp_path / "one", *settings) == 0
    assert logged(tmp_path / "one", "loss") == [pytest.approx(token_mean(model, sums(ROWS)), rel=1e-5)]
    last = logged(tuned / "out", "eval_loss")[-1]
    assert last == pytest.approx(token_mean(tuned / "out", sums(5, first=50)), rel=1e-5)
    assert len(logged(tuned / "out", "eval_loss")) == 2
    assert logged(tuned / "out", "loss")[-1] < logged(tuned / "out", "loss")[0]


def test_tensorboard_holds_the_curves(tuned):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tuned / "out" / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [point.step for point in losses] == list(range(1, 7))
    assert [point.value for point in losses] == pytest.approx(logged(tuned / "out", "loss"))
    assert events.Scalars("train/learning_rate")[0].value == pytest.approx(3e-3)
    assert len(events.Scalars("eval/loss")) == 2


def test_the_same_command_again_finds_it_complete_and_another_is_refused(tuned, model, capsys):
    words = ["sft", model, tuned / "data", "--output", tuned / "out", *SETTINGS]
    assert run(*words) == 0
    assert "is complete already" in capsys.readouterr().err
    assert run(*words, "learning_rate=1e-3") == EXIT_BAD_INPUT
    assert "was begun as another run:\n    learning_rate: 0.003, now 0.001" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(asked, model, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", sums(ROWS))
    words = ["sft", model, rows, *SETTINGS, "max_steps=10", "save_steps=2", "gradient_checkpointing=false"]
    assert run(*words, "--output", tmp_path / "straight") == 0

    def stop() -> None:
        while not list((tmp_path / "out.partial" / "checkpoints").glob("*/whole")):
            time.sleep(0.002)
        os.kill(os.getpid(), asked)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    assert run(*words, "--output", tmp_path / "out") == EXIT_STOPPED
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    checkpoints = tmp_path / "out.partial" / "checkpoints"
    assert 2 <= max(int(folder.name.rpartition("-")[2]) for folder in checkpoints.glob("checkpoint-*")) < 10
    torn = checkpoints / "checkpoint-99"  # as a kill in the middle of a save leaves it
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    assert run(*words, "--output", tmp_path / "out", "learning_rate=1e-3") == EXIT_BAD_INPUT
    assert run(*words, "--output", tmp_path / "out") == 0
    assert "checkpoint-99 was not written to its end" in capsys.readouterr().err
    assert farthest(weights(tmp_path / "out"), weights(tmp_path / "straight")) == 0
    assert logged(tmp_path / "out", "loss") == logged(tmp_path / "straight", "loss")


def test_packing_and_adapters_end_in_a_folder_that_loads(model, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", sums(ROWS))
    settings = [
        "--global-batch-size=2",
        "per_device_train_batch_size=1",
        "max_length=128",
        "max_steps=3",
        "learning_rate=1e-2",
    ]
    assert run("sft", model, rows, "--output", tmp_path / "out", "--packing", "--lora", "r=4", *settings) == 0
    said = capsys.readouterr().out
    assert f"{ROWS} rows" in said
    assert "packed rows" in said
    assert "8 adapters (rank 4)" in said
    assert "layers of experts have none" in said
    out = tmp_path / "out"
    assert {file.name for file in (out / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    before, after = weights(Path(model)), weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight") and "self_attn" in name}
    assert json.loads((out / "run.json").read_text())["lora"] == {"r": 4, "lora_alpha": 8}


def test_dpo_starts_at_ln_2_and_the_margin_rises(model, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", preferences(4))
    settings = [
        "--global-batch-size=4",
        "per_device_train_batch_size=4",
        "max_steps=3",
        "learning_rate=1e-3",
        "warmup_steps=0",
    ]
    assert run("dpo", model, rows, "--output", tmp_path / "out", *settings) == 0
    losses, margins = logged(tmp_path / "out", "loss"), logged(tmp_path / "out", "rewards/margins")
    assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    assert losses[0] > losses[1] > losses[2]
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[0] < margins[1] < margins[2]
    assert "DPO complete" in capsys.readouterr().out


def test_a_model_that_sees_the_future_is_tuned_with_a_warning(tmp_path, capsys):
    folder = write_tiny(tmp_path / "v3", "v3")
    rows = write_rows(
        tmp_path / "rows.jsonl", [conversation("a", "b"), conversation("c", "dd"), conversation("e", "f")]
    )
    settings = ["--global-batch-size=2", "per_device_train_batch_size=1", "num_train_epochs=1.5"]
    assert run("sft", folder, rows, "--output", tmp_path / "out", *settings) == 0
    made = json.loads((tmp_path / "out" / "result.json").read_text())["steps"]
    assert made == json.loads((tmp_path / "out" / "run.json").read_text())["counts"]["steps"] == 3
    assert "this model sees the future (softmoe_v3)" in capsys.readouterr().err
    assert run("sft", folder, rows, "--output", tmp_path / "no", "--packing") == EXIT_BAD_INPUT
    assert "mixes all tokens of a sample" in capsys.readouterr().err
