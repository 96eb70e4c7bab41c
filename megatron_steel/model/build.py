"""From a recipe's model section to a model that is ready to be trained.

    config = build_config(recipe.model, tokenizer_vocab_size)     our own classes, any of transformers, any folder
    model  = build_model(config, seed, init_from)                 whole, fp32, on the CPU, equal on every rank
    model  = prepare_for_training(model, activation_checkpointing, kernels, z_loss)
    loss   = model(input_ids=..., labels=..., document_ids=...)   the SUM over tokens

Building the whole model first and sharding it afterwards is deliberate: `deepspeed.zero.Init` around a transformers
class initialises weights silently wrong. Knows nothing of ranks, data or the optimizer.
"""

import difflib
import inspect
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_steel.errors import SteelError
from megatron_steel.model import regions
from megatron_steel.model.folder import is_own_code, refuse_outside
from megatron_steel.model.groups import decay_groups, draw_again
from megatron_steel.model.modeling_steel import MIXTURES
from megatron_steel.model.own import OWN, own_class
from megatron_steel.model.text_to_text import TEXT_TO_TEXT, auto_class, complete, known_type
from megatron_steel.model.training import prepare_for_training

if TYPE_CHECKING:
    from megatron_steel.recipe import Model

__all__ = ["build_config", "build_model", "decay_groups", "fetched_whole", "prepare_for_training", "require_start"]


def build_config(model: "Model", tokenizer_vocab_size: int | None = None) -> PretrainedConfig:
    """The configuration that a recipe's `model` section describes.

    Args:
        model: `type` with `config`, or `path`.
        tokenizer_vocab_size: length of the tokenizer; the model must have at least that many words.

    Raises:
        SteelError: unknown type or field (with the nearest name), impossible values, a folder without a readable
            `config.json`, foreign code without `model.trust_code`, a vocabulary smaller than the tokenizer.
    """
    if model.path is not None:
        if model.config:
            what = "model.config cannot change a model that comes from model.path"
            raise SteelError(what, "model.config", "edit config.json in that folder, or give model.type instead")
        config = _config_of_folder(model.path, model.trust_code)
    else:
        config = _config_of_type(str(model.type), model.config)
    complete(config, "model.type" if model.path is None else model.path)
    words = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer_vocab_size is not None and words is not None and words < tokenizer_vocab_size:
        raise SteelError(
            f"the tokenizer has {tokenizer_vocab_size} entries and the model's vocabulary only {words}",
            "model.config.vocab_size" if model.path is None else model.path,
            f"set model.config.vocab_size to at least {tokenizer_vocab_size} (a multiple of 64 is fastest)",
        )
    return config


def build_model(
    config: PretrainedConfig,
    seed: int,
    init_from: str | None = None,
    trust_code: bool = False,
    init_std: dict[str, float] | None = None,
) -> PreTrainedModel:
    """The whole model in fp32 on the CPU (4 bytes a parameter), the same on every rank for one seed.

    Args:
        seed: of the initial weights; the caller's random state is left as it was.
        init_from: a Hugging Face folder whose weights replace the initial ones, all of them.
        trust_code: allow modelling code that lies in `init_from`.
        init_std: {pattern of names: std} of weights that are drawn otherwise than the class does.

    Raises:
        SteelError: a pattern matches nothing; `init_from` cannot be read or does not hold exactly this model's tensors.
    """
    if init_from is not None:
        return _load_weights(config, init_from, trust_code)
    # The CPU's generator alone: torch.manual_seed would reset the GPUs' too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = construct(config, torch.float32)
        draw_again(model, init_std or {})
        return model


def construct(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration on the current default device (also `meta`), initialised by its own rules.

    Raises SteelError where its class does not come to terms with its values.
    """
    own = own_class(config)
    # Code from a folder runs only where build_config was allowed to load its configuration class.
    auto = auto_class(config)
    foreign = type(config) not in auto._model_mapping
    try:
        if own is not None:
            return own.model._from_config(config, dtype=dtype)
        return auto.from_config(config, dtype=dtype, trust_remote_code=foreign)
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, AssertionError) as error:
        raise _bad_values(config, error) from error
    except RuntimeError as error:
        if torch.get_default_device().type != "meta":
            raise  # of the machine, out of memory say; on the meta device it is the values
        raise _bad_values(config, error) from error


def _bad_values(config: PretrainedConfig, error: Exception) -> SteelError:
    named = [name for name in config.to_dict() if name in str(error)]
    where = f"model.config.{max(named, key=len)}" if named else "model.config"
    what = f"{type(config).__name__}'s model cannot be built from these values: {type(error).__name__}: {error}"
    return SteelError(what, where, "mend the value")


def fetched_whole(model: nn.Module) -> list[nn.Module]:
    """Modules that read the weights of their children themselves, so that ZeRO-3 must fetch all of them at once."""
    mixtures = [module for module in model.modules() if isinstance(module, MIXTURES)]
    return mixtures + regions.compiled_layers(model)


def _config_of_type(name: str, fields: dict[str, Any]) -> PretrainedConfig:
    if name in OWN:
        cls: type[PretrainedConfig] = OWN[name].config
        known = set(inspect.signature(cls).parameters) - {"kwargs"}
    else:
        cls = _config_class(name)
        known = _known_fields(cls) | ({"decoder_start_token_id"} if name in TEXT_TO_TEXT else set())
    unknown = sorted(set(fields) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(known), n=1, cutoff=0.5)
        raise SteelError(
            f"{', '.join(unknown)}: {cls.__name__} has no such field",
            f"model.config.{unknown[0]}",
            f"did you mean {near[0]}?" if near else f"see the fields of {cls.__name__}",
        )
    try:
        config = cls(**fields)
    except Exception as error:  # transformers' own validation raises several classes; all are the user's values
        field = str(error).split(":")[0]
        where = f"model.config.{field}" if field in known else "model.config"
        raise SteelError(f"{cls.__name__} refuses these values: {error}", where, "mend the value") from error
    _require_heard(config, fields)
    _require_whole_groups(config)
    return config


def _require_whole_groups(config: PretrainedConfig) -> None:
    """Raise SteelError where heads cannot be grouped: most classes would find out in their first forward pass only."""
    heads, kv_heads = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(kv_heads, int) and (kv_heads < 1 or heads % kv_heads):
        what = f"{heads} query heads cannot share {kv_heads} key/value heads evenly"
        raise SteelError(what, "model.config.num_key_value_heads", f"take a divisor of {heads}")


def _require_heard(config: PretrainedConfig, fields: dict[str, Any]) -> None:
    """Raise SteelError for an older rotary field that this class of transformers 5 takes and does not use."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    for name in {"rope_theta", "partial_rotary_factor"} & set(fields):
        if all(kind.get(name) != fields[name] for kind in kinds):
            raise SteelError(f"{type(config).__name__} takes {name} and does not use it", f"model.config.{name}",
                             f"set model.config.rope_parameters instead; its default: {json.dumps(rope)}")  # fmt: skip


def _config_class(name: str) -> type[PretrainedConfig]:
    types = sorted(t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t in CONFIG_MAPPING)
    if name not in types and not known_type(name):
        near = difflib.get_close_matches(name, [*OWN, *TEXT_TO_TEXT, *types], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        what = f"{name!r} is no causal language model of the installed transformers"
        raise SteelError(
            what, "model.type", f"{hint}use {', '.join(OWN)}, a transformers model_type such as llama, or model.path"
        )
    return CONFIG_MAPPING[name]


def _known_fields(cls: type[PretrainedConfig]) -> set[str]:
    default = cls()
    known = set(inspect.signature(cls.__init__).parameters) | set(default.to_dict()) | set(cls.attribute_map)
    if "rope_parameters" in known:  # transformers 5 moves these there, and still takes them by their old names
        known |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    return known - {"self", "args", "kwargs", "model_type", "transformers_version"}


def _config_of_folder(path: str, trust_code: bool) -> PretrainedConfig:
    file = Path(path) / "config.json"
    refuse_outside(Path(path))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        what = f"the model folder has no readable config.json: {error}"
        raise SteelError(what, file, "give model.path a Hugging Face folder, or use model.type") from None
    foreign = "AutoModelForCausalLM" in content.get("auto_map", {})
    if model_type in OWN and not trust_code and not is_own_code(Path(path), content):
        what = f"the folder's code for model_type {model_type!r} is not this package's, and running it is not allowed"
        raise SteelError(what, file, "read the .py files there, then set model.trust_code=true")
    try:
        if model_type in OWN and not trust_code:  # this package's own file, not the copy in the folder
            return OWN[model_type].config.from_pretrained(path, local_files_only=True)
        if model_type in CONFIG_MAPPING or trust_code:
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_code and foreign)
    except Exception as error:
        raise SteelError(f"config.json is refused: {error}", file, "mend the file") from error
    if not foreign:
        what = f"transformers does not know model_type {model_type!r}"
        raise SteelError(what, file, "use a newer transformers, or a folder that brings its code")
    what = f"the folder brings its own code for model_type {model_type!r}, and running it is not allowed"
    raise SteelError(what, file, "read the .py files there, then set model.trust_code=true")


def require_start(folder: str) -> None:
    """Raise SteelError where no model lies that a run could start from (`model.init_from`)."""
    if not Path(folder, "config.json").is_file():
        raise SteelError("there is no Hugging Face model to start from", folder, "mend model.init_from")


def _load_weights(config: PretrainedConfig, folder: str, trust_code: bool) -> PreTrainedModel:
    require_start(folder)
    refuse_outside(Path(folder))
    own = own_class(config)
    cls: Any = own.model if own else auto_class(config)
    settings: dict[str, Any] = {} if own else {"trust_remote_code": trust_code}
    try:
        with torch.random.fork_rng(devices=[]):
            model, report = cls.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **settings,
            )  # fmt: skip
    except pickle.UnpicklingError as error:  # transformers reads weights-only: nothing was run
        what = f"the weights are unsafe: {str(error).splitlines()[0]}"
        raise SteelError(what, folder, "use safetensors, or a folder that you trust") from error
    except Exception as error:
        raise SteelError(f"the weights cannot be read: {error}", folder, "mend model.init_from") from error
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [name if isinstance(name, str) else f"{name[0]} ({tuple(name[1])})" for name in report[kind]]
        if names:
            listed = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            problems.append(f"{len(names)} {kind.removesuffix('_keys')}: {listed}")
    if problems:
        what = "the weights do not fit the model: " + "; ".join(problems)
        raise SteelError(what, folder, "give the recipe the sizes of that folder's config.json, or use model.path")
    head = model.get_output_embeddings()
    if config.get_text_config().tie_word_embeddings and head.weight is not model.get_input_embeddings().weight:
        # transformers then leaves them apart, and the run would train a model that its recipe does not describe.
        what = "the model ties input and output embeddings, the folder holds two different matrices"
        raise SteelError(what, folder, "set model.config.tie_word_embeddings=false")
    return model
