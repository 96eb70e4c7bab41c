"""Which curves of a run are worth a look: its lines to `plots.curves`."""

from bisect import bisect_left

from megatron_steel.run_report.account import Start
from megatron_steel.run_report.kinds import Row
from megatron_steel.run_report.plots import Line, curves
from megatron_steel.run_report.read import RunFiles

MOST_RESTARTS = 100  # lines of a figure: more stand side by side


def restarts_of(run: RunFiles, starts: list[Start]) -> list[float]:
    """Tokens at which the run went on after its first start: those of the first line from there on. Each place once."""
    rows = sorted([*run.checkpoints, *run.training], key=lambda row: row["step"])
    steps = [row["step"] for row in rows]
    places = {bisect_left(steps, start.from_step) for start in starts if start.from_step}
    return sorted({float(rows[place]["tokens"]) for place in places if place < len(rows)})


def figures_of(run: RunFiles, restarts: list[float], sees_future: bool) -> list[tuple[str, str]]:
    """(title, svg) of each figure that has something to show; of many restarts it shows some, evenly chosen."""
    rows, marks = run.training, restarts[:: -(-len(restarts) // MOST_RESTARTS) or 1]
    loss = "loss (sees the future)" if sees_future else "loss"
    by_set = _under(run.validation, "validation_loss/")
    parts = [k for k in _keys(rows) if k.startswith("seconds_") and k != "seconds_step"]
    drawn = [
        (loss, "nats per token", [_line(rows, "loss", "training"), _dots(run.validation, "validation_loss", "validation")]),
        ("validation loss by data set", "nats per token", [_dots(run.validation, k, name) for k, name in by_set.items()]),
        ("learning rate", "", [_line(rows, "lr")]),
        ("gradient norm", "before clipping", [_line(rows, "grad_norm")]),
        ("tokens per second", "", [_line(rows, "tokens_per_second")]),
        ("share of peak", "", [_line(rows, "share_of_peak")]),
        ("seconds of a step", "", [_line(rows, "seconds_step", "whole"), *(_line(rows, k, k[8:]) for k in parts)]),
        ("memory", "GiB, at most on rank 0", [_line(rows, "memory_gib")]),
        ("FFN output over the stream", "RMS", [_line(rows, f"ffn_share_{m}", f"{m} of layers") for m in ("min", "max")]),
        ("gradient of the experts", "RMS",
         [_line(rows, f"expert_gradient_{m}", f"{m} of layers") for m in ("min", "max")]),
        ("epochs of each data set", "", [_line(rows, k, name) for k, name in _under(rows, "epochs_").items()]),
    ]  # fmt: skip
    log = ("gradient norm", "seconds of a step", "gradient of the experts")
    made = [(title, curves(title, unit, lines, title in log, marks)) for title, unit, lines in drawn]
    shares = [_line(rows, key, name) for key, name in _under(rows, "data_share/").items()]
    if len(shares) > 1:
        whole = [Line(s.label, s.x, [y or 0.0 for y in s.y]) for s in shares]
        made.append(("data shares", curves("data shares", "of the samples drawn", whole, marks=marks, stacked=True)))
    return [(title, svg) for title, svg in made if svg]


def _line(rows: list[Row], key: str, label: str = "") -> Line:
    return Line(label or key, [r["tokens"] for r in rows], [r.get(key) for r in rows])


def _dots(rows: list[Row], key: str, label: str) -> Line:
    found = [r for r in rows if key in r]
    return Line(label, [r["tokens"] for r in found], [r[key] for r in found], dots=len(found) < 40)


def _under(rows: list[Row], prefix: str) -> dict[str, str]:
    """Each key with this prefix, and what follows it."""
    return {key: key.removeprefix(prefix) for key in _keys(rows) if key.startswith(prefix)}


def _keys(rows: list[Row]) -> list[str]:
    """In the order in which they came up."""
    return list(dict.fromkeys(key for row in rows for key in row))
