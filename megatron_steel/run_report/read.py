"""What a run folder says of its run, read from its files as they are: also while somebody trains, and after a crash.

A file that is missing or damaged is a gap in the report and no error. Imports no torch: a report takes a second.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel.checkpoint.commit import published, read_manifest
from megatron_steel.errors import SteelError
from megatron_steel.model.verdict import read_verdict
from megatron_steel.train.monitor import METRICS, SAMPLES, STARTS, read_metrics
from megatron_steel.train.report import HISTORY

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The run folder, read.

    Attributes:
        training: lines of the logging steps, in order.
        validation: lines of the evaluations.
        roll_backs: lines that say where the run went back from a spike.
        samples: texts from the prompts, in order.
        starts: lines of `starts.jsonl`: training began, or ended by itself.
        launches: lines of the supervisor: one for each start that has ended.
        holder: "pid host" of who has the folder's lock, or had it last.
        damaged: why a checkpoint cannot be read.
    """

    folder: Path
    training: list[Row]
    validation: list[Row]
    roll_backs: list[Row]
    samples: list[Row]
    starts: list[Row]
    launches: list[Row]
    holder: str
    audit: Row | None
    checkpoints: list[Row]
    damaged: list[str]
    environment: Row
    recipe_text: str
    recipe: Row


def read(folder: Path) -> RunFiles:
    """Raises SteelError where nobody has trained."""
    if not (folder / "recipe.yaml").is_file() and not (folder / METRICS).is_file():
        what = "this is no run folder: it holds neither recipe.yaml nor metrics.jsonl"
        raise SteelError(what, folder, "name a folder that a training has made, as in runs/zh-1b")
    rows = read_metrics(folder / METRICS)
    checkpoints, damaged = _checkpoints(folder)
    text = _text(folder / "recipe.yaml")
    return RunFiles(
        folder=folder,
        training=[r for r in rows if "loss" in r and _numbers(r, "step", "tokens")],
        validation=[r for r in rows if _numbers(r, "step", "tokens", "validation_loss")],
        roll_backs=[r for r in rows if _numbers(r, "step", "spike_at_step")],
        samples=[r for r in read_metrics(folder / SAMPLES) if "prompt" in r and "text" in r and _numbers(r, "step")],
        starts=[r for r in _lines(folder / STARTS) if _numbers(r, "time", "from_step")],
        launches=[r for r in _lines(folder / HISTORY) if _numbers(r, "began", "ended")],
        holder=_text(folder / "run.lock").strip(),
        audit=read_verdict(folder),
        checkpoints=checkpoints,
        damaged=damaged,
        environment=_json(_text(folder / "environment.json")),
        recipe_text=text,
        recipe=_yaml(text),
    )


def _checkpoints(folder: Path) -> tuple[list[Row], list[str]]:
    """Manifests, oldest first; sizes are what they say, no file is looked at."""
    found, damaged = [], []
    for path in published(folder / "checkpoints"):
        try:
            checkpoint = read_manifest(path)
            found.append({**checkpoint.manifest, "name": path.name, "bytes": checkpoint.bytes})
        except SteelError as error:
            damaged.append(f"{path.name}: {error.what}")
        except OSError:  # deleted at this moment by the run, which has a newer one
            continue
    return found, damaged


def _numbers(row: Row, *keys: str) -> bool:
    return all(isinstance(row.get(key), int | float) for key in keys)


def _lines(file: Path) -> list[Row]:
    rows = [_json(line) for line in _text(file).split("\n")]
    return [row for row in rows if row]


def _json(text: str) -> Row:
    with contextlib.suppress(ValueError):
        tree = json.loads(text)
        return tree if isinstance(tree, dict) else {}
    return {}


def _yaml(text: str) -> Row:
    import yaml

    with contextlib.suppress(yaml.YAMLError):
        tree = yaml.safe_load(text)
        return tree if isinstance(tree, dict) else {}
    return {}


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")
    return ""
