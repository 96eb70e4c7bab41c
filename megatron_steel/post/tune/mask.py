"""Which tokens of a conversation are learned: what the assistant says and the mark that ends it, nothing else.

The model's own template, with marks around the assistant's words (`data/chat_template.py`), says where they lie; that it
renders the same text is checked on every row. Must not know files, trainers or ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_steel.data.chat_template import training_template_of
from megatron_steel.data.chatml import harmless, special_strings
from megatron_steel.errors import SteelError
from megatron_steel.model.head import IGNORE

Messages = list[dict[str, str]]
_PROBE: Messages = [{"role": role, "content": text} for role, text in
                    (("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))]  # fmt: skip


class Tokens(NamedTuple):
    """One conversation."""

    ids: list[int]
    labels: list[int]
    """The id where it is learned, else -100."""


class Supervision:
    """A tokenizer with a template that marks the assistant's words.

    Args:
        tokenizer: a transformers tokenizer of the model. where: its folder, for errors.

    Raises SteelError: no template, or none that marks the assistant's words and renders the model's own text.
    """

    def __init__(self, tokenizer: Any, where: object):
        self._tokenizer, self._where = tokenizer, where
        template = training_template_of(tokenizer) if tokenizer.chat_template else None
        if not tokenizer.chat_template:
            raise SteelError("the tokenizer has no chat template", where,
                             "fine-tune an export of this package, or add `chat_template` to its tokenizer_config.json")  # fmt: skip
        if not tokenizer.is_fast:
            raise SteelError("the tokenizer has no offsets (it is a slow one), so nobody can tell which tokens the assistant says",
                             where, "save it as a fast tokenizer (tokenizer.json)")  # fmt: skip
        if template is None:
            raise SteelError("the chat template has no {% generation %} marks, and is not ChatML, so nobody can tell what the "
                             "assistant says", where, "add {% generation %} and {% endgeneration %} around the assistant's words there")  # fmt: skip
        self._template: str = template
        self._checks = template != tokenizer.chat_template
        self._harmless = harmless(special_strings(tokenizer))
        self.forged = 0
        """Control strings that stood in a text and were broken up, as `sft-data` does."""
        self._require_end_marks()

    def encode(self, batch: Sequence[Messages]) -> list[Tokens]:
        """Ids and labels of conversations, whole. Raises SteelError where the two templates differ on a row."""
        clean = [self._clean(messages) for messages in batch]
        read = self._apply(clean)
        return [
            Tokens(ids, [token if said else IGNORE for token, said in zip(ids, mask, strict=True)])
            for ids, mask in zip(read["input_ids"], read["assistant_masks"], strict=True)
        ]

    def _clean(self, messages: Messages) -> Messages:
        turns = []
        for turn in messages:
            content, found = self._harmless(turn["content"])
            self.forged += found
            turns.append({"role": turn["role"], "content": content})
        return turns

    def _apply(self, batch: Sequence[Messages]) -> Any:
        from jinja2 import TemplateError

        apply = self._tokenizer.apply_chat_template
        try:
            if self._checks:
                own = apply(batch, tokenize=False)
                marked = apply(batch, tokenize=False, chat_template=self._template)
                for messages, text, ours in zip(batch, own, marked, strict=True):
                    if text != ours:
                        raise SteelError(f"the template with marks renders another text than the model's own: {ours!r} instead of {text!r}",
                                         f"{self._where}, conversation {messages!r}"[:500],
                                         "add {% generation %} marks to the model's own template")  # fmt: skip
            return apply(
                batch, chat_template=self._template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except TemplateError as error:
            raise SteelError(f"the chat template does not take a conversation: {error}", self._where,
                             "leave such rows out, or use the template that the model was trained with") from None  # fmt: skip

    def _require_end_marks(self) -> None:
        """A model that never learns its end mark never stops."""
        tokens = self.encode([_PROBE])[0]
        said, runs = [label != IGNORE for label in tokens.labels], []
        for place, learned in enumerate(said):
            if learned and (not place or not said[place - 1]):
                runs.append([])
            if learned:
                runs[-1].append(tokens.ids[place])
        special = set(self._tokenizer.all_special_ids) | {
            i for i, t in self._tokenizer.added_tokens_decoder.items() if t.special
        }
        texts = [self._tokenizer.decode(run[:-1]).strip() for run in runs if run and run[-1] in special]
        if len(texts) != 2 or not all(text.endswith(reply) for text, reply in zip(texts, ("a1", "a2"), strict=True)):
            raise SteelError("the template's marks do not hold each reply and the token that ends it", self._where,
                             "put {% endgeneration %} behind the end mark of the assistant's turn")  # fmt: skip


def prompt_and_reply(tokens: Tokens) -> tuple[list[int], list[int]]:
    """Ids before the last thing the assistant says, and of it with its end mark."""
    last = max(place for place, label in enumerate(tokens.labels) if label != IGNORE)
    first = last
    while first and tokens.labels[first - 1] != IGNORE:
        first -= 1
    return tokens.ids[:first], tokens.ids[first : last + 1]
