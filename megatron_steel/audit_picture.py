"""An audit as a picture: who reads the future, what the FFNs add, whether they learn, and which loss is true.

Takes the report of `audit` and nothing else.
"""

from pathlib import Path
from typing import Any


def draw(report: dict[str, Any], file: Path) -> None:
    """Write a PNG of four panels; a value of 0 has no bar on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    _future(panels[0][0], report["layers"])
    _line(panels[0][1], "FFN output over layer output (RMS)", {"FFN": _column(report, "ffn_share")})
    gradients = {"FFN": _column(report, "ffn_gradient"), "attention": _column(report, "attention_gradient")}
    _line(panels[1][0], "gradient RMS of the weights", gradients)
    _losses(panels[1][1], report["loss"])
    figure.suptitle(
        f"{report['architecture']}: {report['verdict']}", color="black" if report["causal"] else "firebrick"
    )
    figure.savefig(file, format="png", dpi=110)


def _future(axes: Any, layers: list[dict[str, Any]]) -> None:
    for offset, weights in ((-0.2, "ordinary"), (0.2, "enlarged")):
        shares = [max((part[weights]["future_gradient"] for part in row["parts"] if part["part"] != "layer"), default=0.0)
                  for row in layers]  # fmt: skip
        axes.bar([i + offset for i in range(len(shares))], shares, 0.4, label=f"{weights} weights")
    axes.set(title="gradient by later inputs, over that by earlier ones", xlabel="layer", ylim=(0, None))
    axes.locator_params(axis="x", integer=True)
    axes.legend()


def _line(axes: Any, title: str, columns: dict[str, list[float | None]]) -> None:
    for label, values in columns.items():
        shown = [(i, v) for i, v in enumerate(values) if v]
        if shown:
            axes.plot(*zip(*shown, strict=True), "o-", label=label)
            axes.set_yscale("log")
    axes.set(title=title, xlabel="layer")
    axes.locator_params(axis="x", integer=True)
    axes.legend()


def _losses(axes: Any, loss: dict[str, Any]) -> None:
    bars = {"teacher-forced": loss["teacher_forced_at_positions"], "prefix-only": loss["prefix_only"]}
    axes.bar_label(axes.bar(list(bars), list(bars.values()), 0.5), fmt="%.4f")
    axes.axhline(loss["ln_vocabulary"], linestyle="--", color="gray", label="ln V")
    axes.set(title=f"loss on {Path(loss['data']).name} (nats per token)", ylim=(0, None))
    axes.legend()


def _column(report: dict[str, Any], name: str) -> list[float | None]:
    return [row[name] for row in report["layers"]]
