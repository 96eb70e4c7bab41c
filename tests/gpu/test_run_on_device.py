"""Whole runs on a real device through the real command: resume repeats bitwise, out of memory names what fits."""

import re
import subprocess

import pytest
from conftest import launch_command, one_thread

pytestmark = pytest.mark.gpu

# About 200 MB of activations a sample and 60M parameters: memory ends at a few hundred samples, in seconds.
WIDE = {
    "model.config.hidden_size": 1024, "model.config.intermediate_size": 4096, "model.config.num_hidden_layers": 4,
    "model.config.num_attention_heads": 16, "model.config.num_key_value_heads": 16,
    "model.config.max_position_embeddings": 1024, "data.sequence_length": 1024,
}  # fmt: skip


def _curve(rows):
    keys = ("loss", "grad_norm", "lr", "tokens", "samples")
    return {step: [row[k] for k in keys] + [row.get("validation_loss")] for step, row in rows.items()}


@pytest.mark.parametrize("sharding", ["zero1.json", "zero3.json"])
def test_a_deterministic_bf16_run_resumes_bitwise(sharding, tiny_recipe, launch, metrics, tmp_path):
    settings = ["train.precision=bf16", "train.deterministic=true", f"deepspeed.config={sharding}", "train.keep_last=9"]
    launch(1, tiny_recipe, f"run.dir={tmp_path}/straight", *settings)
    launch(1, tiny_recipe, f"run.dir={tmp_path}/cut", *settings)
    # What a kill after step 3 leaves: the checkpoint of step 3.
    (tmp_path / "cut" / "checkpoints" / "step-00000006").rename(tmp_path / "step-00000006")
    done = launch(1, tiny_recipe, f"run.dir={tmp_path}/cut", *settings)
    assert "going on from" in done.stdout + done.stderr
    straight, cut = metrics(tmp_path / "straight"), metrics(tmp_path / "cut")
    assert sorted(straight) == [1, 2, 3, 4, 5, 6]
    assert _curve(straight) == _curve(cut)


def test_texts_change_no_number(tiny_recipe, launch, metrics, tmp_path):
    settings = ["train.precision=bf16", "train.deterministic=true", "train.eval_every_steps=2"]
    launch(1, tiny_recipe, f"run.dir={tmp_path}/without", *settings)
    launch(
        1, tiny_recipe, f"run.dir={tmp_path}/with", *settings, "train.sample_prompts=[w5 w6]", "train.sample_tokens=4"
    )
    assert len((tmp_path / "with" / "samples.jsonl").read_text().splitlines()) == 3
    assert _curve(metrics(tmp_path / "with")) == _curve(metrics(tmp_path / "without"))


def test_out_of_memory_names_a_micro_batch_that_runs(tiny_recipe, launch, metrics, tmp_path):
    too_many = 2 * samples_that_fill(device_bytes())
    command = launch_command(1, tiny_recipe, *one_step(too_many, tmp_path / "full"))
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread(), timeout=280)
    said = done.stdout + done.stderr
    assert done.returncode == 70, said[-4000:]
    fits = named_micro_batch(said)
    assert 1 <= fits < too_many
    launch(1, tiny_recipe, *one_step(fits, tmp_path / "fits"), timeout=280)
    assert sorted(metrics(tmp_path / "fits")) == [1, 2]


def one_step(samples, folder):
    """Overrides: the wide model, two steps of one micro-batch each, on one rank."""
    batch = [f"train.global_batch_size={samples}", f"train.micro_batch_size={samples}", "train.steps=2"]
    rest = ["train.precision=bf16", "deepspeed.config=zero1.json", f"run.dir={folder}", "data.validation=null"]
    return [*(f"{key}={value}" for key, value in WIDE.items()), *batch, *rest]


def samples_that_fill(memory):
    from megatron_steel.model.configuration_steel import SteelConfig
    from megatron_steel.model.memory import activation_bytes_per_sample

    fields = {key.removeprefix("model.config."): value for key, value in WIDE.items() if key.startswith("model.")}
    config = SteelConfig(vocab_size=128, mlp_div_ratio=1, FFN_type="raw", mlp_type="senet", **fields)
    return max(1, memory // activation_bytes_per_sample(config, WIDE["data.sequence_length"]))


def named_micro_batch(message):
    found = re.search(r"train\.micro_batch_size=(\d+) would fit \(an estimate\)", message)
    assert found, message[-4000:]
    return int(found[1])


def device_bytes():
    import torch

    return torch.cuda.get_device_properties(0).total_memory
