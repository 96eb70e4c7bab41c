"""The tensors of a published model under other names, in other rows, from file to file, and what lies beside them.

Layers are renumbered as `inherit` says, rows of the vocabulary chosen as `resize` says; every other tensor stays as it is.
What was written must be exactly what the new configuration builds, and is read back and compared. Memory is bounded by a
shard and one vocabulary matrix, old and new.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.convert import inherit
from megatron_steel.convert.published import Published, on_meta, once, require_loads, vocabulary_tensors
from megatron_steel.convert.weights import Weights
from megatron_steel.data.tokenizer import Tokenizer, load_tokenizer
from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from megatron_steel.convert.resize import Rows

GENERATION = "generation_config.json"
_AT_ONCE = 1 << 24
"""Numbers looked at together: eight-bit ones are widened for it."""


@dataclass(frozen=True)
class Change:
    """What becomes of the tensors of a source."""

    names: dict[str, list[str]]
    """The new names of each old one that stays; several where a layer comes more than once."""
    matrices: frozenset[str] = frozenset()
    """Old names of what has a row for each word of the vocabulary."""
    rows: "Rows | None" = None

    def shapes(self, weights: Weights) -> dict[str, tuple[int, ...]]:
        """Of every new tensor."""
        return {new: self._shape(old, weights.shapes[old]) for old, names in self.names.items() for new in names}

    def dtypes(self, weights: Weights) -> "dict[str, torch.dtype]":
        """Of every new tensor: as on disk."""
        import torch

        return {new: getattr(torch, weights.dtypes[old]) for old, names in self.names.items() for new in names}

    def stream(self, weights: Weights) -> "Iterator[tuple[str, torch.Tensor]]":
        """Every new (name, tensor). Raises SteelError where a number is not finite."""
        for old, names in self.names.items():
            tensor = weights[old]
            require_finite(old, tensor, weights.folder)
            if self.rows is not None and old in self.matrices:
                tensor = self.rows.of(tensor)
            for number, new in enumerate(names):
                yield new, tensor.clone() if number else tensor  # a file holds no memory twice

    def _shape(self, old: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (len(self.rows.parts), *shape[1:]) if self.rows is not None and old in self.matrices else shape


def require_finite(name: str, tensor: "torch.Tensor", folder: Path) -> None:
    """Raise SteelError where a number is not."""
    from megatron_steel.convert.shards import is_finite

    if not all(is_finite(piece) for piece in tensor.flatten().split(_AT_ONCE)):
        raise SteelError(f"{name} holds numbers that are not finite", folder, "fetch the weights again")


def write_changed(
    source: Published, aside: Path, tokenizer: Path | None, vocab_size: int | None, layers: Sequence[int] | None
) -> str:
    """Fill `aside` with the model in another vocabulary, of other layers, or both; returns what to tell."""
    if source.config.get_text_config() is not source.config:
        raise SteelError(f"a {source.config.model_type} model has more parts than a language model", source.folder,
                         "import it as it is, or name a folder that holds its language model alone")  # fmt: skip
    names = {name: [name] for name in once(source)}
    tree, said = dict(source.tree), []
    chosen: list[int] | None = None
    if layers is not None:
        path, modules = inherit.layer_list(source.model)
        chosen = inherit.choose(layers, len(modules))
        names = inherit.renamed(names, path, source.model.base_model_prefix, chosen, source.folder)
        tree = inherit.config_tree(tree, source.config, chosen, source.folder)
        said.append(f"layers {', '.join(map(str, chosen))} of {len(modules)}")
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    change, tree, generation = _vocabulary(source, Change(names), tree, tokenizer, loaded, vocab_size)
    if change.rows is not None:
        said.append(change.rows.said)
    config = _config(source.config, tree, source.folder)
    model, expected = on_meta(config)
    if chosen is not None:
        inherit.require_same_layers(source.model, model, chosen, source.folder)
    loader = _copy_tokenizer(source, aside, tokenizer, loaded, config)
    write_weights(source, change, aside)
    write_beside(source, tree, aside)
    if generation is not None:
        write_json(aside / GENERATION, generation)
    try:
        require_loads(aside, config, change.shapes(source.weights), expected, source.trust_code)
    except SteelError as error:  # `aside` is gone when this is read, and the fault lay in the source
        raise SteelError(error.what, source.folder, "fetch the folder again, or mend its config.json") from error
    count = sum(parameter.numel() for parameter in model.parameters())
    said.append(f"{count:,} parameters; every other tensor as it was")
    if loader not in (None, "AutoTokenizer"):
        said.append(f"load its tokenizer with {loader}")
    return f"{type(model).__name__}: " + "; ".join(said)


def write_weights(source: Published, change: Change, aside: Path) -> None:
    """Write the shards, read them back and compare."""
    import torch

    from megatron_steel.convert.shards import write_shards

    weights = source.weights
    write_shards(change.stream(weights), change.shapes(weights), aside, change.dtypes(weights), source.folder)
    written = Weights(aside)
    for name, tensor in change.stream(source.weights):
        if not (written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)):
            raise SteelError(f"{name} was not written as it was read", aside, "report this")


def write_beside(source: Published, tree: dict[str, Any], aside: Path) -> None:
    """Write `config.json`, and the modelling code and generation settings that travel with it."""
    from megatron_steel.convert import companions

    write_json(aside / "config.json", tree)
    for file in [*companions.code_files(source.config, str(source.folder)), source.folder / GENERATION]:
        copy_if_there(file, aside)


def copy_if_there(file: Path, folder: Path) -> None:
    if file.is_file():
        shutil.copyfile(file, folder / file.name)


def write_json(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _vocabulary(
    source: Published,
    change: Change,
    tree: dict[str, Any],
    tokenizer: Path | None,
    loaded: Tokenizer | None,
    vocab_size: int | None,
) -> tuple[Change, dict[str, Any], dict[str, Any] | None]:
    """The same with other rows: tensors, `config.json` and, where ids change, generation settings."""
    if tokenizer is None and vocab_size is None:
        return change, tree, None
    from megatron_steel.convert import companions, resize

    config = source.config
    matrices = vocabulary_tensors(source)
    rows = resize.plan_rows(source.folder, config.vocab_size, tokenizer, loaded, vocab_size)
    tree = {**tree, config.attribute_map.get("vocab_size", "vocab_size"): len(rows.parts)}
    generation = None
    if tokenizer is not None and loaded is not None:
        ids = companions.special_ids(tokenizer, loaded)
        tree = resize.with_ids(tree, rows, ids, several=False)
        if (source.folder / GENERATION).is_file():
            generation = resize.with_ids(_generation(source.folder), rows, ids, several=True)
    return Change(change.names, matrices, rows), tree, generation


def _generation(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / GENERATION).read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        what = f"{GENERATION} cannot be read: {error}"
        raise SteelError(what, folder / GENERATION, "mend or remove the file") from None


def _config(old: "PretrainedConfig", tree: dict[str, Any], where: Path) -> "PretrainedConfig":
    try:
        return type(old).from_dict(dict(tree))
    except Exception as error:  # transformers' own validation raises several classes
        raise SteelError(
            f"the new configuration is refused: {error}", where, "choose other layers or another size"
        ) from error


def _copy_tokenizer(
    source: Published, aside: Path, tokenizer: Path | None, loaded: Tokenizer | None, config: "PretrainedConfig"
) -> str | None:
    """Copy the tokenizer's files, before there is a config.json that could lead transformers to another class.

    Returns: the class that loads a new one beside this configuration; None where there is none to load.
    """
    from megatron_steel.convert import companions

    if tokenizer is None or loaded is None:
        companions.copy_tokenizer_files(source.folder, aside)
        return None
    companions.copy_tokenizer(tokenizer, aside, loaded)
    return companions.tokenizer_class(aside, config, loaded) if tokenizer.is_dir() else None
