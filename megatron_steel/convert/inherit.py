"""A model of chosen layers of a larger one: same class, same width, the layers renumbered in the order they are named.

Fewer layers make a small model that starts from a larger one's knowledge (parameter inheritance: arXiv 2402.02791,
2404.08634); a layer named twice makes it deeper (depth up-scaling: arXiv 2312.15166). Lists and numbers in the
configuration that speak of layers follow, and afterwards each new layer, built from the new configuration, must be what
the old one was: kind, sizes, window, rotary or not. Knows nothing of weight files' numbers or of vocabularies.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

# Fields that hold one entry a layer, numbers of layers, or how many of the first layers are of a kind.
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers")
_NUMBERS = ("mlp_only_layers",)
_FIRST = ("max_window_layers", "first_k_dense_replace")
# Computed in forward from the layer's number, so no comparison of built layers would see it.
_BY_NUMBER = ("scale_attn_by_inverse_layer_idx",)


def parse_layers(text: str) -> list[int]:
    """`0,1,-2,-1` as numbers. Raises SteelError where it is something else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SteelError(f"{text!r} is no list of layers", "--layers",
                         "write numbers from 0 with commas between them, from the end as -1: --layers=0,1,-2,-1") from None  # fmt: skip


def layer_list(model: "PreTrainedModel") -> tuple[str, "nn.ModuleList"]:
    """Where a model keeps its layers, and they. Raises SteelError where that is not one list of all of them."""
    from torch import nn

    count = getattr(model.config, "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # outer modules come first: a list of experts lies in a layer
        if isinstance(module, nn.ModuleList) and len(module) == count and not name.startswith(tuple(_inside(found))):
            found[name] = module
    if len(found) != 1:
        what = f"{type(model).__name__} does not keep its layers in one list"
        raise SteelError(what, "--layers", "layers of this class cannot be chosen")
    return next(iter(found.items()))


def choose(layers: Sequence[int], count: int) -> list[int]:
    """The numbers from 0 that are meant, in the order given; a layer may come twice.

    Raises SteelError where there is none, or a number is out of range.
    """
    if not layers:
        raise SteelError("no layer is chosen", "--layers", f"name some of 0 to {count - 1}")
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise SteelError(f"there is no layer {wrong[0]}: the model has {count}", "--layers",
                         f"name some of 0 to {count - 1}, or -{count} to -1 from the end")  # fmt: skip
    return [layer % count for layer in layers]


def renamed(names: Iterable[str], path: str, base: str, chosen: Sequence[int], where: Path) -> dict[str, list[str]]:
    """What each tensor of the files is called in the new model: {old name: new names}; no longer there: no entry.

    Args:
        path: of the list of layers in the model.
        base: `base_model_prefix`, which files that hold the model without its head leave out.

    Raises:
        SteelError: a chosen layer has no tensor under these names.
    """
    short = path.removeprefix(f"{base}.")
    layer = re.compile(rf"((?:{re.escape(base)}\.)?{re.escape(short)}\.)(\d+)(\..+)")
    found: dict[str, list[str]] = {}
    there = set()
    for name in names:
        at = layer.fullmatch(name)
        there.add(int(at[2]) if at else None)
        new = [f"{at[1]}{j}{at[3]}" for j, i in enumerate(chosen) if i == int(at[2])] if at else [name]
        if new:
            found[name] = new
    absent = sorted(set(chosen) - there)
    if absent:
        raise SteelError(f"the files hold no {path}.{absent[0]}", where, "fetch the folder again, or mend its config.json; "
                         "files that name layers otherwise: load them with transformers, save_pretrained, import that")  # fmt: skip
    return found


def config_tree(tree: dict[str, Any], config: "PretrainedConfig", chosen: Sequence[int], where: Path) -> dict[str, Any]:
    """`config.json` for the chosen layers.

    Raises SteelError where a layer does by its number what no configuration can say.
    """
    count = config.num_hidden_layers
    for name in _BY_NUMBER:
        if getattr(config, name, False) and list(chosen) != list(range(len(chosen))):
            raise SteelError(f"{name} makes a layer depend on its number", where, "only the first layers can be kept")
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changed: dict[str, Any] = {key: len(chosen)}
    for name in _PER_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, (list, tuple)) and len(values) >= count:
            changed[name] = [values[i] for i in chosen]
    for name in _NUMBERS:
        if tree.get(name):
            changed[name] = [j for j, i in enumerate(chosen) if i in tree[name]]
    for name in _FIRST:
        if isinstance(tree.get(name), int):
            changed[name] = sum(i < tree[name] for i in chosen)
    if "attention_types" in tree and "attention_layers" in changed:  # gpt_neo: the list that the other is made from
        changed["attention_types"] = [[changed["attention_layers"], 1]]
    return {**tree, **changed}


def require_same_layers(old: "PreTrainedModel", new: "PreTrainedModel", chosen: Sequence[int], where: Path) -> None:
    """Raise SteelError where a layer of the new model is not built as the old one it comes from (both on `meta`)."""
    _, before = layer_list(old)
    _, after = layer_list(new)
    for j, i in enumerate(chosen):
        was, now = _facts(before[i], i), _facts(after[j], j)
        if was != now:
            name = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))[0]
            what = f"layer {i} cannot become layer {j}: {type(new).__name__} would build it otherwise ({name}: " \
                   f"{was.get(name)} would be {now.get(name)})"  # fmt: skip
            raise SteelError(what, where, "keep layers in their places, or choose others")


def _facts(layer: "nn.Module", number: int) -> dict[str, Any]:
    """All that a layer's modules say of themselves, without weights: classes, shapes and plain attributes."""
    facts: dict[str, Any] = {}
    for path, module in layer.named_modules():
        facts[path] = type(module).__name__
        for name, value in vars(module).items():
            own_number = isinstance(value, int) and not isinstance(value, bool) and value == number and "layer" in name
            plain = isinstance(value, (str, int, float, list, tuple, type(None)))
            if plain and not own_number and name not in _PER_LAYER and not name.startswith("_"):
                facts[f"{path}.{name}"] = value
    facts |= {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    return facts


def _inside(found: Iterable[str]) -> list[str]:
    return [f"{name}." for name in found]
