"""Is what an export reads as it was written? Told by the CRC-32 that torch's own files keep of every record.

A checkpoint's moments are two thirds of its bytes, and no export reads them. Here only what weights come from is read and
summed, so damage in the rest is not seen: who goes on from a checkpoint verifies all of it (`commit.verify`). The sums are in
every file that `torch.save` writes, so those of other trainers are checked too. Must not know models.
"""

import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_steel.checkpoint import commit, zero
from megatron_steel.checkpoint.mapped import forget
from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    import torch

_STEP = 1 << 26  # bytes between two moments at which pages are given back
Sum = tuple[int, int]
"""Length in bytes, CRC-32."""


def verify_weights(path: Path) -> commit.Checkpoint:
    """A checkpoint of ours: every file has its size, what weights come from its sum, what is no tensor its hash.

    Raises SteelError naming what differs, as `commit.verify` does.
    """
    checkpoint = commit.measured(path)
    try:
        require_sound(path / commit.ENGINE)
    except SteelError:
        return commit.verify(path)  # which says more; and torch can be told to write no sums
    commit.require_hashes(checkpoint, [name for name in checkpoint.manifest["files"] if not name.endswith(".pt")])
    return checkpoint


def require_sound(folder: Path) -> None:
    """Compare everything that weights are read from with its sum. Raises SteelError where one is not in DeepSpeed's files."""
    tensors = zero.opened(folder).read_from()
    known = {entry for file in sorted(folder.rglob("*.pt")) for entry in _sums(file)}
    with ThreadPoolExecutor(commit.HASHERS) as pool:  # summing lets other threads run
        found = list(pool.map(lambda bytes_: _sum(bytes_, folder), _storages(tensors)))
    forget(folder)
    if not known.issuperset(found):
        raise SteelError("the checkpoint is damaged: weights are not as they were written", folder,
                         "use another checkpoint")  # fmt: skip


def _sums(file: Path) -> "list[Sum]":
    """Of the tensors in a file, as the file says. Reads, and so checks, all that is no tensor."""
    try:
        with zipfile.ZipFile(file) as archive:
            tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
            for entry in archive.infolist():
                if entry not in tensors:
                    archive.read(entry)
    except (zipfile.BadZipFile, OSError) as error:
        raise SteelError(f"the checkpoint is damaged: {error}", file, "use another checkpoint") from None
    return [(entry.file_size, entry.CRC) for entry in tensors]


def _storages(tensors: "Iterable[torch.Tensor]") -> list[memoryview]:
    """The bytes of each record that some tensor is a part of, once."""
    import torch

    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [
        torch.tensor([], dtype=torch.uint8).set_(storage).numpy().data
        for storage in found.values() if storage.nbytes()
    ]  # fmt: skip


def _sum(content: memoryview, folder: Path) -> Sum:
    total = 0
    for start in range(0, len(content), _STEP):
        total = zlib.crc32(content[start : start + _STEP], total)
        forget(folder)
    return len(content), total
