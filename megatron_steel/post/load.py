"""Open a Hugging Face folder: its model, ready to be asked, and its tokenizer. Runs no foreign code unasked.

A folder of one of this package's classes whose code files are this package's own, byte for byte, is built from the package's classes. Any
other code needs `trust_code`. Knows nothing of prompts or scores.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.errors import SteelError
from megatron_steel.model.folder import is_own_code

if TYPE_CHECKING:
    import torch

    from megatron_steel.model.own import OwnClass


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on `device`, and its tokenizer (a transformers one; None: only `folder` has a .model)."""

    model: Any
    tokenizer: Any
    device: "torch.device"


def load(model_dir: str, trust_code: bool = False, text_to_text: bool = False) -> Loaded:
    """Load a folder: fp32 on a CPU, bf16 on the first GPU.

    Args:
        trust_code: allow modelling and tokenizer code that lies in the folder.
        text_to_text: the caller also knows what to do with an encoder-decoder.

    Raises:
        SteelError: no such folder, an unreadable one, foreign code without `trust_code`, another model's tokenizer, or an
            encoder-decoder that the caller cannot use.
    """
    import torch

    gpu = torch.cuda.is_available()
    model, tokenizer = load_as(model_dir, trust_code, torch.bfloat16 if gpu else torch.float32, text_to_text)
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    return Loaded(model.eval().to(device), tokenizer, device)


def load_as(model_dir: str, trust_code: bool, dtype: "torch.dtype", text_to_text: bool = False) -> tuple[Any, Any]:
    """The model in `dtype` on the CPU, and its tokenizer (or None). Raises as `load` does."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder, own = _allowed(model_dir, trust_code, text_to_text)
    auto = AutoModelForSeq2SeqLM if _is_text_to_text(_config_json(folder)) else AutoModelForCausalLM
    settings: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    with _named(folder):
        if own:
            model: Any = _own(folder).model.from_pretrained(folder, **settings)
        else:
            model = auto.from_pretrained(folder, trust_remote_code=trust_code, **settings)
        tokenizer = _tokenizer(folder, model.config, trust_code)
    require_vocabulary(folder, tokenizer, model.get_input_embeddings().num_embeddings)
    return model, tokenizer


def require_vocabulary(folder: Path, tokenizer: Any, embedded: int) -> None:
    """Raise SteelError where a tokenizer has more tokens than its model has rows."""
    if tokenizer is not None and len(tokenizer) > embedded:
        raise SteelError(f"the tokenizer has {len(tokenizer):,} tokens and the model only {embedded:,}: it is another model's",
                         folder, "put the tokenizer that the model was trained with into the folder")  # fmt: skip


def load_tokenizer(model_dir: str, trust_code: bool = False) -> Any:
    """A folder's tokenizer without its weights, to refuse early what `load` would refuse late. None: it has only a .model."""
    return load_tokenizer_and_config(model_dir, trust_code)[0]


def load_tokenizer_and_config(model_dir: str, trust_code: bool = False) -> tuple[Any, Any]:
    """A folder's tokenizer (or None) and configuration. Raises as `load` does, the size of the vocabulary apart."""
    from transformers import AutoConfig

    folder, own = _allowed(model_dir, trust_code)
    with _named(folder):
        if own:
            config: Any = _own(folder).config.from_pretrained(folder, local_files_only=True)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_code)
        return _tokenizer(folder, config, trust_code), config


def template_tokenizer(tokenizer_dir: str) -> Any:
    """The tokenizer of a folder that need not hold a model, for its chat template alone. None: it has only a .model."""
    folder = Path(tokenizer_dir)
    config: Any = None
    with _named(folder):
        if (folder / "config.json").is_file() and is_own_code(folder, _config_json(folder)):
            config = _own(folder).config.from_pretrained(folder, local_files_only=True)
        return _tokenizer(folder, config, trust_code=False)


def _own(folder: Path) -> "OwnClass":
    """This package's own class of a folder that `is_own_code` allows."""
    from megatron_steel.model.own import OWN

    return OWN[_config_json(folder)["model_type"]]


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a broken folder makes transformers raise
        what = f"transformers cannot load this folder: {type(error).__name__}: {error}"
        raise SteelError(what, folder, "name a folder that `megatron-steel export` or save_pretrained wrote") from error


def _allowed(model_dir: str, trust_code: bool, text_to_text: bool = False) -> tuple[Path, bool]:
    """The folder, and whether its code is this package's own. Raises SteelError where foreign code would run unasked, and for
    an encoder-decoder where none is expected."""
    folder = Path(model_dir)
    tree = _config_json(folder)
    if _is_text_to_text(tree) and not text_to_text:
        what = f"this is an encoder-decoder ({tree.get('model_type')}), and here a causal model is needed"
        raise SteelError(
            what, folder, "ask it by `megatron-steel generate HF_DIR --prompt TEXT`, or name a causal model"
        )
    own = is_own_code(folder, tree)
    if not own and "auto_map" in tree and not trust_code and not _is_native(tree):
        raise SteelError(
            f"the folder brings its own code for model_type {tree.get('model_type')!r}, and running it is not allowed",
            folder,
            "read the .py files there, then add --trust-code",
        )
    return folder, own


def _config_json(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        tree.get("model_type")
        return tree
    except FileNotFoundError:
        raise SteelError("this is no Hugging Face folder: it has no config.json", folder,
                         "name a folder that `megatron-steel export` wrote") from None  # fmt: skip
    except (OSError, ValueError, AttributeError) as error:
        raise SteelError(f"config.json cannot be read: {error}", file, "export the model again") from None


def _is_text_to_text(tree: dict[str, Any]) -> bool:
    return tree.get("is_encoder_decoder") is True


def _is_native(tree: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return tree.get("model_type") in CONFIG_MAPPING


def _tokenizer(folder: Path, config: Any, trust_code: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = [folder / "tokenizer_config.json", folder / "tokenizer.json"]
    if not any(file.is_file() for file in files):
        return None
    if all(file.is_file() for file in files):
        name = json.loads(files[0].read_text(encoding="utf-8")).get("tokenizer_class")
        if name in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            # tokenizer.json is all there is to it; for some model types AutoTokenizer would take another class.
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    # With the configuration given, transformers does not ask about the code that config.json names.
    return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=trust_code)
