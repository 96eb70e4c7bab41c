"""One example of fine-tuning data, and how a row of a published set may be refused.

An example is a prompt that ends with the user's turn and one reply (two for preferences: chosen, rejected), perhaps
with the verdict that a reward needs. Must not know files, sources, templates or tokenizers.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_steel.data.sources import Broken, Rejected

Fields = dict[str, Any]
Turn = tuple[str, str]
"""(role, content)"""


@dataclass(frozen=True)
class Example:
    """What a model is asked and what it shall say.

    Attributes:
        prompt: perhaps a system turn, then user and assistant by turns, the user's last.
        replies: one; for preferences the chosen and the rejected one; none where only `answer` judges.
        answer: the letter or the number that a right reply ends in, where there is one.
        options: the texts of a choice question's options, in their order.
    """

    prompt: tuple[Turn, ...]
    replies: tuple[str, ...]
    answer: str = ""
    options: tuple[str, ...] = ()

    def turns(self, reply: int = 0) -> list[Turn]:
        """The whole conversation with one of its replies; with none, the prompt."""
        return [*self.prompt, *(("assistant", text) for text in self.replies[reply : reply + 1])]

    def content(self) -> str:
        """Everything that is said, one turn a line: what is compared with benchmarks."""
        return "\n".join([text for _, text in self.prompt] + list(self.replies))


Read = Callable[[Fields], Example]
"""A row to an example. Raises Rejected: not wanted, the argument is the reason; Broken: not of the set's form."""


def asked(question: str, *replies: str, **more: Any) -> Example:
    """An example of one question."""
    return Example((("user", question),), replies, **more)


def from_turns(turns: list[Turn]) -> Example:
    """A conversation that ends with the assistant, its last turn the reply."""
    if not turns or turns[-1][0] != "assistant":
        raise Rejected("role order")
    return Example(tuple(turns[:-1]), (turns[-1][1],))


def check(example: Example) -> None:
    """Raise Rejected for a turn without a visible character, or two replies that are one; Broken for half a character."""
    try:
        example.content().encode()
    except UnicodeEncodeError:
        raise Broken("holds half a character (a lone surrogate)") from None
    if not all(_visible(content) for role, content in example.prompt if role != "assistant"):
        raise Rejected("empty question")
    if not all(_visible(content) for role, content in example.turns() if role == "assistant") or not all(
        _visible(reply) for reply in example.replies
    ):
        raise Rejected("empty answer")
    if len(example.replies) == 2 and example.replies[0].strip() == example.replies[1].strip():
        raise Rejected("chosen equals rejected")


def _visible(said: str) -> bool:
    """Whether there is more than white space and characters of format: a zero-width space is no word."""
    return any(not character.isspace() and unicodedata.category(character) != "Cf" for character in said)
