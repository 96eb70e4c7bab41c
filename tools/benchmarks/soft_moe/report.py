"""Tables and curves of the soft-mixture comparison, from the `result.json` files that `compare.py` left.

python tools/benchmarks/soft_moe/report.py --runs DIR --json FILE.json --picture FILE.png
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    arguments = parser.parse_args()
    read = [json.loads(file.read_text()) for file in sorted(arguments.runs.glob("small/*/*/result.json"))]
    large = [json.loads(file.read_text()) for file in sorted(arguments.runs.glob("large/*/result.json"))]
    random = [json.loads(file.read_text()) for file in sorted(arguments.runs.glob("random/*.json"))]
    chosen = at_best_rate(read)
    text = [small_table(chosen), paired_table(chosen), rates_table(read), large_table(large), random_table(random)]
    print("\n\n".join(text))
    kept = {"small": [without_curves(row) for row in read], "large": large, "random": random}
    arguments.json.write_text(json.dumps(kept) + "\n")
    draw(chosen, large, random, arguments.picture)


def at_best_rate(results: list[Result]) -> dict[str, list[Result]]:
    """Of every variant the runs at the rate that was given all seeds, best variant first."""
    found = defaultdict(lambda: defaultdict(list))
    for row in results:
        found[row["variant"]][row["lr"]].append(row)
    chosen = {variant: max(rates.values(), key=len) for variant, rates in found.items()}
    return dict(sorted(chosen.items(), key=lambda item: mean(item[1], "honest")))


def mean(rows: list[Result], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def small_table(chosen: dict[str, list[Result]]) -> str:
    lines = [
        "| variant | parameters | MFLOPs a token | best rate | teacher-forced | honest, mean of seeds | lowest to highest |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, rows in chosen.items():
        honest = [row["honest"] for row in rows]
        lines.append(
            f"| {variant} | {rows[0]['parameters']:,} | {rows[0]['flops_per_token'] / 1e6:.2f} | {rows[0]['lr']:g} "
            f"| {mean(rows, 'teacher_forced'):.4f} | **{mean(rows, 'honest'):.4f}** "
            f"| {min(honest):.4f} to {max(honest):.4f} ({len(rows)}) |"
        )
    return "\n".join(lines)


def paired_table(chosen: dict[str, list[Result]]) -> str:
    """Honest loss minus that of dense at the same seed, which fixes the order of data."""
    dense = {row["seed"]: row["honest"] for row in chosen["dense"]}
    lines = [
        "| variant | " + " | ".join(f"seed {seed}" for seed in dense) + " | mean |",
        "|---" * (len(dense) + 2) + "|",
    ]
    for variant, rows in chosen.items():
        apart = {row["seed"]: row["honest"] - dense[row["seed"]] for row in rows}
        if variant != "dense" and len(apart) == len(dense):
            cells = [f"{apart[seed]:+.4f}" for seed in dense]
            lines.append(f"| {variant} | " + " | ".join(cells) + f" | {statistics.mean(apart.values()):+.4f} |")
    return "\n".join(lines)


def rates_table(results: list[Result]) -> str:
    rates = sorted({row["lr"] for row in results})
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for row in results:
        if row["seed"] == 1:
            found[row["variant"]][row["lr"]] = row["honest"]
    lines = ["| honest loss, seed 1, at rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|---" * (len(rates) + 1) + "|")
    for variant, by_rate in found.items():
        if len(by_rate) > 1:
            cells = [f"{by_rate[rate]:.4f}" if rate in by_rate else "" for rate in rates]
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def large_table(results: list[Result]) -> str:
    lines = ["| variant | parameters | MFLOPs a token | rate | honest loss |", "|---|---|---|---|---|"]
    for row in sorted(results, key=lambda row: row["honest"]):
        lines.append(
            f"| {row['variant']} | {row['parameters']:,} | {row['flops_per_token'] / 1e6:.1f} | {row['lr']:g} "
            f"| {row['honest']:.4f} |"
        )
    return "\n".join(lines)


def random_table(results: list[Result]) -> str:
    lines = ["| variant | teacher-forced, last 100 of 1500 steps | honest | below ln V |", "|---|---|---|---|"]
    for row in results:
        below = row["ln_vocabulary"] - row["last_100_steps"]
        lines.append(
            f"| {row['variant']} | {row['last_100_steps']:.4f} | {row['prefix_only']:.4f} | {below:.4f} "
            f"{'(leak)' if below > 0.02 else ''} |"
        )
    return "\n".join(lines)


def without_curves(row: Result) -> Result:
    return {key: value for key, value in row.items() if key != "training_curve"}


def draw(chosen: dict[str, list[Result]], large: list[Result], random: list[Result], target: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (curves, bars), (wide, noise) = figure.subplots(2, 2)
    curves.set(title="2.2M parameters: validation loss", xlabel="tokens", ylabel="nats per token, teacher-forced")
    for variant, rows in chosen.items():
        points = list(zip(*(row["curve"] for row in rows), strict=True))
        leaks = "" if rows[0]["causal"] else " (sees future)"
        tokens = [values[0][0] for values in points]
        losses = [statistics.mean(value[1] for value in values) for values in points]
        curves.plot(tokens[1:], losses[1:], "-" if rows[0]["causal"] else "--", label=variant + leaks)
    curves.legend(fontsize=7)
    bars.set(title="2.2M parameters: what was said and what is true", ylabel="nats per token")
    names = list(chosen)
    places = range(len(names))
    bars.bar([p - 0.2 for p in places], [mean(chosen[n], "teacher_forced") for n in names], 0.4, label="teacher-forced")
    bars.bar([p + 0.2 for p in places], [mean(chosen[n], "honest") for n in names], 0.4, label="honest (prefix only)")
    bars.set_ylim(bottom=min(mean(rows, "teacher_forced") for rows in chosen.values()) - 0.1)
    bars.set_xticks(list(places), names, rotation=30, ha="right", fontsize=7)
    bars.legend(fontsize=7)
    wide.set(title="32M parameters: training loss (one seed)", xlabel="tokens", ylabel="nats per token")
    for row in large:
        wide.plot(*zip(*row["training_curve"][2:], strict=True), label=row["variant"])
    wide.legend(fontsize=7)
    noise.set(title="independent random tokens: training loss", xlabel="step", ylabel="nats per token")
    for row in random:
        noise.plot(*zip(*row["curve"], strict=True), label=row["variant"], linewidth=1)
    noise.axhline(math.log(32), color="black", linewidth=0.8, label="ln V: nobody honest can be below")
    noise.legend(fontsize=7)
    for axes in (curves, bars, wide, noise):
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    main()
