"""A Hugging Face folder from a stranger: it names nothing outside itself, and code of our classes is this package's or it is not run.

An index of shards names plain files, and a link leads to a file of the folder, or into the blobs of the Hugging Face cache
that the folder is part of. transformers and a plain copy would follow both anywhere. Must not know models or weights.
"""

import json
from pathlib import Path
from typing import Any

from megatron_steel.errors import SteelError


def refuse_outside(folder: Path) -> None:
    """Raise SteelError naming the first link or index entry that leads out of a folder. What is no folder passes."""
    if not folder.is_dir():
        return
    root = folder.resolve()
    inside = [root]
    if root.parent.name == "snapshots":  # models--owner--name/snapshots/REVISION/file -> ../../blobs/HASH
        inside.append(root.parent.parent / "blobs")
    for file in sorted(folder.rglob("*")):
        target = file.resolve() if file.is_symlink() else root
        if not any(target.is_relative_to(place) for place in inside):
            raise SteelError(f"a link in the folder is unsafe: it leads out of it, to {target}", file,
                             "put the file itself there if you trust it")  # fmt: skip
    for index in sorted(folder.glob("*.index.json")):
        for name in _named(index):
            if Path(name).name != name:
                raise SteelError(f"the index is unsafe: it names a file outside the folder, {name}", index,
                                 "fetch the folder again, from someone you trust")  # fmt: skip


def _named(index: Path) -> list[str]:
    """The files that an index of shards names."""
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteelError(f"the index cannot be read: {error!r}", index, "fetch it again") from None


def is_own_code(folder: Path, tree: dict[str, Any]) -> bool:
    """True for a folder of a class of ours (`own.OWN`) whose code is exactly this package's (or that brings none)."""
    from megatron_steel.model.own import OWN

    own = OWN.get(str(tree.get("model_type")))
    if own is None:
        return False
    known = {file.name: file.read_bytes() for file in own.files}
    return all(known.get(file.name) == file.read_bytes() for file in folder.glob("*.py"))
