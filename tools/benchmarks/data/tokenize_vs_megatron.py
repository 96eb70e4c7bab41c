"""Tokenizing beside Megatron-LM's own tools: the real samples repeated to a size, one tokenizer, the same bytes.

    python tools/benchmarks/data/tokenize_vs_megatron.py --megatron CHECKOUT --megatron-python PYTHON \\
        --samples DIR --tokenizer DIR [--megabytes 200] [--pairs 5] [--workers 1 2] [--json FILE]

CHECKOUT is Megatron-LM's repository; PYTHON an interpreter that can run its tools. Rows:

- `preprocess_data.py --append-eod` with N workers against `tokenize --workers N`;
- `preprocess_data_fast.py` (gigatoken, on all CPUs, the whole file in memory) against `tokenize` on all CPUs. There are no
  empty documents in the input, and it appends no end of document while it is timed (ours always does).

Both sides are whole commands, from start to files on disk; ours also syncs and hashes. Before the times: ours and
`preprocess_data.py` byte for byte, and `preprocess_data_fast.py --append-eod` the same.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megatron", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--megatron-python", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--samples", type=Path, required=True, help="a folder of jsonl, json and parquet")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--skip-fast", action="store_true", help="leave preprocess_data_fast.py out")
    parser.add_argument("--folder", type=Path, help="where to write; the disk that is measured")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    facts = {**peers.machine(), "megabytes": asked.megabytes}
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="tokenize-") as folder:
        results = measure(asked, Path(folder), facts)
    peers.publish(results, facts, asked.json)


def measure(asked: argparse.Namespace, folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    source = folder / "samples.jsonl"
    facts["documents"] = peers.repeated_jsonl(asked.samples, source, asked.megabytes)
    megatron = asked.megatron.resolve()
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", asked.tokenizer.resolve()]

    def ours(workers: int) -> dict[str, float]:
        command = [
            sys.executable,
            "-m",
            "megatron_steel.cli",
            "tokenize",
            source,
            "--tokenizer",
            asked.tokenizer.resolve(),
        ]
        return peers.timed([*command, "--output", folder / "ours", "--workers", str(workers)])

    def theirs(tool: str, *more: str) -> dict[str, float]:
        command = [asked.megatron_python.absolute(), f"tools/{tool}", "--input", source, *tokenizer]
        return peers.timed([*command, "--output-prefix", folder / "theirs", *more], megatron)

    results = []
    print("comparing the bytes", flush=True)
    ours(max([1, *asked.workers]))
    theirs("preprocess_data.py", "--append-eod", "--workers", str(max([1, *asked.workers])))
    peers.same_bytes(folder / "ours", folder / "theirs_text_document")
    if not asked.skip_fast:
        theirs("preprocess_data_fast.py", "--append-eod", "--use-gigatoken")
        peers.same_bytes(folder / "ours", folder / "theirs_text_document")
    for workers in asked.workers:
        print(f"preprocess_data.py, {workers} workers", flush=True)
        slow = "preprocess_data.py", "--append-eod", "--workers", str(workers)
        rows = peers.alternating(asked.pairs, lambda n=workers: ours(n), lambda a=slow: theirs(*a))
        results.append(peers.compared(f"`preprocess_data.py`, {workers} workers", rows, ">= 6"))
    if not asked.skip_fast:
        cpus = len(os.sched_getaffinity(0))
        print("preprocess_data_fast.py", flush=True)
        rows = peers.alternating(
            asked.pairs, lambda: ours(cpus), lambda: theirs("preprocess_data_fast.py", "--use-gigatoken")
        )
        results.append(peers.compared(f"`preprocess_data_fast.py`, {cpus} CPUs", rows, ">= 0.9"))
    return results


if __name__ == "__main__":
    main()
