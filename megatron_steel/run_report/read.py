"""What a run folder says of its run, read from its files as they are: also while somebody trains, and after a crash.

A file that is missing or damaged is a gap in the report and no error: every value is looked at here, once, and later steps
trust it (`kinds`). Imports no torch: a report takes a second.
"""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel.checkpoint.commit import published, read_manifest
from megatron_steel.errors import SteelError
from megatron_steel.model.verdict import AUDIT
from megatron_steel.run_report import kinds
from megatron_steel.run_report.kinds import Kinds, Row
from megatron_steel.train.monitor import METRICS, SAMPLES, STARTS
from megatron_steel.train.report import HISTORY

_TORN = object()  # no JSON


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
        damaged: what cannot be read, or only in part, and why.
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


def read(folder: Path) -> RunFiles:
    """Raises SteelError where nobody has trained."""
    if not (folder / "recipe.yaml").is_file() and not (folder / METRICS).is_file():
        what = "this is no run folder: it holds neither recipe.yaml nor metrics.jsonl"
        raise SteelError(what, folder, "name a folder that a training has made, as in runs/zh-1b")
    checkpoints, damaged = _checkpoints(folder)
    rows = _rows(folder / METRICS, kinds.METRICS, damaged)
    return RunFiles(
        folder=folder,
        training=[r for r in rows if "loss" in r],
        validation=[r for r in rows if "validation_loss" in r],
        roll_backs=[r for r in rows if {"spike_at_step", "skipped_from_sample", "skipped_to_sample"} <= r.keys()],
        samples=_rows(folder / SAMPLES, kinds.SAMPLES, damaged),
        starts=_rows(folder / STARTS, kinds.STARTS, damaged),
        launches=_rows(folder / HISTORY, kinds.LAUNCHES, damaged),
        holder=_holder(_text(folder / "run.lock").strip()),
        audit=_object(folder / AUDIT, kinds.AUDIT, damaged),
        checkpoints=checkpoints,
        damaged=damaged,
        environment=_object(folder / "environment.json", kinds.ENVIRONMENT, damaged) or {},
        recipe_text=_text(folder / "recipe.yaml"),
    )


def _checkpoints(folder: Path) -> tuple[list[Row], list[str]]:
    """Manifests, oldest first; sizes are what they say, no file is looked at."""
    found, damaged = [], []
    for path in published(folder / "checkpoints"):
        try:
            manifest, wrong = kinds.MANIFEST.clean(_whole(read_manifest(path).manifest))
        except SteelError as error:
            damaged.append(f"{path.name}: {error.what}")
            continue
        except OSError:  # deleted at this moment by the run, which has a newer one
            continue
        if wrong:
            damaged.append(f"{path.name}: its manifest has values that no run writes")
        if manifest:
            found.append({**manifest, "name": path.name, "bytes": sum(f["size"] for f in manifest["files"].values())})
    return found, damaged


def _rows(file: Path, expected: Kinds, damaged: list[str]) -> list[Row]:
    """The rows of a file of lines; the last line may be half written and is nothing to tell of."""
    *lines, last = _text(file).split("\n")
    trees = [_json(line) for line in lines if line.strip()]
    if (tree := _json(last)) is not _TORN:
        trees.append(tree)
    cleaned = [expected.clean(tree) for tree in trees]
    if wrong := sum(is_wrong for _, is_wrong in cleaned):
        damaged.append(
            f"{file.name}: {wrong:,} of {len(cleaned):,} lines are damaged; what is wrong in them is left out"
        )
    return [row for row, _ in cleaned if row is not None]


def _object(file: Path, expected: Kinds, damaged: list[str]) -> Row | None:
    """The one row of a file; None: it is missing or of no use."""
    text = _text(file)
    row, wrong = expected.clean(_json(text)) if text else (None, False)
    if wrong:
        damaged.append(f"{file.name}: it is damaged; what is wrong in it is left out")
    return row


def _json(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        tree = json.loads(text)
        return _whole(tree) if "\\ud" in text.lower() else tree
    return _TORN


def _whole(tree: Any) -> Any:
    """With `?` for each half of a character: no page can hold it."""
    return json.loads(json.dumps(tree, ensure_ascii=False).encode(errors="replace"))


def _holder(text: str) -> str:
    return text if re.fullmatch(r"\d{1,9} \S+", text, re.ASCII) else ""


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")
    return ""
