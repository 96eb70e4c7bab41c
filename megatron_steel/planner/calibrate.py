"""Fit the coefficients of `speed` on published rows and check them on the others: `megatron-steel plan --check`.

Relative least squares: the sum over the fitted rows of (predicted / published - 1)^2 in the time of a step is linear in
the coefficients. Communication is left out of the fit: at nominal link speed it hides in every fitted row. The rule of
the split is written beside the rows; all three rotations of it are reported, so that each row is predicted once by a fit
that has not seen it. Rows of other training stacks are never fitted.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_steel.planner import speed
from megatron_steel.planner.hardware import Cluster, parse_cluster
from megatron_steel.planner.speed import Setting
from megatron_steel.planner.work import Work, work_of_model
from megatron_steel.recipe import Model

FILE = Path(__file__).with_name("published.yaml")
_FOLDS = 3


@dataclass(frozen=True)
class Row:
    """One published speed."""

    model: str
    work: Work
    setting: Setting
    cluster: Cluster
    tokens_per_second: float
    """Per GPU."""
    source: str = "llm-foundry"
    caveat: str = ""

    def predicted(self, coefficients: dict[str, float]) -> float:
        total = speed.tokens_per_second(self.work, self.setting, self.cluster, coefficients=coefficients)
        return total / self.cluster.ranks

    def error(self, coefficients: dict[str, float]) -> float:
        """Of the predicted time of a step, relative to the published: above 0 is planned too slow."""
        return self.tokens_per_second / self.predicted(coefficients) - 1


def read() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return tree


def rows() -> tuple[list[Row], list[Row]]:
    """(rows that may be fitted, in their order; rows of other stacks)."""
    tree = read()
    fitted = [_row(row, tree) for row in tree["fitted"]]
    others = [_row(row, tree, source, caveat) for row, source, caveat in tree["others"]]
    return fitted, others


def held_out(count: int, fold: int = 2) -> list[bool]:
    """The rule of the split: row i is held out where i % 3 == fold; 2 is the one whose fit the planner uses."""
    return [i % _FOLDS == fold for i in range(count)]


def fit(some: Sequence[Row]) -> dict[str, float]:
    """Coefficients >= 0 by relative least squares (those that would be negative are 0, one after another)."""
    names = list(speed.COEFFICIENTS)
    matrix, rest = [], []
    for row in some:
        published = _seconds(row) / row.setting.micro_batches
        weights, adam = speed.fixed(row.work, row.setting, row.cluster)
        values = speed.terms(row.work, row.setting, row.cluster)
        matrix.append([values[name] / published for name in names])
        rest.append(1 - (weights + adam / row.setting.micro_batches) / published)
    active = list(range(len(names)))
    while True:
        found = np.linalg.lstsq(np.array(matrix)[:, active], np.array(rest), rcond=None)[0]
        if (found >= 0).all():
            return dict.fromkeys(names, 0.0) | {names[i]: float(x) for i, x in zip(active, found, strict=True)}
        active.pop(int(np.argmin(found)))


def check() -> dict[str, Any]:
    """Errors of the planner's own coefficients, and of a fit for each rotation of the split."""
    fitted, others = rows()
    ours = speed.COEFFICIENTS
    held = held_out(len(fitted))
    folds = []
    for fold in range(_FOLDS):
        out = held_out(len(fitted), fold)
        coefficients = fit([row for row, o in zip(fitted, out, strict=True) if not o])
        folds.append(summary([row.error(coefficients) for row, o in zip(fitted, out, strict=True) if o]))
    return {
        "coefficients": ours,
        "fitted": summary([row.error(ours) for row, o in zip(fitted, held, strict=True) if not o]),
        "held_out": summary([row.error(ours) for row, o in zip(fitted, held, strict=True) if o]),
        "folds": folds,
        "others": summary([row.error(ours) for row in others]),
        "rows": [_as_dict(row, ours, out) for row, out in zip(fitted, held, strict=True)],
        "other_rows": [_as_dict(row, ours, True) for row in others],
    }


def summary(errors: Sequence[float]) -> dict[str, float]:
    sizes = [abs(error) for error in errors]
    return {"rows": len(sizes), "median": statistics.median(sizes), "largest": max(sizes)}


def as_text(found: dict[str, Any], every_row: bool = True) -> str:
    """The table of the check, held-out rows first to last, and its errors."""
    lines = []
    if every_row:
        lines.append(
            "published and planned in tokens/s/GPU; the error is of the time of a step, above 0: planned too slow"
        )
        lines.append(f"{'held out':9} {'model':14} {'GPUs':>13} {'sample':>6} {'micro':>5} {'ckpt':>4} "
                     f"{'published':>9} {'planned':>9} {'error':>7}")  # fmt: skip
        for row in [r for r in found["rows"] if r["held_out"]] + found["other_rows"]:
            lines.append(f"{'never fit' if row['source'] != 'llm-foundry' else 'yes':9} {row['model']:14} "
                         f"{row['gpus']:>3}x{row['gpu']:9} {row['sequence_length']:>6} {row['micro_batch']:>5} "
                         f"{'yes' if row['checkpointing'] else '':>4} {row['tokens_per_second']:>9,.0f} "
                         f"{row['predicted']:>9,.0f} {row['error']:>+7.1%}  "
                         f"{row['source'] if row['source'] != 'llm-foundry' else ''}")  # fmt: skip
    named = [("fitted rows", found["fitted"]), ("held-out rows", found["held_out"])]
    named += [(f"held out in rotation {i}", fold) for i, fold in enumerate(found["folds"])]
    named.append(("other stacks, never fitted", found["others"]))
    lines += [f"{name:27} {s['rows']:>3} rows: median error {s['median']:6.1%}, largest {s['largest']:6.1%}"
              for name, s in named]  # fmt: skip
    return "\n".join(lines)


def _seconds(row: Row) -> float:
    """Published seconds of one optimizer step."""
    tokens = row.setting.micro_batch * row.setting.micro_batches * row.work.sequence_length
    return tokens / row.tokens_per_second


def _row(values: list[Any], tree: dict[str, Any], source: str = "llm-foundry", caveat: str = "") -> Row:
    model, gpu, gpus, length, micro, accumulation, stage, checkpointing, published = values
    nodes, per_node = (gpus // 8, 8) if gpus > 8 else (1, gpus)
    link = f"{tree['node_link_gbit'][gpu]}Gb/s" if nodes > 1 else None
    cluster = parse_cluster(f"{nodes}x{per_node}x{gpu}", link)
    described = tree["models"][model]
    work = work_of_model(Model(type=described["type"], config=described["config"]), length)
    setting = Setting(stage, micro, accumulation, checkpointing)
    return Row(model, work, setting, cluster, float(published), source, caveat)


def _as_dict(row: Row, coefficients: dict[str, float], out: bool) -> dict[str, Any]:
    return {
        "model": row.model, "gpu": row.cluster.gpu.name, "gpus": row.cluster.ranks, "source": row.source,
        "sequence_length": row.work.sequence_length, "micro_batch": row.setting.micro_batch,
        "checkpointing": row.setting.checkpointing, "held_out": out, "caveat": row.caveat,
        "tokens_per_second": row.tokens_per_second, "predicted": row.predicted(coefficients),
        "error": row.error(coefficients),
    }  # fmt: skip
