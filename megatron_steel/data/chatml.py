"""Conversations to one text, and control strings in user text made harmless.

By default the ChatML of Qwen with its system line; with a tokenizer folder, that folder's own chat template. The last
turn is left open: `tokenize` ends every document with the end-of-document id, which for ChatML is `<|im_end|>`
itself, so a document's ids are the template's ids without the newline behind the last turn. Must not know corpora.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel.errors import SteelError

Turns = Sequence[tuple[str, str]]
"""(role, content) of each turn; roles are system (the first turn only), user and assistant."""
SYSTEM = "You are a helpful assistant."
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class TemplateRefused(Exception):  # noqa: N818  (a verdict on one row, counted, not an error of the job)
    """The tokenizer's template does not take these turns (a system line, say)."""


@dataclass(frozen=True)
class Format:
    """How turns become text, and which strings a tokenizer would take for its own inside of user text."""

    name: str
    """`chatml`, or the tokenizer folder's name."""
    control: tuple[str, ...]
    render: Callable[[Turns], str]
    """All turns, the last one left open. Raises TemplateRefused; SteelError where there is no template at all."""
    forged: Callable[[str], bool] = lambda text: False
    """Does the tokenizer find a control string in a text that `harmless` has left? Some look for theirs only after they
    have changed the text (folded, lower-cased)."""


def load_format(tokenizer: str | Path | None) -> Format:
    """The default ChatML, or what a Hugging Face tokenizer folder says. Raises SteelError for a folder that does not load."""
    if tokenizer is None:
        return Format("chatml", CONTROL, chatml)
    return _of_tokenizer(Path(tokenizer))


def chatml(turns: Turns) -> str:
    """ChatML as Qwen's template gives it, up to the last turn's end marker."""
    if not turns or turns[0][0] != "system":
        turns = [("system", SYSTEM), *turns]
    return "<|im_end|>\n".join(f"<|im_start|>{role}\n{content}" for role, content in turns)


def harmless(control: Iterable[str]) -> Callable[[str], tuple[str, int]]:
    """A function that puts a space behind the first character (no space) of every control string, and counts them.

    `<|im_end|>` becomes `< |im_end|>`: no tokenizer takes it for its own, people see what was done, and neither
    NFKC nor a cleaner of invisible characters undoes it (a zero-width space would go, and the marker would be back).
    """
    # Of white space alone, or of one character, no string can be broken up; nothing but its place makes it control.
    pieces = sorted((re.escape(text) for text in control if len(text.strip()) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(pieces))

    def broken(found: re.Match[str]) -> str:
        first = re.search(r"\S", found[0])
        assert first is not None  # of the pieces above
        return f"{found[0][: first.end()]} {found[0][first.end() :]}"

    def clean(text: str) -> tuple[str, int]:
        total = 0
        while True:  # once more where two control strings lay in one another
            text, count = pattern.subn(broken, text)
            if not count:
                return text, total
            total += count

    return clean if pieces else lambda text: (text, 0)


def special_strings(tokenizer: Any) -> list[str]:
    """What a transformers tokenizer takes for its own inside of a text, each once."""
    added = tokenizer.added_tokens_decoder.values()
    return list(dict.fromkeys([*(token.content for token in added if token.special), *tokenizer.all_special_tokens]))


def _of_tokenizer(path: Path) -> Format:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise SteelError("there is no such tokenizer folder", path, "give a Hugging Face tokenizer folder")
    try:
        hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken folder makes it raise
        what = f"transformers cannot load this tokenizer: {type(error).__name__}: {error}"
        raise SteelError(what, path, "give a folder with tokenizer.json or the files of its class") from None
    late = {i for i, token in hf.added_tokens_decoder.items() if token.special and token.normalized}
    late -= {hf.unk_token_id}

    def forged(text: str) -> bool:
        return bool(late) and not late.isdisjoint(hf(text, add_special_tokens=False)["input_ids"])

    def render(turns: Turns) -> str:
        if not hf.chat_template:
            raise SteelError("the tokenizer has no chat template", path, "leave --tokenizer out for plain ChatML")
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = str(hf.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError) as error:  # templates may call anything
            raise TemplateRefused(str(error)) from None
        closed = text.removesuffix("\n")
        return closed.removesuffix(hf.eos_token) if hf.eos_token and closed.endswith(hf.eos_token) else text

    control = tuple(dict.fromkeys([*CONTROL, *special_strings(hf)]))
    return Format(path.resolve().name, control, render, forged)
