"""`SHA256SUMS` of a folder, as `sha256sum --check` reads it. Must not know what the files are."""

import os
from pathlib import Path

from megatron_steel.data.reserve import sha256

SUMS = "SHA256SUMS"


def write_checksums(folder: Path) -> Path:
    """Hash every file in the folder but the list itself, and write the list. Returns it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    lines = [_line(sha256(file), file.relative_to(folder).as_posix()) for file in files]
    (folder / SUMS).write_bytes(os.fsencode("".join(lines)))  # bytes: a name on disk need not be UTF-8
    return folder / SUMS


def _line(digest: str, name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"
