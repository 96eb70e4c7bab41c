"""Scores of written answers: each question asked once in a chat, the way Steel-LLM's published scores were made.

1. The question becomes a user's turn in Steel-LLM's wording, behind its system prompt, in the folder's chat template.
2. The model writes greedily, in batches of about one length, padded on the left.
3. The answer is read from the reply alone; where it gives none the question counts as wrong, and is counted.

What differs from Steel-LLM's scripts, all of which raise or scatter their scores: nothing is sampled (CMMLU was, at
temperature 0.001 without a seed), no repetition penalty (CMMLU had 1.1), no closest option or random letter stands in for
an answer that is not there, and no reply without one is left out. Must not know the harness, files or other models.
"""

from collections.abc import Sequence
from typing import Any

from megatron_steel.errors import SteelError
from megatron_steel.post.extract import extract_choice
from megatron_steel.post.generate import SEED, seeded
from megatron_steel.post.load import Loaded
from megatron_steel.post.scoring.benchmarks import LETTERS, Question
from megatron_steel.post.turns import chat_ids, stop_ids

NAME = "steel-chat"
SYSTEM = "You are a helpful assistant."
_BATCH = 16
_CHINESE = "以下是一道单选题:\n{question}\n\n{options}请给出答案。\n"
_ENGLISH = (
    "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the answer "
    "to this question.\n\n{question}\n{options}"
)
# Wording, what stands for a blank in the question, most tokens in a reply: as in Steel-LLM's eval_chat.py, eval_CMMLU.py
# and eval_mmlu.py.
_ASKED: dict[str, tuple[str, tuple[str, str], int]] = {
    "ceval-valid": (_CHINESE, ("____。", "( )"), 1024),
    "cmmlu": (_CHINESE, ("____", ""), 64),
    "mmlu": (_ENGLISH, ("", ""), 1024),
}


def user_turn(task: str, asked: Question) -> str:
    """A question in Steel-LLM's words."""
    wording, (blank, instead), _ = _ASKED[task]
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, asked.options, strict=True))
    return wording.format(question=asked.text.replace(blank, instead) if blank else asked.text, options=options)


def answer(
    loaded: Loaded, task: str, questions: Sequence[Question], batch: bool = True, max_new_tokens: int | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Let a model answer in writing.

    Args:
        task: which benchmark the questions are from.
        batch: off for a model that sees the future: it would read the padding.
        max_new_tokens: instead of the protocol's own number.

    Returns: one item a question, in their order, with the reply and the letter read from it (None: invalid); and what
        the protocol was.
    Raises:
        SteelError: the tokenizer has no chat template, or a prompt and its reply are longer than the model reaches.
    """
    limit = max_new_tokens or _ASKED[task][2]
    prompts = [chat_ids(loaded.tokenizer, _conversation(task, asked)) for asked in questions]
    replies = written(loaded, prompts, limit, _BATCH if batch else 1)
    items = []
    for asked, reply in zip(questions, replies, strict=True):
        given = extract_choice(reply, asked.options)
        items.append({
            "subject": asked.subject, "number": asked.number, "question": asked.text, "options": list(asked.options),
            "answer": asked.answer, "given": given, "right": given == asked.answer, "reply": reply,
        })  # fmt: skip
    facts = {"few_shot": 0, "system": SYSTEM, "prompt": _ASKED[task][0], "decoding": "greedy", "max_new_tokens": limit,
             "seed": SEED}  # fmt: skip
    return items, facts


def written(loaded: Loaded, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> list[str]:
    """What the model writes after each prompt, greedily, in the prompts' order; equal for every batch size."""
    from tqdm import tqdm

    longest = max(map(len, prompts), default=0) + max_new_tokens
    reach = getattr(loaded.model.config, "max_position_embeddings", None)
    if reach is not None and longest > reach:
        raise SteelError(f"a question and {max_new_tokens} new tokens are {longest} tokens, and the model reaches {reach}",
                         "--max-new-tokens", f"allow at most {max(reach - longest + max_new_tokens, 0)}")  # fmt: skip
    stops = stop_ids(loaded)
    replies = [""] * len(prompts)
    with seeded(loaded):  # greedy needs no luck, but a model may bring its own
        for places in tqdm(_batches(prompts, batch_size), desc=NAME, disable=None):  # None: on a terminal alone
            new_BT = _generate(loaded, [prompts[place] for place in places], max_new_tokens, stops)
            for place, ids in zip(places, new_BT, strict=True):
                end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
                replies[place] = loaded.tokenizer.decode(ids[:end], skip_special_tokens=True)
    return replies


def _conversation(task: str, asked: Question) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user_turn(task, asked)}]


def _batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Places of prompts of about one length, the longest first: too little memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _generate(loaded: Loaded, prompts: list[Sequence[int]], max_new_tokens: int, stops: list[int]) -> list[list[int]]:
    import torch

    width = max(map(len, prompts))
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else (stops or [0])[0]
    ids_BT = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=loaded.device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=loaded.device)
    out_BT = loaded.model.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
        repetition_penalty=1.0, temperature=1.0, top_p=1.0, top_k=50, eos_token_id=stops or None, pad_token_id=pad,
    )  # fmt: skip
    return out_BT[:, width:].tolist()
