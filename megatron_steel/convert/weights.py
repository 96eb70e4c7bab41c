"""The weight files of a Hugging Face folder: safetensors or pytorch_model.bin, whole or sharded, read tensor by tensor.

Nothing is run that a pickle asks for, and a tensor's numbers are fetched only when they are used. Must not know models.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_steel.checkpoint.zero import asked_for
from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    import torch

BIN, SAFE = "pytorch_model.bin", "model.safetensors"


class Weights:
    """The tensors of a folder by name, in the dtype on disk. One file is open at a time.

    Raises SteelError: there are no weights, a file of the index is missing, or it cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        """As torch names them."""
        self.files = weight_files(folder)
        self._places: dict[str, Path] = {}
        self._open: tuple[Path | None, dict[str, torch.Tensor]] = (None, {})
        for file, names in self.files.items():
            tensors = self._tensors(file)
            for name in names if names is not None else list(tensors):
                if name not in tensors:
                    what = f"the index promises {name} in this file, and it is not there"
                    raise SteelError(what, file, "fetch it again")
                self._places[name] = file
                self.shapes[name] = tuple(tensors[name].shape)
                self.dtypes[name] = str(tensors[name].dtype).removeprefix("torch.")

    def __getitem__(self, name: str) -> "torch.Tensor":
        """A tensor that shares no memory with another one."""
        tensor = self._tensors(self._places[name])[name]
        # In a .bin tied tensors are one storage, which safetensors refuses to write twice.
        return tensor if self._places[name].suffix == ".safetensors" else tensor.clone()

    def items(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Every (name, tensor), file by file."""
        return ((name, self[name]) for name in self.shapes)

    def _tensors(self, file: Path) -> "dict[str, torch.Tensor]":
        if self._open[0] != file:
            self._open = (None, {})  # before the next one is opened
            self._open = (file, _read(file))
        return self._open[1]


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files that hold the weights, with the tensors that an index says are in each (None: all)."""
    for name in (SAFE, BIN):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return {folder / name: None}
        if index.is_file():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise SteelError(f"the index cannot be read: {error!r}", index, "fetch it again") from None
            files: dict[Path, list[str] | None] = {}
            for file in sorted(set(places.values())):  # a name in the folder, whatever the index says
                files[folder / Path(file).name] = [tensor for tensor, at in places.items() if at == file]
            return files
    raise SteelError("the folder holds no weights", folder, f"it needs {SAFE} or {BIN}, whole or with an index")


def _read(file: Path) -> "dict[str, torch.Tensor]":
    """Every tensor of one file, mapped from disk and not yet read."""
    import torch

    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(file), "pt") as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (it is no dict)
        # A pickle runs nothing this way. The format of before torch 1.6 is no zip, and cannot be mapped.
        found = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    except pickle.UnpicklingError as error:
        what = f"the weights are unsafe: the file {asked_for(error)}"
        raise SteelError(what, file, "use safetensors, or a folder that you trust") from error
    except Exception as error:  # the readers' own classes are many
        raise SteelError(f"the weights cannot be read: {error}", file, "fetch the file again") from error
