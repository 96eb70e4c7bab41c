"""What the quickstart made: losses, speed, where everything lies, and what to try next.

python tools/quickstart_summary.py runs/quickstart
"""

import statistics
import sys
from pathlib import Path

from megatron_steel.checkpoint.commit import published
from megatron_steel.train.monitor import METRICS, read_metrics


def export_dir(run: Path) -> Path:
    return run / "exports" / published(run / "checkpoints")[-1].name


def summary(run: Path) -> str:
    rows = read_metrics(run / METRICS)
    trained = [r for r in rows if "loss" in r]
    held_out = [r["validation_loss"] for r in rows if "validation_loss" in r]
    return f"""training loss     {trained[0]["loss"]:.3f} -> {trained[-1]["loss"]:.3f} (step {trained[-1]["step"]})
validation loss   {held_out[0]:.3f} -> {held_out[-1]:.3f}
speed             {statistics.median(r["tokens_per_second"] for r in trained):,.0f} tokens/s (median)
loss picture      {run / "loss.png"}
TensorBoard       {run / "tensorboard"}
export            {export_dir(run)}

next:
  .venv/bin/tensorboard --logdir {run / "tensorboard"}
  .venv/bin/megatron-steel generate {export_dir(run)} --prompt "太阳"
  .venv/bin/megatron-steel recipes show zh-1b"""


if __name__ == "__main__":
    if sys.argv[1] == "--export-dir":
        print(export_dir(Path(sys.argv[2])))
    else:
        print(summary(Path(sys.argv[1])))
