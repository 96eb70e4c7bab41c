"""Exports for programs that read them: made by the real engine and `export`, tiny but for the real vocabulary; and the code of docs/downstream.md."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
QWEN_ROWS = 151936
_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # heads of 32: vLLM knows no smaller
_GATED = {**_SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
CLASSES: dict[str, dict[str, Any]] = {
    "qwen3": {**_GATED, "head_dim": 32, "tie_word_embeddings": True},
    "llama": {**_GATED, "tie_word_embeddings": False},
    "qwen2": {**_GATED, "tie_word_embeddings": True},
    "gpt_neox": {**_SIZES, "intermediate_size": 256, "tie_word_embeddings": False},
    "granite": {
        **_GATED, "tie_word_embeddings": True, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "logits_scaling": 9.0, "attention_multiplier": 0.25,
    },
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True},
    "steel-raw": {**_GATED, "FFN_type": "raw", "mlp_type": "raw", "intermediate_size": 256, "mlp_div_ratio": 2},
    "steel-senet": {**_GATED, "FFN_type": "raw", "mlp_type": "senet"},
    "steel-lagged": {
        **_GATED, "FFN_type": "softmoe_causal", "causal_slots": "lagged", "segment_length": 32, "mlp_type": "senet",
        "mlp_div_ratio": 4, "n_experts": 4,
    },
}  # fmt: skip
"""name: configuration; the part of a name before a dash is `model.type`."""


def export_all(names: list[str], tokenizer: Path, rows: int, folder: Path) -> dict[str, Path]:
    """Two steps of training for each name under one launcher, then fp32 exports: {name: folder}. `rows`: of the embedding."""
    from conftest import finished, launcher

    from megatron_steel.convert.hf import export

    cases = {
        name: {
            "run": {"seed": 5}, "tokenizer": {"path": str(tokenizer)},
            "model": {
                "type": name.split("-")[0],
                "config": {**CLASSES[name], "vocab_size": rows, "initializer_range": 0.1},  # logits of several units
            },
            "data": {"train": "made-up", "sequence_length": 16}, "optim": {"lr": 1e-2},
            "train": {
                "steps": 2, "global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "save_every_steps": 2,
            },
            "deepspeed": {"config": "zero1.json"},
        }
        for name in names
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    script = str(ROOT / "tests" / "convert" / "make_checkpoints.py")
    finished([*launcher(1), script, str(folder / "cases.json"), str(folder / "runs")])
    return {name: export(folder / "runs" / name, folder / name, "float32") for name in names}


def documented(holds: str, **replacements: str) -> str:
    """The one Python block of docs/downstream.md that holds a text, with strings in it replaced."""
    page = (ROOT / "docs" / "downstream.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if holds in block]
    for old, new in replacements.items():
        assert f'"{old}"' in code
        code = code.replace(f'"{old}"', json.dumps(new))
    return code


def run_documented(code: str, python: str | Path = sys.executable) -> None:
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
