"""A checkpoint exists only when it is whole: write aside, hash, sync, manifest last, rename.

1. Room is made sure of, then all ranks write their files into `checkpoints/.step-N.tmp/` (`write`).
2. Each rank syncs and hashes what it wrote: no other machine can sync it, and here it still is in memory.
3. Rank 0 writes `manifest.json` (size and SHA-256 of every file, and what the run needs to go on), syncs it,
   and renames the folder to `step-N`. Before the rename there is no checkpoint, after it there is a whole one.
4. `hide_old` and `delete` remove old ones, only once the new one is whole.
5. `newest_whole` scans the folder, newest first, and verifies; no pointer file is trusted.

Knows nothing of what the files hold: DeepSpeed's part is passed in as a function.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import SteelError

MANIFEST = "manifest.json"
ENGINE = "engine"  # the folder inside a checkpoint that holds DeepSpeed's own files
_NAME = re.compile(r"^step-(\d{8,})$")
_CHUNK = 1 << 20
HASHERS = 4  # files that are verified at a time
_PAUSES = (1.0, 5.0)  # seconds before another try
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)  # same at the next try


class NotWritten(SteelError):  # noqa: N818  (it says what happened)
    """A checkpoint could not be written. Older ones are untouched, and a later save may succeed."""


class Stumbled(NotWritten):
    """As above, for a reason that may be gone in a moment (an I/O error, a network file system)."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest has been read (not yet verified)."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def bytes(self) -> int:
        return sum(entry["size"] for entry in self.manifest["files"].values())


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def write(
    folder: Path,
    step: int,
    write_files: Callable[[Path], Iterable[Path] | None],
    facts: dict[str, Any],
    expected_bytes: int = 0,
) -> Path:
    """Publish a checkpoint; a collective call. An I/O error is tried again twice.

    Args:
        folder: the run's `checkpoints/`, on a file system that all ranks share.
        write_files: called on every rank with the folder to fill; returns what this rank wrote (rank 0 takes care
            of files that nobody names).
        facts: plain values for the manifest, the same on every rank.
        expected_bytes: about how large a run's first checkpoint is; later ones are as large as the one before.

    Returns: the published folder. Raises NotWritten on every rank when one could not write; nothing is published then.
    """
    aside = folder / f".{name_of(step)}.tmp"
    for pause in (*_PAUSES, None):
        try:
            return _write_once(folder, step, write_files, facts, expected_bytes)
        except NotWritten as error:
            if dist.is_main():
                shutil.rmtree(aside, ignore_errors=True)  # what is left of it may be what fills the disk
            if pause is None or not isinstance(error, Stumbled):
                raise
            if dist.is_main():
                dist.log.warning("%s\n  trying again in %.0f s", error, pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _write_once(
    folder: Path,
    step: int,
    write_files: Callable[[Path], Iterable[Path] | None],
    facts: dict[str, Any],
    expected_bytes: int,
) -> Path:
    final, aside = folder / name_of(step), folder / f".{name_of(step)}.tmp"

    def together(action: Callable[[], Any], only: bool = True) -> Any:
        return dist.together(lambda: _explain_disk(action, aside), only)

    together(lambda: _fresh_folder(aside, expected_bytes), only=dist.is_main())
    claimed = dist.gather(together(lambda: sorted(write_files(aside) or ())))
    mine = claimed[dist.rank()]
    if dist.is_main():
        mine = sorted({*_files(aside)} - {path for part in claimed[1:] for path in part})
    hashed = dist.gather(together(lambda: _sync_and_hash(aside, mine)))
    files = {name: entry for part in hashed for name, entry in part.items()}
    manifest = sealed({"format_version": 1, "step": step, **facts, "files": dict(sorted(files.items()))})
    together(lambda: _publish(aside, final, manifest), only=dist.is_main())
    return final


def newest_whole(
    folder: Path, opened: Callable[[Path], Checkpoint] | None = None
) -> tuple[Checkpoint | None, list[SteelError]]:
    """The newest checkpoint that verifies, and why each newer one was passed over.

    Args:
        opened: opens one, or raises SteelError (default: `verify`, of all its bytes).
    """
    passed_over: list[SteelError] = []
    for path in reversed(published(folder)):
        try:
            return (opened or verify)(path), passed_over
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
    checkpoint = measured(path)
    require_hashes(checkpoint, checkpoint.manifest["files"])
    return checkpoint


def require_hashes(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Compare some of a checkpoint's files with their SHA-256. Raises SteelError naming the first that differs."""
    path, files = checkpoint.path, checkpoint.manifest["files"]
    with ThreadPoolExecutor(HASHERS) as pool:  # hashing lets other threads run
        hashed = {name: pool.submit(_sha256, path / name) for name in names}
        for name, found in hashed.items():
            try:
                same = found.result() == files[name]["sha256"]
            except OSError as error:
                raise _damaged(path, f"{name} cannot be read ({error.strerror})") from None
            if not same:
                raise _damaged(path, f"the content of {name} has changed")


def measured(path: Path) -> Checkpoint:
    """A checkpoint whose files are all there in their sizes. Raises SteelError naming the first that is not."""
    checkpoint = read_manifest(path)
    for name, entry in checkpoint.manifest["files"].items():
        file = path / name
        if ".." in Path(name).parts or not file.resolve().is_relative_to(path.resolve()):  # absolute, or a link out
            raise SteelError(
                f"the manifest names a file outside the checkpoint: {name}", path, "do not use this checkpoint"
            )
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size"]:
            found = "missing" if size is None else f"{size} bytes"
            raise _damaged(path, f"{name} is {found}, the manifest says {entry['size']} bytes")
    return checkpoint


def _damaged(path: Path, what: str) -> SteelError:
    return SteelError(f"the checkpoint is damaged: {what}", path, "use another checkpoint")


def hide_old(folder: Path, keep_last: int, newest: int, keep_every: int | None = None) -> list[Path]:
    """Rename what is older than the last `keep_last` (at least two) checkpoints up to step `newest` out of sight.

    Returns what is to be deleted: these, and what crashes left. Steps that `keep_every` divides stay. Rank 0 only.
    `newest` is the step just written: folders of later steps are damaged ones that were passed over and must not count
    as kept, nor does one that has lost a file. A kill before or in mid-delete leaves no half under a final name.
    """
    upto = [path for path in published(folder) if _step_of(path) <= newest]
    kept = [path for path in upto if _is_measured(path)][-max(2, keep_last) :]
    old = [path for path in upto if kept and _step_of(path) < _step_of(kept[0])]
    try:
        for path in (path for path in old if not keep_every or _step_of(path) % keep_every):
            os.replace(path, path.with_name(f".{path.name}.deleted"))
    except OSError as error:
        dist.log.warning("an old checkpoint could not be deleted: %s", error)
    return sorted(folder.glob(".step-*"))


def delete(hidden: Iterable[Path]) -> None:
    """Delete folders; one that cannot be deleted stays, with a warning."""
    for path in hidden:
        try:
            shutil.rmtree(path)
        except OSError as error:
            dist.log.warning("an old checkpoint could not be deleted: %s", error)


def discard_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps than `step`, newest first: the run has gone back behind them. Rank 0 only."""
    for path in reversed(published(folder)):
        if _step_of(path) > step:
            hidden = path.with_name(f".{path.name}.deleted")
            shutil.rmtree(hidden, ignore_errors=True)  # one that could not be deleted whole would stand in the way
            os.replace(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _is_measured(path: Path) -> bool:
    try:
        return bool(measured(path))
    except (SteelError, OSError):
        return False


def expected_size(folder: Path, first: int) -> int:
    """Bytes of the next checkpoint: as many as the newest has, or `first` where there is none."""
    for path in reversed(published(folder)):
        if _is_measured(path):
            return read_manifest(path).bytes
    return first


def warn_of_space(folder: Path, expected_bytes: int, checkpoints: int) -> None:
    """Say so when there is no room for that many more checkpoints; `expected_bytes` as in `write`. Rank 0 only.

    Never raises for a folder that cannot be looked at (it may have gone): that is for the next save to say.
    """
    try:
        needed = expected_size(folder, expected_bytes)
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    except (OSError, SteelError) as error:
        dist.log.warning("it cannot be told how much room is left in %s: %s", folder, error)
        return
    if free < checkpoints * needed:
        dist.log.warning(
            "the disk is nearly full: a checkpoint takes %s and %s are free in %s: free space, or saving will fail",
            _gib(needed), _gib(free), folder,
        )  # fmt: skip


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB ({count:,} bytes)"


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the SHA-256 of all its other entries, so that an edited one is found."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=True)
    return json.loads(text) | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def _fresh_folder(path: Path, expected_bytes: int) -> None:
    folder = path.parent
    for leftover in folder.glob(".step-*"):  # a killed save's, which may be what fills the disk
        shutil.rmtree(leftover, ignore_errors=True)
    path.mkdir(parents=True)
    needed, free = expected_size(folder, expected_bytes), shutil.disk_usage(folder).free
    if free < needed:
        what = f"there is no room for the checkpoint: it needs {_gib(needed)}, {_gib(free)} are free"
        raise NotWritten(what, folder, "free space; older checkpoints are untouched")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _sync_and_hash(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Side by side: syncing waits for the disk, hashing for the processor."""
    with ThreadPoolExecutor(1) as disk:
        synced = [disk.submit(sync, file) for file in files]
        entries = {
            str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files
        }
        for done in synced:
            done.result()
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
    room = memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(room):
            digest.update(room[:count])
    return digest.hexdigest()


def _explain_disk(action: Callable[[], Any], where: Path) -> Any:
    try:
        return action()
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kind = NotWritten if getattr(error, "errno", None) in _HOPELESS else Stumbled
        raise kind(f"the checkpoint could not be written: {reason}", where,
                   "free space or mend the folder: older checkpoints are untouched") from error  # fmt: skip
