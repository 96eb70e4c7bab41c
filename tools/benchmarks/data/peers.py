"""What the data benchmarks share: the real samples as one jsonl, timed runs, medians, tables. Not for the package."""

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def sample_texts(folder: Path) -> list[str]:
    """One text a record of every file below `folder`: its `text` or `content`, else all its strings joined."""
    texts = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".parquet")):
        for row in _records(path):
            text = row.get("text") or row.get("content") or "\n".join(_strings(row))
            if text:
                texts.append(text)
    return texts


def _records(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    text = path.read_text(encoding="utf-8")
    return (
        json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def repeated_jsonl(samples: Path, target: Path, megabytes: float, special: bool = True) -> int:
    """Write the samples over and over until the file has that size; returns its documents.

    With `special` a few of them hold the tokenizer's own special strings written out, as chat data does.
    """
    texts = sample_texts(samples)
    if special:
        texts[::500] = [f"<|im_start|>user\n{text}<|im_end|>\n<|endoftext|>" for text in texts[::500]]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
    written = documents = 0
    with open(target, "wb") as file:
        while written < megabytes * 1e6:
            for line in lines:
                if written >= megabytes * 1e6:
                    break
                written += file.write(line)
                documents += 1
    return documents


def timed(command: Sequence[str | Path], cwd: Path = ROOT) -> dict[str, float]:
    """Run a command to its end: wall seconds, CPU seconds of it and its children, largest resident MB of one process.

    One thread for each numerical library. Raises SystemExit with what it said where it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    os.sync()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    meter = subprocess.Popen([str(part) for part in command], cwd=cwd, env=environment, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)  # fmt: skip
    peak = _Peak(meter.pid)
    said = meter.communicate()[0]
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if meter.returncode:
        raise SystemExit(f"{command} ended with {meter.returncode}:\n{said[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "peak_mb": peak.stop()}


class _Peak:
    """The largest sum of the resident memory of a process and all below it, looked at twenty times a second."""

    def __init__(self, pid: int):
        import threading

        self._pid, self._most, self._over = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        while not self._over.wait(0.05):
            total = 0
            try:
                root = psutil.Process(self._pid)
                family = [root, *root.children(recursive=True)]
            except psutil.Error:
                continue
            for process in family:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self._most = max(self._most, total)

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        return round(self._most / 1e6, 1)


def same_bytes(ours: Path, theirs: Path) -> None:
    """Stop the benchmark where two data sets differ."""
    for kind in ("bin", "idx"):
        if subprocess.run(["cmp", f"{ours}.{kind}", f"{theirs}.{kind}"]).returncode:
            raise SystemExit(f"{ours}.{kind} and {theirs}.{kind} differ: nothing is measured")


def alternating(pairs: int, first: Any, second: Any) -> list[tuple[dict[str, float], dict[str, float]]]:
    """(first(), second()) of each pair; every other pair runs them the other way round."""
    rows = []
    for pair in range(pairs):
        if pair % 2:
            b = second()
            a = first()
        else:
            a = first()
            b = second()
        print(f"  pair {pair + 1}: {a['seconds']:.2f} s and {b['seconds']:.2f} s", flush=True)
        rows.append((a, b))
    return rows


def compared(
    name: str, rows: list[tuple[dict[str, float], dict[str, float]]], target: str, **more: Any
) -> dict[str, Any]:
    """Medians of the pairs (ours, theirs) and the median of their ratios theirs / ours: how many times faster ours is."""
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in rows]
    sides = {
        side: {key: statistics.median(row[i][key] for row in rows) for key in rows[0][i]}
        for i, side in enumerate(("ours", "theirs"))
    }
    return {
        "what": name, **sides, "times_faster": round(statistics.median(ratios), 3), "least": round(min(ratios), 3),
        "most": round(max(ratios), 3), "target": target, "pairs": rows, **more,
    }  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    head = "| what | ours, s (CPU s, MB) | theirs, s (CPU s, MB) | times faster (least to most) | target |\n|---|---|---|---|---|"
    lines = []
    for r in results:
        cells = [
            " ".join([f"{r[side]['seconds']:.2f}", *[f"({r[side]['cpu_seconds']:.1f}, {r[side]['peak_mb']:.0f})"]])
            if "cpu_seconds" in r[side] else f"{r[side]['seconds']:.2f}"
            for side in ("ours", "theirs")
        ]  # fmt: skip
        lines.append(
            f"| {r['what']} | {cells[0]} | {cells[1]} | {r['times_faster']:.2f} ({r['least']:.2f} to {r['most']:.2f}) | {r['target']} |"
        )
    return "\n".join([head, *lines])


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(), "commit": commit, "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0], "python": platform.python_version(),
    }  # fmt: skip


def publish(results: Sequence[dict[str, Any]], facts: dict[str, Any], target: Path | None) -> None:
    if target:
        target.write_text(json.dumps({**facts, "results": list(results)}, indent=1) + "\n", encoding="utf-8")
    print(table(results))
