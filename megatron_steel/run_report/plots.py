"""Curves as SVG to stand inside a page. Knows nothing of runs.

Drawn by matplotlib with its text left as text, at the width of a phone, so that a narrow page does not shrink it.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

MOST_POINTS = 1200  # of a line: more than the pixels that show it
COLORS = ("#2563eb", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#0b7285", "#966600", "#495057")


@dataclass(frozen=True)
class Line:
    """One curve; a y of None or NaN is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    dots: bool = False


def curves(
    title: str,
    y_label: str,
    lines: Iterable[Line],
    log: bool = False,
    marks: Sequence[float] = (),
    stacked: bool = False,
) -> str:
    """An `<svg>` element; empty where no line has a point.

    Args:
        marks: places on the x axis (tokens) where the run started again: dotted lines.
        stacked: the lines are shares of one whole; they have the same x.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = [replace(line, label=line.label.replace("$", r"\$")) for line in lines if any(map(_is_number, line.y))]
    if not shown:
        return ""
    # Ids from a fixed salt: the same run gives the same page.
    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the font that is missing here
        figure = Figure(figsize=(5.0, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(xlabel="tokens", ylabel=y_label)
        if stacked:
            every = -(-len(shown[0].x) // MOST_POINTS)  # the same places of all, so that they still add up
            axes.stackplot(shown[0].x[::every], [line.y[::every] for line in shown],
                           labels=[line.label for line in shown], colors=COLORS, alpha=0.75)  # fmt: skip
            axes.set_ylim(0, 1)
        else:
            _draw(axes, shown)
        for mark in marks:
            axes.axvline(mark, color="#868e96", linewidth=0.8, linestyle=":")
        if log and any(y and y > 0 for line in shown for y in line.y):
            axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        if len(shown) > 3 or (stacked and len(shown) > 1):
            figure.legend(fontsize=8, frameon=False, ncols=4, loc="outside lower center")
        elif len(shown) > 1:
            axes.legend(fontsize=8, frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), title)


def _draw(axes: Any, lines: list[Line]) -> None:
    for color, line in zip(COLORS * len(lines), lines, strict=False):
        x, y = thinned(line.x, [float(v) if v is not None and _is_number(v) else math.nan for v in line.y])
        sparse = 2 * sum(map(math.isfinite, y)) < len(y)  # its points have no neighbours to be joined with
        style = "o" if sparse else "o-" if line.dots or len(x) < 3 else "-"
        axes.plot(x, y, style, label=line.label, color=color, linewidth=1.1, markersize=3)


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MOST_POINTS` of a curve: of each stretch the least and the most, so that no spike is lost."""
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    kept: set[int] = {0, len(x) - 1}
    stretch = -(-2 * len(x) // (MOST_POINTS - 2))
    for first in range(0, len(x), stretch):
        numbers = [i for i in range(first, min(first + stretch, len(x))) if not math.isnan(y[i])]
        kept |= {min(numbers, key=y.__getitem__), max(numbers, key=y.__getitem__)} if numbers else {first}
    return [x[i] for i in sorted(kept)], [y[i] for i in sorted(kept)]


def short(value: float) -> str:
    """1.5B for 1,500,000,000."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _inline(text: str, title: str) -> str:
    """The element alone, as wide as its place, without the ids that every figure has alike."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z]\w*_\d+"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", svg))
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
