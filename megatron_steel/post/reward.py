"""Rewards for GRPO: is the answer of a reply right? In the signatures that TRL's GRPOTrainer and verl call.

The reply alone is read, never the prompt: a prompt lists every option, so a reader that also sees the prompt finds an
answer that nobody gave. An answer that is missing or not plain is worth nothing, and no text is run. Rows come from
`sft-data` with `kind: grpo`. Must not know models, templates or trainers.
"""

from collections.abc import Sequence
from typing import Any

from megatron_steel.post.extract import extract_choice, extract_number, plain_number

Completion = str | Sequence[dict[str, Any]]
"""What a model wrote: text, or TRL's list of messages, of which the last one counts."""


def score(reply: str, answer: str, options: Sequence[str] = ()) -> float:
    """1.0 for a right reply, else 0.0.

    Args:
        reply: what the model wrote.
        answer: the right letter; without options the right number, perhaps behind GSM8K's `####`.
        options: the options' texts in their order; none where a number is asked for.

    Raises ValueError for an answer that no reply could give: the row is wrong, and a silent zero would hide it.
    """
    if options:
        if answer not in list("ABCDEFGHIJ"[: len(options)]):
            raise ValueError(f"the answer {answer!r} is none of {len(options)} options")
        return float(extract_choice(reply, options) == answer)
    right = plain_number(answer)
    if right is None:
        raise ValueError(f"the answer {answer!r} is not a number")
    return float(extract_number(reply) == right)


def trl_reward(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
    """For `GRPOTrainer(reward_funcs=[trl_reward])`: one reward a completion.

    `answer` and `options` are columns of the data set, repeated by TRL for each completion; prompts and whatever else
    TRL hands over are not looked at.
    """
    options = columns.get("options") or [()] * len(completions)
    return [
        score(_text(completion), right, given or ())
        for completion, right, given in zip(completions, answer, options, strict=True)
    ]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> float:
    """For verl's `custom_reward_function`: `solution_str` is the decoded response, `extra_info` may hold options."""
    options = (extra_info or {}).get("options")
    return score(solution_str, str(ground_truth), [] if options is None else list(options))


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    return content if isinstance(content, str) else ""
