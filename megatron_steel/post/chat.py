"""Chat in the terminal: one line is one turn, the reply appears token by token, the conversation is remembered.

Reads from a terminal or a pipe; the end of the input, or the line /exit, ends it. Must not know scores or prompts.
"""

import sys
from collections.abc import Iterable
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.post.generate import open_writer, require_text, sampling, seeded
from megatron_steel.post.load import Loaded
from megatron_steel.post.turns import chat_ids, stop_ids

_EXIT = "/exit"


def chat(
    model_dir: str, max_new_tokens: int = 64, greedy: bool = False, trust_code: bool = False
) -> list[dict[str, str]]:
    """Talk to a model on stdin and stdout.

    Args:
        max_new_tokens: longest reply.
        greedy, trust_code: as in `generate`; sampling starts from a fixed seed, so a piped conversation repeats.

    Returns: the conversation, [{"role": "user" or "assistant", "content": ...}].
    Raises:
        SteelError: what `load` raises, a folder without tokenizer or chat template, a template that does not take turns
            of user and assistant, a line that is not UTF-8 or longer than the model reaches.
    """
    if max_new_tokens < 1:
        raise SteelError(f"{max_new_tokens} new tokens are none", "--max-new-tokens", "ask for at least 1")
    loaded = open_writer(model_dir, trust_code)
    if loaded.tokenizer is None:
        raise SteelError("the folder has no Hugging Face tokenizer, so no chat template", model_dir,
                         "use a chat model's folder")  # fmt: skip
    # Before a word is asked for: does the template take a conversation at all?
    chat_ids(loaded.tokenizer, [_turn("user", "?"), _turn("assistant", "!"), _turn("user", "?")])
    history: list[dict[str, str]] = []
    with seeded(loaded):
        for line in _lines():
            history.append(_turn("user", line))
            history.append(_turn("assistant", _reply(loaded, history, max_new_tokens, sampling(loaded, greedy))))
    return history


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _lines() -> Iterable[str]:
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise SteelError("the text is not UTF-8", "stdin", "convert it, with iconv for one") from None
        require_text(line, "stdin")
        if not line or line.strip() == _EXIT:
            return
        if line.strip():
            yield line.rstrip("\n")


def _reply(loaded: Loaded, history: list[dict[str, str]], max_new_tokens: int, settings: dict[str, Any]) -> str:
    """Write the next turn to stdout while it is made; returns its text."""
    import torch
    from transformers import TextStreamer

    ids_BT = torch.tensor([_fitting(loaded, history, max_new_tokens)], device=loaded.device)
    stops = stop_ids(loaded)
    written = loaded.model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=max_new_tokens, eos_token_id=stops or None,
        streamer=TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True), **settings,
    )[0, ids_BT.shape[1] :].tolist()  # fmt: skip
    return loaded.tokenizer.decode(written, skip_special_tokens=True)


def _fitting(loaded: Loaded, history: list[dict[str, str]], max_new_tokens: int) -> list[int]:
    """The newest turns that leave room for the reply; which are forgotten is said."""
    reach = getattr(loaded.model.config, "max_position_embeddings", None)
    for start in range(0, len(history), 2):
        ids = chat_ids(loaded.tokenizer, history[start:])
        if reach is None or len(ids) + max_new_tokens <= reach:
            if start:
                dist.log.warning("the model reaches %d tokens: it no longer sees the first %d turns", reach, start)
            return ids
    raise SteelError(f"this turn and {max_new_tokens} new tokens are longer than the {reach} tokens that the model reaches",
                     "stdin", "ask in fewer words, or with a smaller --max-new-tokens")  # fmt: skip
