"""The sets of fine-tuning: what a row of each looks like, and the example that it holds.

One table for each kind of data. `docs/sft_data.md` says where each form is documented. Must not know files.
"""

import re
from dataclasses import dataclass

from megatron_steel.data import sources
from megatron_steel.data.sources import Broken, Conversation, Rejected, optional, string
from megatron_steel.post.extract import plain_number
from megatron_steel.post.sft_data import choices
from megatron_steel.post.sft_data.examples import Example, Fields, Read, Turn, asked, from_turns

_GSM8K = 'Let\'s think step by step and output the final answer after "####".'
_HAN, _KANA = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"), re.compile("[\u3040-\u30ff\uac00-\ud7af]")
_LEAST_HAN, _MOST_KANA = 0.5, 0.1
_PLACEHOLDER = re.compile(r"\{\{\s*(name|author|auth?oer)\s*\}\}|<(name|author)>", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """How to read one set.

    Attributes:
        read: a row to an example.
        benchmark: models are scored on its test split, so a file that is called test is refused.
        placeholder: a row of it must hold {{name}} or {{author}} somewhere.
    """

    read: Read
    benchmark: bool = False
    placeholder: bool = False


def table(kind: str, name: str = "", author: str = "") -> dict[str, Source]:
    """The sources of one kind of data (sft, dpo, grpo); `name` and `author` are the model's, for self-cognition."""
    if kind == "dpo":
        return {
            "ultrafeedback-chinese": Source(_instruction_pair),
            "ultrafeedback-binarized": Source(_pair),
            "preferences": Source(_pair),
        }
    english = {
        "openbookqa": Source(choices.english_choice, benchmark=True),
        "arc": Source(choices.english_choice, benchmark=True),
        "logiqa": Source(choices.logiqa, benchmark=True),
    }
    if kind == "grpo":
        return {
            "wanjuan-exam": Source(choices.wanjuan_exam_explained),
            **english,
            "gsm8k": Source(_gsm8k, benchmark=True),
        }
    return {
        "infinity-instruct": Source(_infinity),
        "wanjuan-exam": Source(choices.wanjuan_exam),
        "ruozhiba": Source(_conversation("alpaca")),
        "self-cognition": Source(_self_cognition(name, author), placeholder=True),
        "code-feedback": Source(_conversation("messages")),
        "openhermes": Source(_openhermes),
        "webinstructsub": Source(lambda row: asked(string(row, "question"), string(row, "answer"))),
        **english,
        "messages": Source(_conversation("messages")),
        "alpaca": Source(_conversation("alpaca")),
        "sharegpt": Source(_conversation("sharegpt")),
        "firefly": Source(_conversation("firefly")),
    }


def is_chinese(said: str) -> bool:
    """Half of the letters are Chinese characters, and not a tenth are kana or hangul. Needs no model to download."""
    letters = sum(map(str.isalpha, said)) or 1
    return len(_HAN.findall(said)) >= _LEAST_HAN * letters and len(_KANA.findall(said)) < _MOST_KANA * letters


def holds_placeholder(row: Fields) -> bool:
    """Whether a text of a self-cognition row leaves room for a name."""
    return any(isinstance(value, str) and _PLACEHOLDER.search(value) for value in row.values())


def _conversation(form: str) -> Read:
    source = sources.source(form)
    assert source is not None

    def read(row: Fields) -> Example:
        conversation = source.read(row)
        assert isinstance(conversation, Conversation)
        return from_turns(conversation.turns)

    return read


def _infinity(row: Fields) -> Example:
    """Infinity-Instruct's Chinese part: by its own label (column langdetect), without one by what the user writes."""
    label = optional(row, "langdetect")
    if label and label != "zh-cn":
        raise Rejected("not Chinese")
    example = _conversation("sharegpt")(row)
    if not label and not is_chinese("".join(content for role, content in example.prompt if role == "user")):
        raise Rejected("not Chinese")
    return example


def _openhermes(row: Fields) -> Example:
    """OpenHermes-2.5; some of its parts keep the system line in a column of its own."""
    return _conversation("sharegpt")(row | {"system": row.get("system_prompt")})


def _self_cognition(name: str, author: str) -> Read:
    """alpaca rows, or {query, response}; {{name}} and {{author}} (or <NAME>, <AUTHOR>) become the model's own."""

    def fill(found: re.Match[str]) -> str:
        return name if (found[1] or found[2]).lower() == "name" else author

    def read(row: Fields) -> Example:
        if "query" in row:
            row = {"instruction": string(row, "query"), "output": string(row, "response")}
        example = _conversation("alpaca")(row)
        filled = [(role, _PLACEHOLDER.sub(fill, content)) for role, content in example.turns()]
        if any("{{" in content for _, content in filled):
            raise Rejected("unknown placeholder")
        return from_turns(filled)

    return read


def _gsm8k(row: Fields) -> Example:
    question, worked = string(row, "question").strip(), string(row, "answer")
    _, marker, answer = worked.rpartition("####")
    if not marker or not answer.strip():
        raise Rejected("no answer")
    if plain_number(answer) is None:  # the reward's own rule
        raise Rejected("answer is not a number")
    return asked(f"{question} {_GSM8K}", worked, answer=answer.strip().replace(",", ""))


def _instruction_pair(row: Fields) -> Example:
    return asked(string(row, "instruction"), string(row, "chosen_response"), string(row, "rejected_response"))


def _pair(row: Fields) -> Example:
    """prompt, chosen and rejected: texts, or lists of {role, content} that may repeat the prompt, of any length."""
    prompt = row.get("prompt")
    before = [("user", prompt)] if isinstance(prompt, str) else _messages(row, "prompt") if prompt is not None else []
    chosen, rejected = (_branch(row, key, before) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Rejected("prompts differ")
    begun = chosen[:-1]
    if before and begun[: len(before)] != before and begun[1 : len(before) + 1] != before:  # a system line may precede
        raise Rejected("prompts differ")
    spoken = [role for role, _ in begun if role != "system"]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] or "system" in [role for role, _ in begun[1:]]:
        raise Rejected("role order")
    return Example(tuple(begun), (chosen[-1][1], rejected[-1][1]))


def _branch(row: Fields, key: str, before: list[Turn]) -> list[Turn]:
    """All turns up to a reply."""
    if isinstance(row.get(key), str):
        return [*before, ("assistant", string(row, key))]
    turns = _messages(row, key)
    if not turns or turns[-1][0] != "assistant":
        raise Rejected("role order")
    return turns if len(turns) > 1 else [*before, *turns]


def _messages(row: Fields, key: str) -> list[Turn]:
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Broken(f"{key!r} is neither a text nor a list of messages")
    turns = [(string(turn, "role"), string(turn, "content")) for turn in value]
    if not {role for role, _ in turns} <= {"system", "user", "assistant"}:
        raise Rejected("unknown role")
    return turns
