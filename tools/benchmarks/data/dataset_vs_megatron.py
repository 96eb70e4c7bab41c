"""Samples for training, beside megatron-core's `GPTDataset`: opening, reading, document masks, seeking, memory.

    python tools/benchmarks/data/dataset_vs_megatron.py --megatron FOLDER [--folder DISK] [--pairs 5] [--json FILE]
    ... --small                      the same in under a minute, to see that it runs

FOLDER holds the package: `pip install --no-deps --target FOLDER megatron-core==0.16.1`. Every measurement is a process of its
own, ours and theirs in turn, each first in every second pair; a row's ratio is the median of the pairs' ratios, its range beside it.
Imports are not measured. The corpus of 4.5e9 tokens in 5e6 documents has a whole index, but a `.bin` of holes (it costs no
disk, and opening reads none of it); samples are read from a smaller corpus with real tokens. Before anything is timed,
both readers must give the same tokens, masks and positions for the same places.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[3]), str(HERE.parent)]

from megatron_steel.data import manifest  # noqa: E402
from megatron_steel.data.indexed import IndexedWriter  # noqa: E402

L, EOD, SEED = 2048, 0, 1234
FULL = {"open_documents": 5_000_000, "open_tokens": 4_500_000_000, "tokens": 500_000_000, "samples": 4000, "masks": 60,
        "replayed_steps": 2000, "seek_step": 1_000_000, "most": 10**12}  # fmt: skip
SMALL = {"open_documents": 20_000, "open_tokens": 18_000_000, "tokens": 4_000_000, "samples": 200, "masks": 10,
         "replayed_steps": 50, "seek_step": 1_000_000, "most": 10**10}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megatron", type=Path, default=Path(sys.prefix) / "megatron-core")
    parser.add_argument("--folder", type=Path, help="where the corpora are made; the disk that is measured")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    sizes = SMALL if asked.small else FULL
    folder = Path(tempfile.mkdtemp(dir=asked.folder, prefix="dataset-vs-megatron-"))
    try:
        make_corpora(folder, sizes)
        rows = measure(folder, asked.megatron, sizes, asked.pairs)
    finally:
        shutil.rmtree(folder)
    result = {
        "machine": {"cpu": _cpu(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "commit": _commit(), "sizes": sizes, "pairs": asked.pairs, "rows": rows,
    }  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1))
    print(table(rows))


# ---- the corpora


def make_corpora(folder: Path, sizes: dict[str, int]) -> None:
    """`open`: a whole index over a sparse `.bin`; `real`: tokens on the disk; `sparse-N`: nothing but a header and last entries."""
    generator = np.random.default_rng(SEED)
    with IndexedWriter(folder / "real", np.int32) as writer:
        while writer.tokens < sizes["tokens"]:
            ids = generator.integers(1, 150_000, int(generator.geometric(1 / 900)) + 1, dtype=np.int32)
            ids[-1] = EOD
            writer.add_document(ids)
    manifest.write(folder / "real", writer.facts)
    documents, tokens = sizes["open_documents"], sizes["open_tokens"]
    cuts = np.unique(generator.integers(1, tokens, documents - 1))  # a few fall together
    _sparse(folder / "open", tokens, np.diff(np.concatenate([[0], cuts, [tokens]])))
    for most in (10**9, sizes["most"]):
        _sparse(folder / f"sparse-{most}", most, None, documents=most // 1000)


def _sparse(prefix: Path, tokens: int, lengths: np.ndarray | None, documents: int = 0) -> None:
    count = documents if lengths is None else len(lengths)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(4 * tokens)
    offsets, boundaries = 34 + 4 * count, 34 + 12 * count
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, count, count + 1))
        if lengths is None:
            file.truncate(boundaries + 8 * (count + 1))
            for at, kind, value in ((offsets - 4, "<i", 1000), (boundaries - 8, "<q", 4 * (tokens - 1000)), (boundaries + 8 * count, "<q", count)):  # fmt: skip
                file.seek(at)
                file.write(struct.pack(kind, value))
        else:
            file.write(lengths.astype("<i4").tobytes())
            file.write(((np.cumsum(lengths) - lengths) * 4).astype("<i8").tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())
    from megatron_steel.data.indexed import Facts

    facts = Facts(
        tokens, count, count, "int32", 4 * tokens, os.path.getsize(f"{prefix}.idx"), f"{tokens:064x}", 149_999, 0
    )
    manifest.write(prefix, facts)


# ---- the measurements


def measure(folder: Path, megatron: Path, sizes: dict[str, int], pairs: int) -> list[dict[str, Any]]:
    def one(what: str, **arguments: Any) -> Any:
        """In a child of this process, which has imported everything: memory and open files of its own."""
        reader, writer = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(
            target=lambda: writer.send(getattr(measurements, what)(megatron=str(megatron), **arguments))
        )
        child.start()
        writer.close()  # so that the end of the child is the end of the pipe
        result = reader.recv()
        child.join()
        return result

    measurements = importlib.import_module("measurements")
    measurements.theirs(str(megatron), "", 0)
    real, rows = str(folder / "real"), []
    print("equal:", one("equal", prefix=real, samples=50))

    def compare(name: str, target: str, what: str, **arguments: Any) -> None:
        ours, theirs = alternate(pairs, lambda who: one(f"{what}_{who}", **arguments))
        rows.append(_row(name, target, ours, theirs))
        print(table(rows[-1:]), flush=True)

    opened = {"prefix": str(folder / "open"), "samples": min(2_000_000, sizes["open_tokens"] // L - 2)}
    compare("open + first batch of 8, first start", ">= 100 x", "open", **opened, keep_cache=False)
    compare("open + first batch of 8, its index cached", "", "open", **opened, keep_cache=True)
    compare("a sample of 2048 tokens, warm", ">= 3 x", "read", prefix=real, samples=sizes["samples"], cold=False)
    compare("a sample of 2048 tokens, cold", ">= 1 x", "read", prefix=real, samples=sizes["samples"], cold=True)
    masks = {"prefix": real, "samples": sizes["masks"]}
    compare("a sample with its documents told apart", ">= 50 x", "masked", **masks)
    compare("the same, with a dense mask made on the CPU", "", "dense", **masks)
    seek = {"prefix": real, "step": sizes["seek_step"], "replayed": sizes["replayed_steps"]}
    compare(f"seek to step {sizes['seek_step']:,}", "ours < 0.001 s", "seek", **seek)
    for most in (10**9, sizes["most"]):
        grown = [memory(folder / f"sparse-{most}") for _ in range(3)]
        rows.append({"name": f"resident memory, {most:.0e} tokens, MB", "target": "< 50", "ours": max(grown)})
    return rows


def memory(prefix: Path) -> float:
    """MB, in a process that has nothing in it yet."""
    code = (
        f"import sys; sys.path[:0] = {sys.path[:2]}; import measurements; print(measurements.memory({str(prefix)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def alternate(pairs: int, run: Callable[[str], float]) -> tuple[list[float], list[float]]:
    """Seconds of both sides, each first in every second pair."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for pair in range(pairs):
        for who in ("ours", "theirs") if pair % 2 else ("theirs", "ours"):
            seconds[who].append(run(who))
    return seconds["ours"], seconds["theirs"]


def _row(name: str, target: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    return {"name": name, "target": target, "ours": statistics.median(ours), "theirs": statistics.median(theirs),
            "ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1], "all": [ours, theirs]}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; times in seconds."""
    lines = ["| what | ours | peer | ratio (range) | target |", "|---|---|---|---|---|"]
    for r in rows:
        peer = f"{r['theirs']:.3g}" if "theirs" in r else "-"
        ratio = f"{r['ratio']:.1f} ({r['least']:.1f} to {r['most']:.1f})" if "ratio" in r else "-"
        lines.append(f"| {r['name']} | {r['ours']:.3g} | {peer} | {ratio} | {r['target']} |")
    return "\n".join(lines)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE.parent, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
