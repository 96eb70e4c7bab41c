"""A published Steel-LLM folder, read as our own classes: its code is never run, its tensors are ours, name for name.

Such a folder says `model_type: qwen2` and is known by its architecture or by the key `FFN_type`. Knows nothing of what is
made of the model afterwards.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import dist
from megatron_steel.convert.weights import Weights
from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    from megatron_steel.model.configuration_steel import SteelConfig

# What the original's configuration class fills in; ours has defaults of its own.
_ORIGINAL_DEFAULTS = {
    "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "rope_theta": 10000.0,
}  # fmt: skip
# It has none for these, and ours must not guess.
_NEEDED = ("FFN_type", "mlp_type", "mlp_div_ratio")
_NEEDED_BY_MIXTURES = ("n_experts",)
_NOT_OURS = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version",
             "_name_or_path", "_attn_implementation", "use_cuda_rmsnorm")  # fmt: skip


def is_published(folder: Path) -> bool:
    """Whether this is the original's Steel-LLM: its architecture or its key, and not our own `model_type`."""
    tree = config_json(folder)
    steel = tree.get("architectures") == ["SteelForCausalLM"] or "FFN_type" in tree
    return steel and tree.get("model_type") != "steel"


def config_json(folder: Path) -> dict[str, Any]:
    """`config.json` as plain values. Raises SteelError where there is none, or it cannot be read."""
    file = folder / "config.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return dict(tree.items())
    except FileNotFoundError:
        raise SteelError(
            "this is no Hugging Face folder: it has no config.json", folder, "name another folder"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise SteelError(f"config.json cannot be read: {error}", file, "fetch the file again") from None


def steel_config(folder: Path, tree: dict[str, Any]) -> "SteelConfig":
    """Our configuration of a published one. Raises SteelError: it lacks a field, or is impossible."""
    from megatron_steel.model.configuration_steel import SteelConfig

    needed = [*_NEEDED, *(_NEEDED_BY_MIXTURES if str(tree.get("FFN_type", "")).startswith("softmoe") else ())]
    missing = [name for name in needed if name not in tree]
    if missing:
        raise SteelError(f"config.json lacks {', '.join(missing)}, which the original has no default for",
                         folder / "config.json", "fetch the file again")  # fmt: skip
    fields = {name: value for name, value in tree.items() if name not in _NOT_OURS}
    try:
        return SteelConfig(**{**_ORIGINAL_DEFAULTS, **fields})
    except (ValueError, TypeError) as error:
        raise SteelError(
            f"config.json describes no Steel model: {error}", folder / "config.json", "mend the value"
        ) from None


def our_tree(tree: dict[str, Any], config: "SteelConfig", weights: Weights) -> dict[str, Any]:
    """`config.json` of the same model in our own form."""
    from megatron_steel.convert import companions

    dtypes = list(weights.dtypes.values())
    ids = {name: tree.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return companions.config_tree(config, "SteelForCausalLM", max(set(dtypes), key=dtypes.count), ids)


def require_tensors(weights: Weights, shapes: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Compare names and shapes with the model's. Raises SteelError naming what is missing, unexpected or misshapen."""
    found = dict(weights.shapes)
    if tied:
        found.pop("lm_head.weight", None)
    missing, unexpected = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    wrong = [
        f"{n} as {found[n]}, the model has {shape}" for n, shape in shapes.items() if n in found and found[n] != shape
    ]
    problems = [(missing, "lacks"), (unexpected, "holds unexpected"), (wrong, "holds")]
    told = [
        f"{verb} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for names, verb in problems
        if names
    ]
    if told:
        what = "the weights are not of the model that config.json describes: the folder " + "; it ".join(told)
        raise SteelError(what, weights.folder, "fetch the folder again, or mend its config.json")


def tell_what_is_absent(folder: Path, tokenizer: bool) -> None:
    """Log what a published folder may have and this one has not."""
    present = {
        "auto_map": "auto_map" in config_json(folder),
        "tokenizer": tokenizer,
        "generation_config.json": (folder / "generation_config.json").is_file(),
    }
    absent = [name for name, there in present.items() if not there]
    if absent:
        dist.log.info("the published folder has no %s: nothing needs them to load or train", ", ".join(absent))
