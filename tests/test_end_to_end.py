"""The whole road through the real verbs and the real launcher: text -> tokens -> 2 ranks -> export -> transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_steel import cli

# Runs in a process that cannot import this package: it loads the export alone and takes its loss on given blocks.
FRESH = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron_steel": raise ImportError("not here")
sys.meta_path.insert(0, Blocker())
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, blocks = sys.argv[1], torch.tensor(json.load(open(sys.argv[2])))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # else it asks on the terminal
with torch.no_grad():
    logits = model(input_ids=blocks[:, :-1]).logits
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
text = tokenizer.decode(model.generate(blocks[:1, :8], max_new_tokens=8, do_sample=False)[0])
print("RESULT", json.dumps({"loss": float(loss), "eos": tokenizer.eos_token_id, "type": model.config.model_type, "text": text,
                  "class": type(model).__name__}))
"""


def _fresh_loss(export: Path, recipe, overrides, tmp_path) -> dict:
    """What a stranger's transformers makes of the export, on the run's own validation blocks."""
    from megatron_steel import preflight
    from megatron_steel.recipe import load_recipe

    resolved = load_recipe(str(recipe), overrides)
    (batches,) = preflight.validation_batches_of(resolved, preflight.plan_run(resolved)).values()
    blocks = []
    for batch in batches():
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            if labels[0] != -100:
                blocks.append([*ids, labels[-1]])
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    command = [sys.executable, "-c", FRESH, str(export), str(tmp_path / "blocks.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT", 1)[1])


def _run(*words) -> None:
    assert cli.main([str(w) for w in words]) == 0


def _small(tmp_path, vocabulary, tokenizer, prefixes, validation, **more) -> tuple[str, list[str]]:
    sizes = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **more}
    return "tiny", [
        f"run.dir={tmp_path}/run", f"tokenizer.path={tokenizer}", f"data.train={json.dumps(prefixes)}",
        f"data.validation={validation}", "data.sequence_length=64", "train.steps=20", "train.global_batch_size=8",
        "train.micro_batch_size=2", "train.precision=fp32", "train.log_every_steps=5", "train.eval_every_steps=20",
        "train.eval_samples=12", "train.sample_prompts=['问题：', 'Q', '']", "train.sample_tokens=8", *(f"model.config.{k}={v}" for k, v in sizes.items()),
    ]  # fmt: skip


def _train_and_export(tmp_path, recipe, overrides, launch, metrics):
    launch(2, recipe, *overrides)
    rows = metrics(tmp_path / "run")
    assert rows[20]["loss"] < rows[5]["loss"]
    _run("export", tmp_path / "run", tmp_path / "hf", "--dtype", "float32", "--verify")
    found = _fresh_loss(tmp_path / "hf", recipe, overrides, tmp_path)
    assert found["type"] == "steel"
    assert found["class"] == "SteelForCausalLM"
    assert found["text"]
    assert found["loss"] == pytest.approx(rows[20]["validation_loss"], abs=1e-5)
    return found


def _the_export_writes_what_training_wrote(tmp_path):
    """Three prompts over two ranks under ZeRO-3, and transformers' own greedy generation."""
    import torch

    from megatron_steel.post.load import load_as

    model, tokenizer = load_as(str(tmp_path / "hf"), False, torch.float32)
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["step"], r["prompt"]) for r in rows] == [(20, "问题："), (20, "Q"), (20, "")]
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
        written = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, use_cache=False)[0].tolist()
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == (row["prompt"] + row["text"]).strip()


def test_shipped_samples_to_a_model_that_writes(launch, metrics, capsys, tmp_path):
    samples = sorted((Path(cli.__file__).parent / "samples").glob("*.jsonl"))
    _run("train-tokenizer", *samples, "--output", tmp_path / "tokenizer", "--vocab-size", 3000)
    _run("tokenize", *samples, "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "data",
         "--validation-ratio", "0.1", "--workers", 2)  # fmt: skip
    _run("verify", tmp_path / "data", tmp_path / "data-validation")
    recipe, overrides = _small(
        tmp_path, 3008, tmp_path / "tokenizer", [{"prefix": f"{tmp_path}/data"}], f"{tmp_path}/data-validation"
    )
    _train_and_export(tmp_path, recipe, overrides, launch, metrics)
    _the_export_writes_what_training_wrote(tmp_path)
    capsys.readouterr()
    _run("generate", tmp_path / "hf", "--prompt", "问题：", "--max-new-tokens", 8, "--greedy")
    assert capsys.readouterr().out.startswith("问题：")


@pytest.mark.shared
def test_real_samples_with_the_real_qwen_tokenizer(shared_data, launch, metrics, tmp_path):
    qwen, samples = shared_data / "qwen_tokenizer", shared_data / "steel_samples"
    _run("tokenize", samples / "sky/2021-31_zh_head_0000_sample.jsonl", "--tokenizer", qwen, "--output", tmp_path / "sky",
         "--validation-ratio", "0.1")  # fmt: skip
    _run("tokenize", samples / "wanjuan/part-010205-a894b46e_sample.jsonl", "--text-key", "content", "--tokenizer", qwen,
         "--output", tmp_path / "wanjuan")  # fmt: skip
    prefixes = [{"prefix": f"{tmp_path}/sky", "weight": 2}, {"prefix": f"{tmp_path}/wanjuan", "weight": 1}]
    recipe, overrides = _small(tmp_path, 151936, qwen, prefixes, f"{tmp_path}/sky-validation", hidden_size=32)
    found = _train_and_export(tmp_path, recipe, overrides, launch, metrics)
    assert found["eos"] == 151645
