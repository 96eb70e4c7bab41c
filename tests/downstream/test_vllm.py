"""vLLM generates from exports what transformers generates: native classes, and Steel's dense ones by their own code.

Needs vLLM (a CPU build will do) in .venv/vllm-venv: docs/downstream.md says how.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_exports import QWEN_ROWS, ROOT, documented, export_all, run_documented
from transformers import AutoModelForCausalLM

PYTHON = ROOT / ".venv" / "vllm-venv" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv/vllm-venv"),
]
TOLERANCE = 1e-4
PROMPTS = [[108386, 104256, 100132, 9370, 17340, 115, 1], [791, 3974, 13876, 38835, 35308, 927]]
NEW = 20
QUIET = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
         "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory, shared_data) -> dict[str, Path]:
    names = ["qwen3", "steel-raw", "steel-senet", "steel-lagged"]
    return export_all(names, shared_data / "qwen_tokenizer", QWEN_ROWS, tmp_path_factory.mktemp("exports"))


def _generate(export: Path, folder: Path, *trust: str) -> subprocess.CompletedProcess:
    (folder / "request.json").write_text(json.dumps({"ids": PROMPTS, "new": NEW}))
    script = str(Path(__file__).with_name("vllm_generate.py"))
    command = [str(PYTHON), script, str(export), str(folder / "request.json"), str(folder / "answer.json"), *trust]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET}, timeout=590)


@pytest.mark.parametrize("name", ["qwen3", "steel-raw", "steel-senet"])
def test_greedy_tokens_and_their_probabilities_are_those_of_transformers(name, exports, tmp_path):
    export, trust = exports[name], ["trust"] if name == "steel-senet" else []
    if name == "steel-raw":
        export = Path(shutil.copytree(export, tmp_path / "relabelled"))
        run_documented(documented("Qwen2ForCausalLM", **{"exports/steel-as-qwen2": str(export)}))
    done = _generate(export, tmp_path, *trust)
    assert done.returncode == 0, done.stderr[-5000:]
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, trust_remote_code=True).eval()
    for prompt, found in zip(PROMPTS, json.loads((tmp_path / "answer.json").read_text()), strict=True):
        ids = torch.tensor([prompt])
        greedy = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
        assert greedy[0, len(prompt) :].tolist() == found["ids"]
        with torch.no_grad():
            steps = model(greedy).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = steps.gather(1, greedy[0, len(prompt) :, None])[:, 0]
        assert (chosen - torch.tensor(found["logprobs"])).abs().max() < TOLERANCE


def test_a_mixture_over_the_sequence_is_refused(exports, tmp_path):
    done = _generate(exports["steel-lagged"], tmp_path, "trust")
    assert done.returncode != 0
    assert "softmoe_causal cannot run in vLLM" in done.stdout + done.stderr
