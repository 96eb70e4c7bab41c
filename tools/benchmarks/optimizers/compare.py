"""Muon beside AdamW, and WSD beside cosine, at equal steps: the tables of docs/recipes.md, by the real `pretrain`.

    python tools/benchmarks/optimizers/compare.py --data DIR --runs DIR

DIR holds the quickstart's corpus (`tools/quickstart_corpus.py DIR`); tokenizer and data sets are made beside it. Each
optimizer's learning rate is swept on the first seed, by doubling until the best lies inside, and two more seeds run at
the best. Every run leaves `result.json` and is not repeated, so that the tool can be stopped and started again.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from megatron_steel import cli

BASE = Path(__file__).with_name("base.yaml")
SEEDS = (1, 2, 3)
WSD = ["schedule.name=wsd", "schedule.decay_ratio=0.2"]
SCHEDULES = {
    "cosine": ["schedule.name=cosine"],
    "WSD, linear": [*WSD, "schedule.decay_shape=linear"],
    "WSD, 1-sqrt": [*WSD, "schedule.decay_shape=sqrt"],
    "WSD, exponential": [*WSD, "schedule.decay_shape=exponential"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    arguments = parser.parse_args()
    bench = Bench(arguments.runs, prepared(arguments.data))

    adamw, adamw_swept = bench.best("adamw", (4e-3, 8e-3), lambda lr: [f"optim.lr={lr}"])
    muon, muon_swept = bench.best(
        "muon", (1e-2, 2e-2), lambda lr: ["optim.name=muon", f"optim.lr={adamw}", f"optim.muon_lr={lr}"]
    )
    print("\n| optimizer | learning rates tried: validation loss (seed 1) |\n|---|---|")
    for name, swept in (("AdamW", adamw_swept), ("Muon", muon_swept)):
        print(f"| {name} | {', '.join(f'{lr:g}: {loss:.3f}' for lr, loss in sorted(swept.items()))} |")
    print("\n| optimizer | schedule | validation loss by seed | mean | s a step |\n|---|---|---|---|---|")
    chosen = {"AdamW": [f"optim.lr={adamw}"],
              "Muon": ["optim.name=muon", f"optim.lr={adamw}", f"optim.muon_lr={muon}"]}  # fmt: skip
    for optimizer, words in chosen.items():
        for schedule, more in SCHEDULES.items():
            if optimizer == "AdamW" or schedule in ("cosine", "WSD, 1-sqrt"):
                found = [bench.run(f"{optimizer}-{schedule}", seed, [*words, *more]) for seed in SEEDS]
                losses = [result["loss"] for result in found]
                speed = statistics.median(result["seconds_step"] for result in found)
                print(f"| {optimizer} | {schedule} | {', '.join(f'{x:.3f}' for x in losses)} | "
                      f"{statistics.mean(losses):.3f} | {speed:.3f} |")  # fmt: skip


def prepared(folder: Path) -> list[str]:
    """The corpus as data sets of a vocabulary of 2,048; returns the overrides that name them."""
    tokenizer, sources = folder / "tokenizer-2048", [folder / "samples.jsonl", folder / "python.jsonl"]
    if not tokenizer.is_dir():
        done(["train-tokenizer", *map(str, sources), "--output", str(tokenizer), "--vocab-size", "2048"])
    prefix = folder / "both-2048"
    if not prefix.with_suffix(".manifest.json").is_file():
        done(["tokenize", *map(str, sources), "--tokenizer", str(tokenizer), "--output", str(prefix),
              "--validation-ratio", "0.05", "--shuffle"])  # fmt: skip
    return [f"tokenizer.path={tokenizer}", f"data.train={prefix}", f"data.validation={prefix}-validation"]


def done(words: list[str]) -> None:
    code = cli.main(words)
    if code != 0:
        raise SystemExit(f"{' '.join(words)} ended with {code}")


class Bench:
    def __init__(self, runs: Path, data: list[str]):
        self._runs, self._data = runs, data

    def best(self, name: str, rates: tuple[float, ...], words) -> tuple[float, dict[float, float]]:
        """The rate with the lowest validation loss on the first seed; doubled or halved until the best lies inside."""
        losses = {rate: self.run(f"{name}-{rate:g}", SEEDS[0], words(rate))["loss"] for rate in rates}
        while True:
            best = min(losses, key=lambda rate: losses[rate])
            beyond = {min(losses): best / 2, max(losses): best * 2}.get(best)
            if beyond is None:
                return best, losses
            losses[beyond] = self.run(f"{name}-{beyond:g}", SEEDS[0], words(beyond))["loss"]

    def run(self, name: str, seed: int, words: list[str]) -> dict:
        folder = self._runs / f"{name.replace(', ', '-')}-{seed}"
        file = folder / "result.json"
        if not file.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            done(["pretrain", str(BASE), *self._data, f"run.dir={folder}", f"run.seed={seed}", *words])
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            loss = next(row["validation_loss"] for row in reversed(rows) if "validation_loss" in row)
            steps = [row["seconds_step"] for row in rows[1:] if "seconds_step" in row]
            result = {"loss": loss, "seconds_step": statistics.median(steps), "words": words, "at": time.time()}
            shutil.rmtree(folder / "checkpoints")
            file.write_text(json.dumps(result) + "\n")
        return json.loads(file.read_text())


if __name__ == "__main__":
    main()
