"""Exports convert to GGUF by their native class, and llama.cpp computes the same model: ids, logits, greedy tokens.

Needs llama.cpp's converter in .venv/llama.cpp and a Python with its requirements and llama-cpp-python in
.venv/llama-cpp-venv: docs/downstream.md says how.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_exports import CLASSES, QWEN_ROWS, ROOT, documented, export_all, run_documented
from transformers import AutoModelForCausalLM

CONVERTER = ROOT / ".venv" / "llama.cpp" / "convert_hf_to_gguf.py"
PYTHON = ROOT / ".venv" / "llama-cpp-venv" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared,
    pytest.mark.skipif(not (CONVERTER.is_file() and PYTHON.exists()), reason="no .venv/llama.cpp and .venv/llama-cpp-venv"),
]  # fmt: skip
TOLERANCE = 2e-5
GELU_TOLERANCE = 5e-3  # ggml looks GELU up in a table of fp16 numbers
TEXTS = [
    "钢铁是怎样炼成的？炼钢需要铁、碳和1500度的高温。",
    "The quick brown fox jumps over the lazy dog's back; it's 12:30.\n\n  def f(x):\n\treturn x",
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n",
]
NEW = 20
OWN_ROWS = 6016


@pytest.fixture(scope="module")
def with_qwens(tmp_path_factory, shared_data) -> dict[str, Path]:
    names = [name for name in CLASSES if name != "steel-lagged"]
    return export_all(names, shared_data / "qwen_tokenizer", QWEN_ROWS, tmp_path_factory.mktemp("qwens"))


@pytest.fixture(scope="module")
def with_own(tmp_path_factory, shared_data) -> dict[str, Path]:
    """Exports with a tokenizer of `train-tokenizer`, and that tokenizer."""
    from megatron_steel.data.prepare import prepare
    from megatron_steel.data.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("own")
    sample = shared_data / "steel_samples" / "firefly" / "firefly-train-1.1M_sample.jsonl"
    prepare("firefly", [sample], folder / "text.jsonl")
    train_tokenizer([folder / "text.jsonl"], folder / "tokenizer", 6000)
    exports = export_all(["qwen3", "llama"], folder / "tokenizer", OWN_ROWS, folder / "exports")
    return {**exports, "tokenizer": folder / "tokenizer"}


def _convert(export: Path, gguf: Path) -> subprocess.CompletedProcess:
    command = [str(PYTHON), str(CONVERTER), str(export), "--outfile", str(gguf), "--outtype", "f32"]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def _compare(export: Path, gguf: Path, tokenizer: Path, tolerance: float) -> None:
    """Ids of the texts are those of the tokenizer trained with, logits of every position and 20 greedy tokens are those of transformers on the export."""
    from megatron_steel.data.tokenizer import load_tokenizer

    ids = load_tokenizer(tokenizer).encode_batch(TEXTS)
    request, answer = gguf.with_suffix(".json"), gguf.with_suffix(".npz")
    request.write_text(json.dumps({"texts": TEXTS, "ids": ids, "new": NEW}))
    command = [str(PYTHON), str(Path(__file__).with_name("gguf_logits.py")), str(gguf), str(request), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(answer)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    for number, tokens in enumerate(ids):
        assert found[f"tokens{number}"].tolist() == tokens, "other ids"
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].numpy()
            greedy = model.generate(torch.tensor([tokens]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
        assert np.abs(logits).max() > 1
        assert np.abs(logits - found[f"logits{number}"]).max() < tolerance
        assert greedy[0, len(tokens) :].tolist() == found[f"greedy{number}"].tolist()


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2", "granite", "gpt_neox", "gpt2"])
def test_a_native_class_gives_the_same_model(name, with_qwens, shared_data, tmp_path):
    export = with_qwens[name]
    if name == "gpt2":
        assert "KeyError: 'n_ctx'" in _convert(export, tmp_path / "refused.gguf").stderr
        export = Path(shutil.copytree(export, tmp_path / name))
        run_documented(documented("n_ctx", **{"exports/gpt2/config.json": str(export / "config.json")}))
    done = _convert(export, tmp_path / "model.gguf")
    assert done.returncode == 0, done.stderr[-3000:]
    tolerance = GELU_TOLERANCE if name in ("gpt2", "gpt_neox") else TOLERANCE
    _compare(export, tmp_path / "model.gguf", shared_data / "qwen_tokenizer", tolerance)


def test_steel_with_plain_layers_converts_as_qwen2(with_qwens, shared_data, tmp_path):
    export = Path(shutil.copytree(with_qwens["steel-raw"], tmp_path / "relabelled"))
    run_documented(documented("Qwen2ForCausalLM", **{"exports/steel-as-qwen2": str(export)}))
    done = _convert(export, tmp_path / "model.gguf")
    assert done.returncode == 0, done.stderr[-3000:]
    _compare(export, tmp_path / "model.gguf", shared_data / "qwen_tokenizer", TOLERANCE)


def test_steel_itself_is_refused_by_name(with_qwens, tmp_path):
    done = _convert(with_qwens["steel-senet"], tmp_path / "model.gguf")
    assert done.returncode != 0
    assert "Model SteelForCausalLM is not supported" in done.stderr


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_a_tokenizer_of_ours_needs_the_documented_lines(name, with_own, tmp_path):
    done = _convert(with_own[name], tmp_path / "plain.gguf")
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.raises(AssertionError, match="other ids"):  # a space is put before every text
        _compare(with_own[name], tmp_path / "plain.gguf", with_own["tokenizer"], TOLERANCE)
    lines = documented("add_space_prefix", **{"model.gguf": str(tmp_path / "plain.gguf"),
                                             "model-fixed.gguf": str(tmp_path / "model.gguf")})  # fmt: skip
    run_documented(lines, PYTHON)
    _compare(with_own[name], tmp_path / "model.gguf", with_own["tokenizer"], TOLERANCE)
