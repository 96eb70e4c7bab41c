"""Numbers go out: TensorBoard, `metrics.jsonl`, `samples.jsonl`, a console line, and `loss.png` at the end.

Works on rank 0 alone and takes a flat dict once per logging step. Knows nothing of engines or models. On resume
both files are cut back to the checkpoint's step, so that no step stands in them twice. `starts.jsonl` is only added to:
a line when training begins and one when it ends by itself, so that `report` can tell what time went where.
"""

import datetime
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from megatron_steel import dist

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
STARTS = "starts.jsonl"

# TensorBoard's "Custom Scalars" page: group -> chart -> regular expressions that the tags of its lines begin with.
LAYOUT = {
    "learning": {
        "loss": ["loss( |$)", "validation_loss( |$)"],
        "validation loss by data set": ["validation_loss/"],
        "learning rate": ["lr$"],
        "gradient norm": ["grad_norm$"],
    },
    "speed": {
        "tokens per second": ["tokens_per_second$"],
        "share of peak": ["share_of_peak$"],
        "seconds of a step": ["seconds_"],
        "memory (GiB)": ["memory_gib$"],
    },
    "health": {
        "skipped steps": ["skipped_steps$"],
        "loss scale (fp16)": ["loss_scale$"],
        "spikes gone back from": ["spike_at_step$"],
        "FFN output over the stream": ["ffn_share_"],
        "gradient of the experts": ["expert_gradient_"],
        "FFN output, by layer": ["ffn_share/"],
        "gradient, by layer": ["expert_gradient/"],
    },
    "data": {
        "shares": ["data_share/"],
        "epochs": ["epochs_"],
        "samples": ["samples$"],
        "tokens": ["tokens$"],
    },
}


class Monitor:
    """Open the outputs of a run folder.

    Args:
        folder: the run folder (it exists).
        from_step: the step the run continues from; later lines are cut off.
        sees_future: the model's loss is no language-model loss; its TensorBoard tags say so.
        steps: of the whole run, for `starts.jsonl`.
    """

    def __init__(self, folder: Path, from_step: int, sees_future: bool = False, steps: int | None = None):
        self.folder = folder
        self._mark = " (sees future)" if sees_future else ""
        self._lines = None
        self._start = {"from_step": from_step, "steps": steps, "ranks": dist.world_size()}
        if dist.is_main():
            self._note("start")
            self._open(from_step)

    def _open(self, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for file in (METRICS, SAMPLES):
            cut_back(self.folder / file, from_step)
        self._lines = (self.folder / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=from_step + 1)
        self._board.add_custom_scalars(
            {group: {chart: ["Multiline", tags] for chart, tags in charts.items()} for group, charts in LAYOUT.items()}
        )

    def _note(self, event: str) -> None:
        line = {"event": event, "time": _now(), **self._start}
        try:
            with (self.folder / STARTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            dist.log.warning("%s: the %s is not noted: %s", self.folder, event, error)

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
            self._lines.write(json.dumps({"step": step, "time": _now(), **finite}) + "\n")
            self._lines.flush()
            for tag, value in {**values, **(by_layer or {})}.items():
                is_loss = tag.partition("/")[0].endswith("loss")
                self._board.add_scalar(tag + (self._mark if is_loss else ""), value, step)
        except OSError as error:  # the next save will say so louder; numbers alone do not end a run
            dist.log.warning("%s: step %d is not in the metrics: %s", self.folder, step, error)

    def samples(self, step: int, tokens: int, prompts: list[str], texts: list[str]) -> None:
        """What the model has written after each prompt, to `samples.jsonl` and TensorBoard's texts."""
        if not self._lines:
            return
        try:
            with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
                for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
                    row = {"step": step, "time": _now(), "tokens": tokens, "prompt": prompt, "text": text}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    self._board.add_text(f"samples/{number}", _indented(f"{prompt}|{text}"), step)
        except OSError as error:
            dist.log.warning("%s: the texts of step %d are not written: %s", self.folder, step, error)

    def close(self) -> None:
        """Flush everything and draw `loss.png`. A full disk is a warning here: it must not hide how the run ended."""
        if not self._lines:
            return
        lines, self._lines = self._lines, None
        try:
            with lines:
                os.fsync(lines.fileno())
            self._board.close()
            self._note("end")
            draw_losses(self.folder)
        except OSError as error:
            dist.log.warning("%s: the last metrics or the picture could not be written: %s", self.folder, error)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl` or `samples.jsonl`; a torn last line is left out."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):  # a text may hold other line ends
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
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in read_metrics(file) if row["step"] <= step)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, file)


def _now() -> float:
    return round(time.time(), 1)


def _indented(text: str) -> str:
    """As a Markdown block of code, whatever stands in it."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


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
