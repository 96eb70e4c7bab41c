"""Runs of a small recipe on made-up text under `megatron-steel launch`, watched from outside: their numbers are the run's own."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
_LIMIT = 420.0  # seconds for one run
_WORDS = 500


@dataclass(frozen=True)
class Run:
    """How a run ended, and its lines of `metrics.jsonl` by step."""

    code: int
    seconds: float
    rows: dict[int, dict[str, Any]]
    said: str
    resumed_after: float | None = None
    """Seconds from the kill to the first step behind it."""

    def median(self, key: str) -> float | None:
        values = [row[key] for step, row in sorted(self.rows.items()) if key in row and step > 5]
        return float(np.median(values)) if values else None


def prepare(folder: Path, tokens: int) -> None:
    """A tokenizer, a data set that a model can learn, and `small.yaml`, about 10 steps of a second on a GPU or a CPU."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from megatron_steel.data.indexed import IndexedWriter

    words = {"<eos>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, _WORDS)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder / "tokenizer"
    )
    generator = np.random.default_rng(1)
    with IndexedWriter(folder / "data", np.uint16) as writer:
        for _ in range(tokens // 1000):
            body = np.cumsum(generator.integers(1, 9, 999)) % (_WORDS - 2) + 2
            writer.add_document(np.append(body, 0).astype(np.uint16))


def recipe(folder: Path, ranks: int, gpu: bool) -> Path:
    """The small recipe: 40 steps of a llama."""
    sizes = (768, 12, 12, 512) if gpu else (64, 2, 4, 64)
    hidden, layers, heads, length = sizes
    config = {"vocab_size": 32000 if gpu else 512, "hidden_size": hidden, "intermediate_size": 4 * hidden,
              "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
              "max_position_embeddings": length, "tie_word_embeddings": True}  # fmt: skip
    tree = {
        "run": {"seed": 3}, "tokenizer": {"path": str(folder / "tokenizer")},
        "model": {"type": "llama", "config": config},
        "data": {"train": str(folder / "data"), "sequence_length": length},
        "optim": {"lr": 1e-3}, "schedule": {"name": "constant", "warmup_steps": 5},
        "train": {"steps": 40, "global_batch_size": 8 * ranks, "micro_batch_size": 4, "log_every_steps": 1,
                  "save_every_steps": 10, "deterministic": gpu},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def train(folder: Path, name: str, ranks: int, recipe: str, *overrides: str, kill_at: int | None = None) -> Run:
    """One supervised run to its end; with `kill_at` the last rank is killed once that step is done."""
    run = folder / name
    command = [sys.executable, "-m", "megatron_steel.cli", "launch", "--num_gpus", str(ranks), recipe, f"run.dir={run}"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    begin = time.monotonic()
    killed_at = resumed_after = None
    last = 0
    with (folder / f"{name}.log").open("w+", encoding="utf-8") as log:
        job = subprocess.Popen([*command, *overrides], stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": paths})
        try:
            while job.poll() is None:
                if time.monotonic() - begin > _LIMIT:
                    job.send_signal(signal.SIGTERM)
                if kill_at is not None and resumed_after is None:
                    now = max(_rows(run), default=0)
                    if killed_at is None and now >= kill_at:
                        last = _kill_last_rank(run, ranks) and now
                        killed_at = time.monotonic() if last else None
                    elif killed_at is not None and "starting again in" in Path(log.name).read_text() and now > last:
                        resumed_after = time.monotonic() - killed_at
                time.sleep(0.02)
        finally:  # this check may be ended itself
            job.terminate()
            job.wait()
        log.seek(0)
        said = log.read()
    return Run(job.returncode, time.monotonic() - begin, _rows(run), said, resumed_after)


def _kill_last_rank(run: Path, ranks: int) -> bool:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if (
            f"run.dir={run}" in words
            and f"--local_rank={ranks - 1}" in words
            and "deepspeed.launcher.launch" not in words
        ):
            process.kill()
            return True
    return False


def _rows(run: Path) -> dict[int, dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return rows
