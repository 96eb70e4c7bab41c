"""Numbers go out: TensorBoard, `metrics.jsonl`, a console line, and `loss.png` at the end.

Works on rank 0 alone and takes a flat dict once per logging step. Knows nothing of engines or models. On resume
`metrics.jsonl` is cut back to the checkpoint's step, so that no step stands in it twice.
"""

import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_steel import dist

METRICS = "metrics.jsonl"


class Monitor:
    """Open the outputs of a run folder.

    Args:
        folder: the run folder (it exists).
        from_step: the step the run continues from; later lines are cut off.
        sees_future: the model's loss is no language-model loss; its TensorBoard tags say so.
    """

    def __init__(self, folder: Path, from_step: int, sees_future: bool = False):
        self.folder = folder
        self._mark = " (sees future)" if sees_future else ""
        self._lines = None
        if dist.is_main():
            self._open(from_step)

    def _open(self, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        cut_back(self.folder / METRICS, from_step)
        self._lines = (self.folder / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=from_step + 1)

    def go_back(self, step: int) -> None:
        """Cut everything off that comes after `step`."""
        if self._lines:
            self._lines.close()
            self._board.close()
            self._open(step)

    def text(self, tag: str, text: str) -> None:
        """A text of the run (the resolved recipe) to TensorBoard."""
        if self._lines:
            self._board.add_text(tag, f"```\n{text}\n```")

    def scalars(self, step: int, values: dict[str, float], by_layer: dict[str, float] | None = None) -> None:
        """One line to `metrics.jsonl`, each value under its own tag to TensorBoard; `by_layer` goes there alone."""
        if not self._lines:
            return
        finite = {k: (v if math.isfinite(v) else None) for k, v in values.items()}  # JSON has no NaN
        try:
            self._lines.write(json.dumps({"step": step, **finite}) + "\n")
            self._lines.flush()
            for tag, value in {**values, **(by_layer or {})}.items():
                self._board.add_scalar(tag + (self._mark if tag.endswith("loss") else ""), value, step)
        except OSError as error:  # the next save will say so louder; numbers alone do not end a run
            dist.log.warning("%s: step %d is not in the metrics: %s", self.folder, step, error)

    def close(self) -> None:
        """Flush everything and draw `loss.png`. A full disk is a warning here: it must not hide how the run ended."""
        if not self._lines:
            return
        lines, self._lines = self._lines, None
        try:
            with lines:
                os.fsync(lines.fileno())
            self._board.close()
            draw_losses(self.folder)
        except OSError as error:
            dist.log.warning("%s: the last metrics or the picture could not be written: %s", self.folder, error)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; a torn last line is left out."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError):
            continue
        rows.append(row)
    return rows


def cut_back(file: Path, step: int) -> None:
    """Drop lines after `step` and torn lines, by writing aside and renaming."""
    if not file.is_file():
        return
    aside = file.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in read_metrics(file) if row["step"] <= step)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, file)


def progress_line(step: int, steps: int, row: dict[str, float], seconds_left: float) -> str:
    """What the console shows at a logging step."""
    left = datetime.timedelta(seconds=round(seconds_left))
    share = f" | {row['share_of_peak']:.1%} of peak" if "share_of_peak" in row else ""
    return (f"step {step:>6}/{steps} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.2f} | "
            f"{row['tokens_per_second']:,.0f} tokens/s{share} | {left} left")  # fmt: skip


def draw_losses(folder: Path) -> Path | None:
    """`loss.png` of a run folder: training and validation loss over tokens. None when nothing was logged."""
    rows = read_metrics(folder / METRICS)
    train = [(r["tokens"], r["loss"]) for r in rows if r.get("loss") is not None]
    held_out = [(r["tokens"], r["validation_loss"]) for r in rows if r.get("validation_loss") is not None]
    if not train:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="tokens", ylabel="loss (nats per token)", title=folder.name)
    axes.plot(*zip(*train, strict=True), label="training", linewidth=1)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="validation", markersize=4)
    axes.grid(alpha=0.3)
    axes.legend()
    target = folder / "loss.png"
    aside = folder / ".loss.png.tmp"
    figure.savefig(aside, format="png", dpi=120)
    os.replace(aside, target)
    return target
