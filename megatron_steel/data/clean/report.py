"""What survived a chain: the arithmetic of its counts, as JSON, a table and a picture.

Every row is accounted for: kept + dropped = in, for each operator, each source and in all, or no report is made.
Knows nothing of files or of data-juicer.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

_LOAD = "load"  # data-juicer drops rows without text while it reads


def build(steps: Sequence[Mapping[str, Any]], rows_in: Mapping[str, int], rows_out: int) -> dict[str, Any]:
    """Counts per step to a report.

    Args:
        steps: for each operator in order `operator`, `seconds`, `by_source` (rows left) and for a mapper `changed`.
        rows_in: rows given, by source.
        rows_out: rows found in what was exported.

    Raises:
        RuntimeError: rows that appear, or are missing in the export.
    """
    before = dict(rows_in)
    operators = []
    for step in steps:
        left = {source: step["by_source"].get(source, 0) for source in rows_in}
        if set(step["by_source"]) - set(rows_in) or any(left[source] > before[source] for source in left):
            raise RuntimeError(f"{step['operator']} left more rows than it was given")
        entry = {"operator": step["operator"], "in": sum(before.values()), "kept": sum(left.values())}
        entry["dropped"] = entry["in"] - entry["kept"]
        entry["dropped_by_source"] = {s: before[s] - left[s] for s in left if before[s] != left[s]}
        if "changed" in step:
            entry["rows_changed"], entry["characters_added"] = step["changed"]["rows"], step["changed"]["characters"]
        entry["seconds"] = step["seconds"]
        if step["operator"] != _LOAD or entry["dropped"]:
            operators.append(entry)
        before = left
    kept = sum(before.values())
    if kept != rows_out:
        raise RuntimeError(f"data-juicer counted {kept} rows and exported {rows_out}")
    given = sum(rows_in.values())
    if given != kept + sum(entry["dropped"] for entry in operators):
        raise RuntimeError(f"{given} rows came in, {kept} are left, and the operators do not account for the rest")
    sources = {source: {"in": count, "kept": before[source]} for source, count in rows_in.items()}
    return {"rows_in": given, "kept": kept, "dropped": given - kept, "sources": sources, "operators": operators}


def table(report: Mapping[str, Any]) -> str:
    """The report as markdown: operators down, sources across, each cell the rows dropped there."""
    sources = list(report["sources"])
    lines = [
        f"| operator | in | dropped | {' | '.join(sources)} | rows changed |",
        f"|---|---|---|{'---|' * len(sources)}---|",
    ]
    for entry in report["operators"]:
        cells = [str(entry["dropped_by_source"].get(source, "")) for source in sources]
        changed = entry.get("rows_changed", "")
        lines.append(f"| {entry['operator']} | {entry['in']} | {entry['dropped']} | {' | '.join(cells)} | {changed} |")
    kept = [f"{counts['kept']} of {counts['in']}" for counts in report["sources"].values()]
    lines.append(f"| **kept** | {report['rows_in']} | {report['kept']} left | {' | '.join(kept)} | |")
    lines += ["", *(f"Left out: {left['operator']} ({left['reason']})." for left in report.get("left_out", []))]
    return "\n".join(lines).rstrip() + "\n"


def draw(reports: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """One bar a source and report: the share kept, and the share that each dropping operator took. Writes a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    dropping = list(dict.fromkeys(e["operator"] for r in reports.values() for e in r["operators"] if e["dropped"]))
    colours = {name: colormaps["tab20"](2 * (i % 10) + i // 10 % 2) for i, name in enumerate(dropping)}
    bars = [(f"{source}, {name}" if len(reports) > 1 else source, report, source)
            for source in dict.fromkeys(s for r in reports.values() for s in r["sources"])
            for name, report in reports.items() if source in report["sources"]]  # fmt: skip
    figure = Figure(figsize=(11, 1.6 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for height, (_, report, source) in enumerate(bars):
        counts = report["sources"][source]
        axes.barh(height, counts["kept"] / counts["in"], color="0.8")
        axes.text(0.005, height, f"{counts['kept']} of {counts['in']}", va="center", fontsize=8)
        left = counts["kept"] / counts["in"]
        for entry in reversed(report["operators"]):
            share = entry["dropped_by_source"].get(source, 0) / counts["in"]
            axes.barh(height, share, left=left, color=colours.get(entry["operator"]))
            left += share
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of rows: kept (grey), and dropped by")
    for name in dropping:
        axes.barh(0, 0, color=colours[name], label=name)
    if dropping:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
