"""Alternating measurements: medians, ratios within a round, one JSON file and one Markdown table. Knows no benchmark."""

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
Measured = dict[str, float]


def alternate(ways: dict[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """Each way once a round, in the reverse order in every second one, so that a machine that slows down slows all."""
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            found[name].append(ways[name]())
            print(f"round {number + 1}/{rounds} {name}: {short(found[name][-1])}", flush=True)
    return found


def median(rows: list[Measured], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def ratio(rows: list[Measured], others: list[Measured], key: str) -> tuple[float, float, float]:
    """Median, least and largest of the ratios within a round."""
    ratios = [a[key] / b[key] for a, b in zip(rows, others, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def ratio_text(rows: list[Measured], others: list[Measured], key: str) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*ratio(rows, others, key))


def write(stem: Path | None, benchmark: str, setting: dict[str, Any], found: dict[str, Any], text: str) -> None:
    """Print the table; with a `stem` also write STEM.md, and every figure to STEM.json."""
    print(f"\n{text}")
    if stem is None:
        return
    stem.parent.mkdir(parents=True, exist_ok=True)
    facts = {"benchmark": benchmark, **machine(), "setting": setting, "rounds": found}
    stem.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    rounds = len(next(iter(found.values())))
    head = (
        f"# {benchmark}\n\nMedians of {rounds} rounds (ratios within a round: median, least, largest), {facts['cores']} cores of "
        f"{facts['cpu']}, load {facts['load']:.1f} at the end, {facts['date']}; {versions}; commit {facts['commit']}."
    )
    stem.with_suffix(".md").write_text(f"{head}\n\n{text}\n", encoding="utf-8")


def table(titles: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    names = ("torch", "deepspeed", "transformers", "accelerate")
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return {
        "commit": done.stdout.strip() or None,
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
    }


def short(row: Measured) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in row.items())
