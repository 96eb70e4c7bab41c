"""A checkpoint exists only when it is whole: write aside, hash, sync, manifest last, rename.

1. All ranks write their files into `checkpoints/.step-N.tmp/` (`write`).
2. Every file is hashed and synced; the work is shared between the ranks.
3. Rank 0 writes `manifest.json` (size and SHA-256 of every file, and what the run needs to go on), syncs it,
   and renames the folder to `step-N`. Before the rename there is no checkpoint, after it there is a whole one.
4. `newest_whole` scans the folder, newest first, and verifies; no pointer file is trusted.

Knows nothing of what the files hold: DeepSpeed's part is passed in as a function.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import SteelError

MANIFEST = "manifest.json"
ENGINE = "engine"  # the folder inside a checkpoint that holds DeepSpeed's own files
_NAME = re.compile(r"^step-(\d{8,})$")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest has been read (not yet verified)."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def write(folder: Path, step: int, write_files: Callable[[Path], None], facts: dict[str, Any]) -> Path:
    """Publish a checkpoint; a collective call.

    Args:
        folder: the run's `checkpoints/`, on a file system that all ranks share.
        write_files: called on every rank with the folder to fill.
        facts: plain values for the manifest, the same on every rank.

    Returns: the published folder. Raises SteelError on every rank when one could not write; nothing is published then.
    """
    final, aside = folder / name_of(step), folder / f".{name_of(step)}.tmp"
    dist.together(lambda: _fresh_folder(aside), only=dist.is_main())
    dist.together(lambda: _explain_disk(lambda: write_files(aside), aside))
    names = sorted(str(p.relative_to(aside)) for p in aside.rglob("*") if p.is_file())
    mine = dist.together(lambda: _explain_disk(lambda: _hashes(aside, names[dist.rank() :: dist.world_size()]), aside))
    files = {name: entry for part in dist.gather(mine or {}) for name, entry in part.items()}
    manifest = sealed({"format_version": 1, "step": step, **facts, "files": dict(sorted(files.items()))})
    dist.together(lambda: _explain_disk(lambda: _publish(aside, final, manifest), aside), only=dist.is_main())
    return final


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[SteelError]]:
    """The newest checkpoint that verifies, and why each newer one was passed over."""
    passed_over: list[SteelError] = []
    for path in reversed(published(folder)):
        try:
            return verify(path), passed_over
        except SteelError as error:
            passed_over.append(error)
    return None, passed_over


def published(folder: Path) -> list[Path]:
    """Checkpoint folders under their final names, oldest first (a crash leaves only names that begin with a dot)."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.match(p.name) and p.is_dir()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> Checkpoint:
    """Open a checkpoint without hashing its files. Raises SteelError when it has no readable manifest."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format_version"] != 1:
            raise SteelError(f"the checkpoint's format is {manifest['format_version']}, this version reads 1", file,
                             "use the version of megatron_steel that wrote it")  # fmt: skip
        if sealed(manifest) != manifest:
            raise SteelError("the checkpoint's manifest has been changed", file, "use another checkpoint")
    except FileNotFoundError:
        raise SteelError("the checkpoint has no manifest: it was never whole", path, "use another checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteelError(
            f"the checkpoint's manifest cannot be read: {error!r}", file, "use another checkpoint"
        ) from None
    return Checkpoint(path, manifest)


def verify(path: Path) -> Checkpoint:
    """Compare every file with its size and SHA-256. Raises SteelError naming the first file that differs."""
    checkpoint = read_manifest(path)
    for name, entry in checkpoint.manifest["files"].items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise SteelError(
                f"the manifest names a file outside the checkpoint: {name}", path, "do not use this checkpoint"
            )
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size"]:
            found = "missing" if size is None else f"{size} bytes"
            raise SteelError(f"the checkpoint is damaged: {name} is {found}, the manifest says {entry['size']} bytes",
                             path, "use another checkpoint")  # fmt: skip
        if _sha256(file) != entry["sha256"]:
            raise SteelError(
                f"the checkpoint is damaged: the content of {name} has changed", path, "use another checkpoint"
            )
    return checkpoint


def prune(folder: Path, keep_last: int, newest: int) -> list[Path]:
    """Delete all but the last `keep_last` (at least two) checkpoints up to step `newest`, and leftovers of crashes.

    Rank 0 only. `newest` is the step just written: folders of later steps are damaged ones that were passed over and
    must not count as kept. A folder is renamed out of sight first, so that a kill in mid-delete leaves no half.
    """
    doomed = [path for path in published(folder) if _step_of(path) <= newest][: -max(2, keep_last)]
    for path in doomed:
        hidden = path.with_name(f".{path.name}.deleted")
        os.replace(path, hidden)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return doomed


def discard_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps than `step`, newest first: the run has gone back behind them. Rank 0 only."""
    for path in reversed(published(folder)):
        if _step_of(path) > step:
            hidden = path.with_name(f".{path.name}.deleted")
            os.replace(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the SHA-256 of all its other entries, so that an edited one is found."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=True)
    return json.loads(text) | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def _fresh_folder(path: Path) -> None:
    for leftover in path.parent.glob(".step-*"):  # a killed save's, which may be what fills the disk
        shutil.rmtree(leftover, ignore_errors=True)
    _explain_disk(lambda: path.mkdir(parents=True), path)


def _hashes(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    entries = {}
    for name in names:
        file = folder / name
        sync(file)
        entries[name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    return entries


def _publish(aside: Path, final: Path, manifest: dict[str, Any]) -> None:
    file = aside / MANIFEST
    file.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    for path in [file, *(p for p in aside.rglob("*") if p.is_dir()), aside]:
        sync(path)
    if final.exists():  # a damaged one of the same step, passed over at start
        os.replace(final, final.with_name(f".{final.name}.replaced"))
    os.replace(aside, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _explain_disk(action: Callable[[], Any], where: Path) -> Any:
    try:
        return action()
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise SteelError(f"the checkpoint could not be written: {reason}", where,
                         "free space or mend the folder, then start again: older checkpoints are untouched") from error  # fmt: skip
