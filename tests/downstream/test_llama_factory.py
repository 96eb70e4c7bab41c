"""LLaMA-Factory trains exports by the YAML of `sft-data`, on the tokens and the assistant mask that the export's template means.

Needs its own environment: bash launch/llama_factory_environment.sh
"""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from tiny_exports import QWEN_ROWS, ROOT, export_all
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_steel import cli

COMMAND = ROOT / ".venv" / "llama-factory-venv" / "bin" / "llamafactory-cli"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared,
    pytest.mark.skipif(not COMMAND.exists(), reason="no .venv/llama-factory-venv: launch/llama_factory_environment.sh"),
]
ROWS = 24
# Of the YAML only what a CPU and three steps ask for is replaced.
SMALL = ["use_cpu=true", "bf16=false", "max_steps=3", "logging_steps=1", "per_device_train_batch_size=2",
         "gradient_accumulation_steps=2"]  # fmt: skip
CODE = {"configuration_steel.py", "modeling_steel.py", "experts_steel.py", "mixture_steel.py"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory, shared_data) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return export_all(["steel-lagged", "llama"], shared_data / "qwen_tokenizer", QWEN_ROWS, folder)


@pytest.fixture(params=["steel-lagged", "llama"])
def mixture(request, exports, shared_data, tmp_path) -> tuple[Path, Path]:
    """(the export, the folder that `sft-data` wrote for it from real rows)."""
    export, samples = exports[request.param], shared_data / "steel_samples"
    spec = {
        "tokenizer": str(export), "max_tokens": 512, "heldout_ratio": 0.1,
        "sources": [
            {"type": "firefly", "files": [str(samples / "firefly/firefly-train-1.1M_sample.jsonl")], "rows": ROWS},
            {"type": "sharegpt", "files": [str(samples / "BELLE/train_3.5M_CN_sample.json")], "rows": ROWS},
        ],
    }  # fmt: skip
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert cli.main(["sft-data", str(tmp_path / "spec.yaml"), "--output", str(tmp_path / "mixture")]) == 0
    return export, tmp_path / "mixture"


def _train(folder: Path, *overrides: str) -> None:
    command = [str(COMMAND), "train", str(folder / "llama_factory_sft.yaml"), *SMALL, *overrides]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=590, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]


def test_three_steps_from_our_yaml_on_the_tokens_we_mean(mixture, tmp_path):
    from datasets import load_from_disk

    export, folder = mixture
    _train(folder, f"tokenized_path={tmp_path / 'tokens'}")  # it tokenizes, saves and ends
    rows = [json.loads(line)["messages"] for line in (folder / "train.jsonl").read_text().splitlines()]
    tokens = load_from_disk(str(tmp_path / "tokens"))["train"]
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert len(tokens) == len(rows) > 40
    for turns, found in zip(rows, tokens, strict=True):
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert found["input_ids"] == tokenizer(text)["input_ids"]
        assert (found["input_ids"], found["labels"]) == _by_hand(tokenizer, turns)

    _train(folder, f"tokenized_path={tmp_path / 'tokens'}", f"output_dir={tmp_path / 'trained'}")
    log = [json.loads(line) for line in (tmp_path / "trained" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 3
    assert all(math.isfinite(loss) and loss > 1 for loss in losses)
    assert list((tmp_path / "trained").rglob("events.out.tfevents.*"))

    code = {file.name for file in (tmp_path / "trained").glob("*.py")}
    assert code == (CODE if "steel" in export.name else set())
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()
        for path in (export, tmp_path / "trained")
    )
    assert type(after).__name__ == type(before).__name__
    ids = torch.tensor([tokens[0]["input_ids"][:64]])
    with torch.no_grad():
        assert 0 < (before(ids).logits - after(ids).logits).abs().max() < 1  # trained, a little


def _by_hand(tokenizer, turns) -> tuple[list[int], list[int]]:
    """ChatML piece by piece. LLaMA-Factory also trains the newline behind an answer's `<|im_end|>`."""
    ids: list[int] = []
    labels: list[int] = []
    for turn in turns:
        opening = tokenizer(f"<|im_start|>{turn['role']}\n")["input_ids"]
        content = tokenizer(f"{turn['content']}<|im_end|>\n")["input_ids"]
        ids += opening + content
        labels += [-100] * len(opening) + (content if turn["role"] == "assistant" else [-100] * len(content))
    return ids, labels
