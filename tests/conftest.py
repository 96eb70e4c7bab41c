"""Shared parts: a tiny tokenizer and data set, a tiny recipe, and the real launcher."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml

# transformers copies modelling code of exports into a cache keyed by the folder's name alone: one cache a process, so
# that two test runs, or two versions of the code, never read each other's copies.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="steel-hf-modules-")

VOCABULARY = 128
SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    import importlib.util

    gpu = importlib.util.find_spec("torch") is not None and __import__("torch").cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no real samples in {SHARED}"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return SHARED


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Path:
    """A Hugging Face tokenizer folder with `VOCABULARY` entries."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": 0, "<|im_end|>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with the prefixes `train` (about 12,000 tokens) and `validation` (about 1,300)."""
    from megatron_steel.data.indexed import IndexedWriter

    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(7)
    for name, documents in (("train", 180), ("validation", 20)):
        with IndexedWriter(folder / name, np.uint16) as writer:
            for _ in range(documents):
                body = np.cumsum(generator.integers(1, 4, generator.integers(20, 110))) % (VOCABULARY - 3) + 3
                writer.add_document(np.append(body, 1).astype(np.uint16))
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory, tiny_tokenizer, tiny_data) -> Path:
    """A YAML recipe: a two-layer Steel model in fp32, 8 samples of 32 tokens a step, 6 steps, logged each step."""
    tree = {
        "run": {"seed": 11},
        "tokenizer": {"path": str(tiny_tokenizer)},
        "model": {
            "type": "steel",
            "config": {
                "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "mlp_div_ratio": 1,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "max_position_embeddings": 64, "FFN_type": "raw", "mlp_type": "senet",
            },
        },
        "data": {
            "train": str(tiny_data / "train"), "validation": str(tiny_data / "validation"), "sequence_length": 32,
        },
        "optim": {"lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1},
        "train": {
            "steps": 6, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "log_every_steps": 1,
            "eval_every_steps": 3, "eval_samples": 10, "save_every_steps": 3,
        },
        "deepspeed": {"config": "zero3.json"},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def launch():
    """launch(ranks, recipe, *overrides): the real launcher (one rank: the verb), finished. Returns the process."""

    def run(ranks: int, recipe, *overrides, expect: int = 0) -> subprocess.CompletedProcess:
        return finished(launch_command(ranks, recipe, *overrides), expect)

    return run


@pytest.fixture(scope="session")
def launch_many():
    """launch_many(ranks, recipe, [override, ...], [override, ...], ...): runs in turn under one launcher."""

    def run(ranks: int, recipe, *runs) -> subprocess.CompletedProcess:
        words = [word for number, overrides in enumerate(runs) for word in (["+"] if number else []) + overrides]
        script = str(Path(__file__).with_name("run_many.py"))
        python = [sys.executable] if ranks == 1 else launcher(ranks)
        return finished([*python, script, str(recipe), *words])

    return run


@pytest.fixture(scope="session")
def stub_server(tmp_path_factory):
    """Runs with a stub engine, in child processes made to be killed: `faults/stub_run.py`."""
    from stub_run import Stub, fast_folder

    with fast_folder(tmp_path_factory) as root, Stub(root) as server:
        yield server


def finished(command: list[str], expect: int = 0, timeout: float = 400) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread(), timeout=timeout)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def launcher(ranks: int) -> list[str]:
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port())]


def launch_command(ranks: int, recipe, *overrides) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "megatron_steel.cli", "pretrain", str(recipe), *overrides]
    return [*launcher(ranks), "--module", "megatron_steel.pretrain", str(recipe), *overrides]


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def metrics():
    """metrics(run_folder): the lines of `metrics.jsonl`, as {step: {...}} merged."""

    def read(folder) -> dict[int, dict]:
        rows: dict[int, dict] = {}
        for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault(row["step"], {}).update(row)
        return rows

    return read


@pytest.fixture
def small_units(monkeypatch):
    """`tokenize` cuts even small files into many parts."""
    monkeypatch.setattr("megatron_steel.data.tokenize._LEAST_UNIT_BYTES", 10_000)
