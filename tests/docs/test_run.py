"""The blocks of a page that run here are run, in order, in one folder that looks like a checkout.

Small files stand in for what a page takes as given; a page's sizes are its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT, blocks, pages

PAGES = [page for page in pages() if any(block.mark == "" for block in blocks(page))]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page, tmp_path, given):
    for name in ("tools", "launch", "ds_configs", "docs", "pyproject.toml", "megatron_steel"):
        (tmp_path / name).symlink_to(ROOT / name)
    given(tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", _script(page)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-5000:]}"


def _script(page: Path) -> str:
    """The page's blocks in one shell, so that its variables live; runs of hundreds of steps are cut to a fiftieth."""
    parts = [f"echo '### {block.page}:{block.line}' >&2\n{block.text}" for block in blocks(page) if block.mark == ""]
    shorter = re.sub(r"train\.steps=(\d{3,})", lambda steps: f"train.steps={int(steps[1]) // 50}", "".join(parts))
    return "set -euo pipefail\n" + shorter


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """given(folder): put a tokenizer, data sets and a few input files there under the names that the pages use."""
    made = tmp_path_factory.mktemp("given")
    python = [sys.executable, "-m", "megatron_steel.cli"]
    texts = sorted((ROOT / "megatron_steel" / "samples").glob("*.jsonl"))
    rows = [json.loads(line)["text"] for file in texts for line in file.read_text(encoding="utf-8").splitlines()]
    _write(made / "sky.jsonl", [{"text": text} for text in rows])
    _write(made / "notes.jsonl", [{"content": text} for text in rows])
    turns = [
        [{"role": "user", "content": t[:40]}, {"role": "assistant", "content": t[40:400]}] for t in rows if len(t) > 120
    ]
    _write(made / "chats.jsonl", [{"messages": turn} for turn in turns])
    commands = [  # the last two: what the quickstart leaves
        ["train-tokenizer", "sky.jsonl", "--output", "tokenizer", "--vocab-size", "3000"],
        ["tokenize", "sky.jsonl", "--tokenizer", "tokenizer", "--output", "data/train", "--validation-ratio", "0.1"],
        ["train-tokenizer", "sky.jsonl", "--output", "runs/quickstart-data/tokenizer", "--vocab-size", "4000"],
        [
            "tokenize",
            "sky.jsonl",
            "--tokenizer",
            "runs/quickstart-data/tokenizer",
            "--validation-ratio",
            "0.2",
            "--output",
            "runs/quickstart-data/python",
        ],
    ]
    for words in commands:
        done = subprocess.run(
            [*python, *words], cwd=made, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr

    def put(folder: Path) -> None:
        for file in made.rglob("*"):
            if file.is_file():
                target = folder / file.relative_to(made)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())

    return put


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
