"""Let an exported model go on with a text. Must not know how the model was made."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.model import verdict
from megatron_steel.post.load import Loaded, load

_SAMPLING = {"temperature": 0.8, "top_p": 0.95}  # where the folder's generation_config does not sample itself
SEED = 1234


def generate(
    model_dir: str, prompt: str, max_new_tokens: int = 64, greedy: bool = False, trust_code: bool = False
) -> str:
    """The prompt and what the model writes after it, until it ends the document or has written `max_new_tokens`; of an
    encoder-decoder its response alone, to the prompt with the end of document behind it, as it was trained.

    Args:
        model_dir: a Hugging Face folder.
        prompt: any text; an empty one begins a document.
        greedy: always the likeliest token; else sampled from a fixed seed, by the folder's generation_config where
            it samples, else with temperature 0.8 and top-p 0.95.
        trust_code: allow foreign modelling code that lies in the folder.

    Raises:
        SteelError: what `load` raises, no tokenizer, a prompt that is not UTF-8, or no tokens wanted.
    """
    import torch

    if max_new_tokens < 1:
        raise SteelError(f"{max_new_tokens} new tokens are none", "--max-new-tokens", "ask for at least 1")
    require_text(prompt, "--prompt")
    loaded = open_writer(model_dir, trust_code, text_to_text=True)
    encode, decode = _coder(loaded, Path(model_dir))
    answers = loaded.model.config.is_encoder_decoder
    if answers:
        prompt_ids = [*_plain_ids(loaded, encode, prompt), _document_end(loaded.model.config, model_dir)]
    else:
        prompt_ids = encode(prompt) or [_document_start(loaded.model.generation_config, model_dir)]
    ids_BT = torch.tensor([prompt_ids], device=loaded.device)
    with seeded(loaded):
        written = loaded.model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=max_new_tokens, **sampling(loaded, greedy)
        )[0].tolist()
    if answers:
        return decode(written[1:])  # without the token that every response begins from
    return prompt + _continuation(decode(prompt_ids), decode(written))


def require_text(text: str, where: str) -> None:
    """Raises SteelError for bytes that were not UTF-8, which Python reads as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SteelError("the text is not UTF-8", where, "convert it, with iconv for one") from None


def open_writer(model_dir: str, trust_code: bool, text_to_text: bool = False) -> Loaded:
    """`load`, and a word of warning where the model is known to see the future."""
    loaded = load(model_dir, trust_code, text_to_text)
    report = verdict.read_verdict(Path(model_dir))
    if report is not None and report["causal"] is False and not hasattr(loaded.model.config, "sees_future"):
        # Steel's own classes say it themselves.
        dist.log.warning(
            "this model sees the future (%s): its text is worse than its loss promises", report.get("verdict")
        )
    return loaded


def sampling(loaded: Loaded, greedy: bool) -> dict[str, Any]:
    """The settings of `model.generate` that choose among tokens."""
    defaults = loaded.model.generation_config
    settings: dict[str, Any] = {"do_sample": not greedy}
    if not greedy and not defaults.do_sample:
        settings |= _SAMPLING
    if defaults.pad_token_id is None:
        settings["pad_token_id"] = loaded.model.config.eos_token_id
    return settings


@contextlib.contextmanager
def seeded(loaded: Loaded) -> Iterator[None]:
    """What is sampled here is the same every time, and leaves the caller's random generators as they were."""
    import torch

    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(SEED)
        yield


def _continuation(before: str, whole: str) -> str:
    """What was added; decoded with its prompt, because pieces alone would lose their leading spaces."""
    return whole[len(before) :] if whole.startswith(before) else whole


def _document_start(defaults: Any, model_dir: str) -> int:
    """The token before a document's first: bos where the model has one, else the end of the document before."""
    for token in (defaults.bos_token_id, defaults.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, list) else token
    raise SteelError(
        "the prompt is empty and the model has no token that begins a text", model_dir, "give --prompt a text"
    )


def _document_end(config: Any, model_dir: str) -> int:
    end = config.eos_token_id
    if end is None:
        raise SteelError("the model has no token that ends a prompt", model_dir, "set eos_token_id in its config.json")
    return end[0] if isinstance(end, list) else end


def _plain_ids(loaded: Loaded, encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Ids of a text, nothing added at either end, as `tokenize` makes them."""
    return (
        loaded.tokenizer(text, add_special_tokens=False)["input_ids"] if loaded.tokenizer is not None else encode(text)
    )


def _coder(loaded: Loaded, folder: Path) -> tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]:
    if loaded.tokenizer is not None:
        hf = loaded.tokenizer
        return (lambda text: hf(text)["input_ids"]), (lambda ids: hf.decode(ids, skip_special_tokens=True))
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        raise SteelError("the folder has no tokenizer", folder, "copy the tokenizer's files into it")
    from megatron_steel.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(models[0])
    return (lambda text: tokenizer.encode_batch([text])[0]), tokenizer.decode
