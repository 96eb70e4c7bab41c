"""A published model becomes a folder to start from: Steel-LLM in our own form, anything else copied and checked.

1. A published Steel-LLM folder says `model_type: qwen2` and is known by its architecture or by the key `FFN_type`. Its code
   is never run: its tensors are those of our own classes, name for name.
2. Names and shapes are compared before anything is written; afterwards every tensor is read back and must be equal.
3. Any other folder must load as `transformers` loads it, without a tensor missing or left over, and is copied.

The dtype on disk is kept. Knows nothing of runs and checkpoints.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import dist
from megatron_steel.checkpoint.zero import asked_for
from megatron_steel.errors import SteelError
from megatron_steel.model.folder import refuse_outside

if TYPE_CHECKING:
    import torch

    from megatron_steel.model.configuration_steel import SteelConfig

_BIN, _SAFE = "pytorch_model.bin", "model.safetensors"
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


def import_hf(source: str | os.PathLike[str], output: str | os.PathLike[str], trust_code: bool = False) -> Path:
    """Make `output` a Hugging Face folder that `model.path` and `model.init_from` take.

    Args:
        source: a folder with `config.json` and weights (safetensors or pytorch_model.bin, whole or sharded).
        output: must not exist, or be empty; it appears whole or not at all.
        trust_code: allow modelling code of a foreign architecture to run (a Steel-LLM folder's is never run).

    Raises:
        SteelError: no model there, a missing, unexpected or misshapen tensor (named), an impossible configuration.
    """
    from megatron_steel.convert.hf import publishing, refuse_used

    folder, target = Path(source), Path(output).absolute()
    refuse_used(target)
    refuse_outside(folder)
    tree = _config_json(folder)
    with publishing(target, "import") as aside:
        said = _import_steel(folder, tree, aside) if is_published(folder) else _copy(folder, aside, trust_code)
    print(f"{output}: {said}")
    return target


def is_published(folder: Path) -> bool:
    """Whether this is the original's Steel-LLM: its architecture or its key, and not our own `model_type`."""
    tree = _config_json(folder)
    steel = tree.get("architectures") == ["SteelForCausalLM"] or "FFN_type" in tree
    return steel and tree.get("model_type") != "steel"


def read_tensors(folder: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """Every (name, tensor) of a folder's weight files, in the dtype on disk; one file is open at a time.

    Raises SteelError: there are no weights, a file of the index is missing, or it cannot be read.
    """
    for file, names in weight_files(folder).items():
        try:
            tensors = _open(file)
        except pickle.UnpicklingError as error:
            what = f"the weights are unsafe: the file {asked_for(error)}"
            raise SteelError(what, file, "use safetensors, or a folder that you trust") from error
        except Exception as error:  # the readers' own classes are many
            raise SteelError(f"the weights cannot be read: {error}", file, "fetch the file again") from error
        for name in names if names is not None else list(tensors):
            if name not in tensors:
                raise SteelError(f"the index promises {name} in this file, and it is not there", file, "fetch it again")
            yield name, tensors[name]


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files that hold the weights, with the tensors that an index says are in each (None: all)."""
    for name in (_SAFE, _BIN):
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
    raise SteelError("the folder holds no weights", folder, f"it needs {_SAFE} or {_BIN}, whole or with an index")


def _import_steel(folder: Path, tree: dict[str, Any], aside: Path) -> str:
    """Write a published Steel-LLM as our own folder; returns what to tell."""
    from megatron_steel.convert import companions, shards

    config = _steel_config(folder, tree)
    blueprint = shards.blueprint_of(config)
    dtypes = _compare(folder, blueprint.shapes, config.tie_word_embeddings)
    dtype = max(set(dtypes), key=dtypes.count)
    shards.write_shards(_finite(folder, blueprint.shapes), blueprint.shapes, aside, None, folder)
    _require_equal(folder, aside, blueprint.shapes)
    ids = {name: tree.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = json.dumps(companions.config_tree(config, blueprint.architecture, dtype, ids), indent=2, ensure_ascii=False)
    (aside / "config.json").write_text(text + "\n", encoding="utf-8")
    for file in companions.STEEL_CODE:
        shutil.copyfile(file, aside / file.name)
    present = {
        "auto_map": "auto_map" in tree,
        "tokenizer": bool(companions.copy_tokenizer_files(folder, aside)),
        "generation_config.json": _copy_if_there(folder / "generation_config.json", aside),
    }
    absent = [name for name, there in present.items() if not there]
    if absent:
        dist.log.info("the published folder has no %s: nothing needs them to load or train", ", ".join(absent))
    tied = "tied" if config.tie_word_embeddings else "untied"
    return (
        f"Steel-LLM with FFN {config.FFN_type}, MLP {config.mlp_type}, {tied} head; {blueprint.parameters:,} parameters in "
        f"{len(blueprint.shapes)} tensors ({dtype}), each equal to the published one"
    )


def _steel_config(folder: Path, tree: dict[str, Any]) -> "SteelConfig":
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


def _compare(folder: Path, shapes: dict[str, tuple[int, ...]], tied: bool) -> list[str]:
    """Check names, shapes and (where tied) the head against the model; returns the dtypes found."""
    import torch

    found: dict[str, tuple[int, ...]] = {}
    dtypes, ends = [], {}
    for name, tensor in read_tensors(folder):
        found[name] = tuple(tensor.shape)
        dtypes.append(str(tensor.dtype).removeprefix("torch."))
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            ends[name] = tensor
    if tied and len(ends) == 2:
        if not torch.equal(*ends.values()):
            raise _unlike(
                folder, "holds a lm_head.weight that differs from model.embed_tokens.weight, and config.json ties them"
            )
        del found["lm_head.weight"]
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
        raise _unlike(folder, "; it ".join(told))
    return dtypes


def _finite(folder: Path, shapes: dict[str, tuple[int, ...]]) -> "Iterator[tuple[str, torch.Tensor]]":
    for name, tensor in read_tensors(folder):
        if not bool(tensor.isfinite().all()):
            raise SteelError(f"{name} holds numbers that are not finite", folder, "fetch the weights again")
        if name in shapes:  # a tied head is written once
            yield name, tensor


def _require_equal(folder: Path, written: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    ours = dict(read_tensors(written))
    for name, tensor in read_tensors(folder):
        if name in shapes and not (ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)):
            raise SteelError(f"{name} was not written as it was read", written, "report this")


def _copy(folder: Path, aside: Path, trust_code: bool) -> str:
    """Prove that a folder loads, then copy what it needs; returns what to tell."""
    from megatron_steel.convert import companions
    from megatron_steel.model.build import build_config, build_model
    from megatron_steel.recipe import Model

    config = build_config(Model(path=str(folder), trust_code=trust_code))
    model = build_model(config, 0, str(folder), trust_code)
    files = weight_files(folder)
    for file in [folder / "config.json", *files]:
        shutil.copyfile(file, aside / file.name)
    optional = [folder / name for name in (f"{_SAFE}.index.json", f"{_BIN}.index.json", "generation_config.json")]
    for file in [*optional, *companions.code_files(config, str(folder))]:
        _copy_if_there(file, aside)
    companions.copy_tokenizer_files(folder, aside)
    count = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} with {count:,} parameters, copied as it is; it loads without a tensor missing or left over"


def _copy_if_there(file: Path, folder: Path) -> bool:
    if file.is_file():
        shutil.copyfile(file, folder / file.name)
    return file.is_file()


def _open(file: Path) -> "dict[str, torch.Tensor]":
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(file))
    import torch

    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)  # a pickle runs nothing this way


def _config_json(folder: Path) -> dict[str, Any]:
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


def _unlike(folder: Path, how: str) -> SteelError:
    return SteelError(f"the weights are not of the model that config.json describes: the folder {how}", folder,
                      "fetch the folder again, or mend its config.json")  # fmt: skip
