"""What lies beside the weights of an export: configuration, modelling code, tokenizer, chat template.

`config.json` carries each fact in the form of transformers 4.57 and in that of 5.x. The tokenizer's files are copied
byte for byte: saving them again under 5.x breaks them for 4.x; a chat template is only ever a new file beside them. Must
not know weights or checkpoints.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import dist
from megatron_steel.data.chat_template import TRAINING_FILE, training_template_of
from megatron_steel.errors import SteelError
from megatron_steel.model.folder import refuse_outside
from megatron_steel.model.own import own_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron_steel.data.tokenizer import Tokenizer

# Weights, configuration and readme that may lie in the same folder are not the tokenizer's.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
                    "chat_template*", "*.model", "*.tiktoken", "tokenization_*.py")  # fmt: skip
_TOKENIZER_FOLDERS = ("additional_chat_templates",)
_ENDS = ("<|im_end|>", "<|endoftext|>")
_ALWAYS = ("tie_word_embeddings",)  # versions differ in its default


def write_companions(
    folder: Path,
    config: "PretrainedConfig",
    architecture: str,
    dtype: str,
    tokenizer: "Tokenizer | None",
    source: Path | None,
    code: Path | None = None,
) -> str | None:
    """Write config.json and generation_config.json and copy code and tokenizer into `folder`.

    Args:
        tokenizer, source: the tokenizer, and the folder or file that it lies in; None where nobody knows it.
        code: the folder whose modelling code travels, where the model is neither ours nor a class of transformers.

    Returns: the transformers class that loads the tokenizer; None where the folder has no Hugging Face tokenizer.
    Raises SteelError when the copied tokenizer gives other ids than the original.
    """
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokenizer is not None and source is not None:
        # First, while there is no config.json: transformers would ask whether to run the code that it names.
        copy_tokenizer(source, folder, tokenizer)
        if source.is_dir():
            write_template(folder)
        ids = special_ids(folder if source.is_dir() else source, tokenizer)
    tree = config_tree(config, architecture, dtype, ids)
    _write_json(folder / "config.json", tree)
    start = {
        key: tree[key] for key in ("decoder_start_token_id",) if tree.get(key) is not None
    }  # of an encoder-decoder
    generation = {**generation_tree(ids, tokenizer, tree["transformers_version"]), **start}
    _write_json(folder / "generation_config.json", generation)
    for file in code_files(config, str(code) if code else None):
        shutil.copyfile(file, folder / file.name)
    return tokenizer_class(folder, config, tokenizer) if tokenizer is not None and source and source.is_dir() else None


def config_tree(config: "PretrainedConfig", architecture: str, dtype: str, ids: dict[str, Any]) -> dict[str, Any]:
    """`config.json` as plain values, for transformers 4.57 and 5.x alike.

    Args:
        ids: bos, eos and pad ids of the tokenizer; they replace the configuration class's own defaults.
    """
    from transformers import PretrainedConfig, __version__

    defaults = PretrainedConfig().to_dict()
    tree = {
        key: value
        for key, value in config.to_dict().items()
        if key in _ALWAYS or key not in defaults or defaults[key] != value
    }
    tree.pop("_name_or_path", None)
    if _is_native(config):
        tree.pop("auto_map", None)
    first = {"architectures": [architecture], "model_type": config.model_type}
    return {**first, **tree, **first, **rope_fields(tree), **ids, "dtype": dtype, "torch_dtype": dtype,
            "transformers_version": __version__}  # fmt: skip


def generation_tree(ids: dict[str, Any], tokenizer: "Tokenizer | None", version: str) -> dict[str, Any]:
    """`generation_config.json`: what ends a text, what pads.

    With ChatML both of its ends end a text: `<|im_end|>` of a turn, `<|endoftext|>` of a document. Nothing about sampling:
    a temperature here makes transformers warn at every greedy call, and the best one is not known.
    """
    tree = {key: value for key, value in ids.items() if value is not None}
    eos = tree.get("eos_token_id")
    if eos is not None:
        tree.setdefault("pad_token_id", eos)
        known = [tokenizer.special[end] for end in _ENDS if tokenizer and end in tokenizer.special]
        ends = list(dict.fromkeys([eos, *known]))
        tree["eos_token_id"] = ends if len(ends) > 1 else eos
    return {**tree, "transformers_version": version}


def rope_fields(tree: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings of transformers 5 (`rope_parameters`) in the older fields; {} where there are none."""
    rope = tree.get("rope_parameters")
    if not rope:
        return {}
    if "full_attention" in rope:  # one entry per kind of layer
        local = rope.get("sliding_attention", {})
        return {**_older_rope(rope["full_attention"]), "rope_local_base_freq": local.get("rope_theta")}
    older = _older_rope(rope)
    if str(tree.get("model_type")).startswith("gpt_neox"):  # it has names of its own
        older |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    return older


def _older_rope(rope: dict[str, Any]) -> dict[str, Any]:
    fields = {"rope_theta": rope["rope_theta"]}
    if rope.get("partial_rotary_factor") is not None:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return fields if scaling.get("rope_type", "default") == "default" else {**fields, "rope_scaling": scaling}


def special_ids(path: Path, tokenizer: "Tokenizer") -> dict[str, int | None]:
    """bos, eos and pad ids of a tokenizer folder or sentencepiece model; None where it has none."""
    if path.is_dir():
        from transformers import AutoTokenizer

        hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        bos, pad = hf.bos_token_id, hf.pad_token_id
    else:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        # bos is left out although the model has one: no document begins with it.
        bos, pad = None, model.pad_id() if model.pad_id() >= 0 else None
    return {"bos_token_id": bos, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}


def code_files(config: "PretrainedConfig", model_path: str | None) -> list[Path]:
    """The modelling code that must travel: that of our own classes, a foreign folder's own, none for native classes."""
    own = own_class(config)
    if own is not None:
        return own.files
    return [] if _is_native(config) or model_path is None else sorted(Path(model_path).glob("*.py"))


def copy_tokenizer(source: Path, folder: Path, original: "Tokenizer") -> None:
    """Copy a tokenizer's files unchanged. Raises SteelError when what was copied is another tokenizer."""
    from megatron_steel.data.tokenizer import load_tokenizer

    if source.is_file():
        shutil.copyfile(source, folder / source.name)
        dist.log.info("%s is a sentencepiece model: the export holds it, but no Hugging Face tokenizer", source)
        return
    copy_tokenizer_files(source, folder)
    if load_tokenizer(folder).fingerprint != original.fingerprint:
        raise SteelError("the copied tokenizer gives other ids than the original", source,
                         "save it as a plain Hugging Face tokenizer folder and name that in tokenizer.path")  # fmt: skip


def write_template(folder: Path) -> None:
    """Write the template for training beside a tokenizer that needs another one for it than its own.

    As `chat_template.jinja`, which transformers reads, where the tokenizer has none; else under a name that it does not
    read: named templates in `additional_chat_templates/` would hide one that lies in tokenizer_config.json.
    """
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    template = training_template_of(hf)
    if template is None or template == hf.chat_template:
        return
    file = folder / (TRAINING_FILE if hf.chat_template else "chat_template.jinja")
    if not file.exists():  # one that came with the tokenizer is the tokenizer's
        file.write_text(template, encoding="utf-8")


def copy_tokenizer_files(source: Path, folder: Path) -> list[Path]:
    """Copy whatever belongs to a tokenizer, byte for byte. Returns the files found.

    Raises SteelError where a link would bring a file from elsewhere into what is published.
    """
    refuse_outside(source)
    found = [file for pattern in _TOKENIZER_FILES for file in sorted(source.glob(pattern)) if file.is_file()]
    for file in found:
        shutil.copyfile(file, folder / file.name)
    for name in _TOKENIZER_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
    return found


def tokenizer_class(folder: Path, config: "PretrainedConfig", original: "Tokenizer") -> str:
    """`AutoTokenizer`, or the class to name where the model's type leads AutoTokenizer to another tokenizer.

    transformers 5 builds Qwen2's tokenizer for `model_type: qwen2` whatever tokenizer_config.json says.
    """
    from transformers import AutoTokenizer, PretrainedConfig

    from megatron_steel.data.tokenizer import PROBES

    texts = list(PROBES)
    settings = {"local_files_only": True, "trust_remote_code": False}
    try:
        found = AutoTokenizer.from_pretrained(str(folder), config=config, **settings)
        if found(texts, add_special_tokens=False)["input_ids"] == original.encode_batch(texts):
            return "AutoTokenizer"
    except Exception as error:  # whatever the wrong class makes of these files
        dist.log.warning("AutoTokenizer fails for model_type %s: %s", config.model_type, error)
    by_files = type(AutoTokenizer.from_pretrained(str(folder), config=PretrainedConfig(), **settings)).__name__
    name = "PreTrainedTokenizerFast" if by_files == "TokenizersBackend" else by_files
    dist.log.warning(
        "for model_type %s AutoTokenizer does not load the tokenizer of the training: load the export's with %s",
        config.model_type, name,
    )  # fmt: skip
    return name


def _is_native(config: "PretrainedConfig") -> bool:
    return type(config).__module__.startswith("transformers.")


def _write_json(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
