"""A model as somebody published it: its configuration, its weight files, and which of their tensors are which.

A published Steel-LLM is read in our own form (`published_steel`), anything else as it is. Must not know what is made of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.convert import published_steel
from megatron_steel.convert.weights import Weights
from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """A folder with a model in it."""

    folder: Path
    tree: dict[str, Any]
    """`config.json`, in our own form where this is a published Steel-LLM."""
    config: "PretrainedConfig"
    model: "PreTrainedModel"
    """On `meta`: names and shapes, no numbers."""
    shapes: Shapes
    """What the configuration has on disk."""
    weights: Weights
    is_steel: bool
    trust_code: bool


def read_published(folder: Path, trust_code: bool) -> Published:
    """Open a folder; numbers are not read yet.

    Raises SteelError: no model there, quantised weights, foreign code without permission, of a Steel-LLM a tensor missing,
    unexpected or misshapen.
    """
    from megatron_steel.model.build import build_config
    from megatron_steel.recipe import Model

    tree = published_steel.config_json(folder)
    if tree.get("quantization_config"):
        raise SteelError("the weights are quantised, and training needs them whole", folder,
                         "import the model that this one was made from")  # fmt: skip
    is_steel = published_steel.is_published(folder)
    if is_steel:
        config: PretrainedConfig = published_steel.steel_config(folder, tree)
    else:
        config = build_config(Model(path=str(folder), trust_code=trust_code))
    weights = Weights(folder)
    model, shapes = on_meta(config)
    if is_steel:
        published_steel.require_tensors(weights, shapes, config.tie_word_embeddings)
        tree = published_steel.our_tree(tree, config, weights)
    return Published(folder, tree, config, model, shapes, weights, is_steel, trust_code)


def on_meta(config: "PretrainedConfig") -> "tuple[PreTrainedModel, Shapes]":
    """The model of a configuration without numbers, and the shapes that it has on disk."""
    import torch

    from megatron_steel.convert.shards import blueprint_of
    from megatron_steel.model.build import construct

    with torch.device("meta"):
        return construct(config, torch.float32), blueprint_of(config).shapes


def require_loads(
    folder: Path, config: "PretrainedConfig", found: Shapes, expected: Shapes, trust_code: bool = False
) -> None:
    """Raise SteelError unless a folder's tensors are exactly what a configuration builds.

    Other names in the files may be the class's older ones: then transformers itself must load the folder, in fp32, without
    a tensor missing or left over.
    """
    from megatron_steel.model.build import build_model

    if found != expected:
        build_model(config, 0, str(folder), trust_code)


def file_name(name: str, source: Published) -> str | None:
    """A parameter's name in the files; None where they do not hold it.

    Files may leave out the base model's prefix. Where they have an older name that transformers still reads (GPT-NeoX's
    `embed_out` for `lm_head`), it is the one tensor of this shape that no parameter is named after.
    """
    found = source.weights.shapes
    base = f"{source.model.base_model_prefix}."
    for known in (name, name.removeprefix(base)):
        if known in found:
            return known
    named = source.shapes.keys() | {each.removeprefix(base) for each in source.shapes}
    alike = [each for each, shape in found.items() if each not in named and shape == source.shapes.get(name)]
    return alike[0] if len(alike) == 1 else None


def once(source: Published) -> list[str]:
    """The names in the files, of tensors that the model ties only the first.

    Raises SteelError where the files hold two different matrices for what the configuration ties.
    """
    import torch

    names = list(source.weights.shapes)
    ties: dict[int, list[str]] = {}
    for name, parameter in source.model.named_parameters(remove_duplicate=False):
        ties.setdefault(id(parameter), []).append(name)
    for tied in ties.values():
        first, *others = [known for name in tied if (known := file_name(name, source)) is not None] or [None]
        for other in others:
            if not torch.equal(source.weights[first], source.weights[other]):
                what = f"the folder holds a {other} that differs from {first}, and config.json ties them"
                raise SteelError(what, source.folder, "fetch the folder again, or mend its config.json")
            names.remove(other)
    return names


def vocabulary_tensors(source: Published) -> frozenset[str]:
    """The files' names of embedding, head and head's bias: what has a row for each word.

    Raises SteelError where the files do not hold the embedding under a name of its class, or not with as many rows as the
    configuration says.
    """
    size = source.config.vocab_size
    ends = [source.model.get_input_embeddings(), source.model.get_output_embeddings()]
    found = [p for end in ends if end is not None for p in end.parameters() if p.shape[0] == size]
    names = [
        known
        for name, parameter in source.model.named_parameters(remove_duplicate=False)
        if any(parameter is one for one in found) and (known := file_name(name, source)) is not None
    ]
    if not names:
        raise SteelError("the files name the embedding otherwise than its class", source.folder,
                         "load the model with transformers, save it with save_pretrained, and import that")  # fmt: skip
    for name in names:
        if source.weights.shapes[name][0] != size:
            what = f"{name} has {source.weights.shapes[name][0]} rows, and config.json says vocab_size {size}"
            raise SteelError(what, source.folder, "mend config.json")
    return frozenset(names)
