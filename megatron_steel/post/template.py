"""A tokenizer with its chat template: how many tokens a conversation takes, and which strings belong to the tokenizer.

Must not know sets, files or models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_steel.data.chatml import Turns, harmless, special_strings
from megatron_steel.data.tokenizer import load_tokenizer
from megatron_steel.errors import SteelError
from megatron_steel.post.load import template_tokenizer


class Template:
    """A tokenizer folder's chat template.

    Args:
        path: a Hugging Face folder, the exported model's for one.

    Raises SteelError: not a tokenizer folder, or one without a chat template.
    """

    def __init__(self, path: str):
        if not Path(path).is_dir():
            raise SteelError("there is no such tokenizer folder", path, "name the exported model's folder")
        self._tokenizer = load_tokenizer(path)
        self._hf: Any = template_tokenizer(path)
        if self._hf is None or not self._hf.chat_template:
            raise SteelError("the tokenizer has no chat template", path,
                             "name the exported model's folder: its template is the one that training uses")  # fmt: skip
        self.harmless = harmless(special_strings(self._hf))
        self.facts = self._tokenizer.facts()

    def render(self, turns: Turns) -> str | None:
        """The conversation as the model reads it; None where the template does not take these turns."""
        from jinja2 import TemplateError

        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return str(self._hf.apply_chat_template(messages, tokenize=False))
        except TemplateError:
            return None

    def lengths(self, rendered: Sequence[str]) -> list[int]:
        """Tokens of each rendered conversation."""
        return [len(ids) for ids in self._tokenizer.encode_batch(list(rendered))]
