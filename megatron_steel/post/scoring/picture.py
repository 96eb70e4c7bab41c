"""A bar chart: our scores in full colour, published ones hatched and grey, with source and protocol of each named below.

Must not know how a score is made.
"""

import os
from pathlib import Path
from typing import Any

from megatron_steel.errors import SteelError
from megatron_steel.post.scoring.benchmarks import BENCHMARKS
from megatron_steel.post.scoring.compare import figures
from megatron_steel.post.scoring.published import PUBLISHED
from megatron_steel.post.scoring.scores import about_of, protocols

_CHANCE = 25.0  # four choices


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Write the picture (PNG): one panel a benchmark that was scored; there is at least one. Raises SteelError where it cannot be written."""
    tasks = [task for task in BENCHMARKS if any(task in result for result in results)]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {task: bars(results, task) for task in tasks}
    sources = list(dict.fromkeys(bar["source"] for rows in groups.values() for bar in rows))
    longest = max(map(len, groups.values()))
    figure = Figure(figsize=(4.2 * len(tasks) + 2.5, 0.32 * longest + 1.3 + 0.22 * len(sources)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, (task, rows) in zip(axes, groups.items(), strict=True):
        _panel(axis, task, rows, sources)
    notes = "\n".join(f"[{number}] {source}" for number, source in enumerate(sources, start=1))
    figure.supxlabel(f"accuracy, percent; dotted: chance\n{notes}", fontsize=8, x=0.01, ha="left")
    aside = file.with_name(f".{file.name}.tmp")
    try:
        figure.savefig(aside, format="png", dpi=150)
        os.replace(aside, file)
    except OSError as error:
        raise SteelError(f"the picture could not be written: {error.strerror}", file, "name another file") from error
    finally:
        aside.unlink(missing_ok=True)


def bars(results: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """One bar a score: {"label", "percent", "ours", "source"}; ours first, then the published ones."""
    found = []
    for result in results:
        about = about_of(result)
        for name, value in figures(result).items():
            of, protocol = name.split(" ")
            if of == task:
                score = next(one for one in protocols(result[task]) if one["protocol"]["name"] == protocol)
                future = ", SEES THE FUTURE" if about["loss_sees_future"] else ""
                absent = f", {len(score['absent'])} subjects left out" if score["absent"] else ""
                cut = f", {score['truncated']} prompts cut off" if score.get("truncated") else ""
                source = f"this project: {protocol}, {score['few_shot']}-shot{cut}{absent}{future}"
                found.append({"label": about["model"], "percent": 100 * value, "ours": True, "source": source})
    for row in PUBLISHED:
        if task in row.scores:
            found.append(
                {"label": row.model, "percent": row.scores[task], "ours": False, "source": f"published: {row.source}"}
            )
    return found


def _panel(axis: Any, task: str, rows: list[dict[str, Any]], sources: list[str]) -> None:
    labels = [f"{row['label']} [{sources.index(row['source']) + 1}]" for row in rows]
    places = range(len(rows))
    drawn = axis.barh(
        places, [row["percent"] for row in rows],
        color=["tab:blue" if row["ours"] else "lightgrey" for row in rows],
        hatch=["" if row["ours"] else "///" for row in rows], edgecolor="grey",
    )  # fmt: skip
    axis.bar_label(drawn, fmt="%.1f", fontsize=7, padding=2)
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(_CHANCE, color="black", linestyle=":", linewidth=1)
    axis.set_xlim(0, max(70.0, *(row["percent"] + 8 for row in rows)))
    axis.set_title(f"{task}\n(hatched: published, of another protocol)", fontsize=9)
