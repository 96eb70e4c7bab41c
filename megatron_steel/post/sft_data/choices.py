"""Choice questions to prompts and answers: WanJuan's Chinese exams, and OpenBookQA, ARC and LogiQA in English.

Prompts are those of Steel-LLM's fine-tuning, worded as its evaluation asks for the score (`chat_protocol`, which puts an
empty line before the options of a Chinese question where these do not). The
type of a question is the one that its row gives, a key may be a letter or a number, and there may be two to ten options;
a row whose key fits none of its options is rejected, never filled up. Must not know files.
"""

import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase

from megatron_steel.data.sources import Broken, Rejected, optional, string
from megatron_steel.post.sft_data.examples import Example, Fields, asked

_LETTERS = ascii_uppercase[:10]
_ELSEWHERE = r"(?:请?详?见(?:解析|答案|解答|详解|分析))"
_NOTHING = re.compile(
    rf"[(（【\[]?\s*(?:解析|答案|解答)?\s*[:：]?\s*(?:略|无|暂无|null|None)?\s*[,，]?\s*[(（]?{_ELSEWHERE}?[)）]?\s*[)）】\]]?[.。]?"
)
_LEAST_DETAIL = 10  # characters: a shorter one explains nothing
_CONCLUSION = re.compile(
    r"(?:(?:因此|所以|综上所述|综上)[，,]?\s*(?:故|应|本题)?|[，,]?\s*(?:故|应|本题))(?:本题)?(?:应?选择?|(?:正确)?答案(?:为|是|选))\s*[:：]?\s*"
    r"[(（【]?\s*([A-J](?:[、,，\s和与及]*[A-J])*)(?![A-Za-z])[^\n。．.;；]*[。．.;；]?\s*\Z"
)
_ENGLISH = "The following is a multiple-choice question. Please choose the most suitable one among {} as the answer to this question."


def lettered(options: Sequence[str]) -> str:
    """One line an option: its letter, a full stop and its text."""
    return "".join(f"{letter}. {option}\n" for letter, option in zip(_LETTERS, options, strict=False))


def wanjuan_exam(row: Fields) -> Example:
    """q_main, option_a to option_e, std_ans, answer_detail, q_type; with an explanation where the row has one."""
    return _exam(row, explained=None)


def wanjuan_exam_explained(row: Fields) -> Example:
    """The same, always asked for the explanation first: for a reward, which needs the answer alone."""
    return _exam(row, explained=True)


def english_choice(row: Fields) -> Example:
    """OpenBookQA and ARC, as parquet (question_stem or question, choices{text, label}) or as the authors' JSON lines."""
    inner = row.get("question")
    if isinstance(inner, dict):  # the authors' files: {"question": {"stem", "choices": [{"text", "label"}]}}
        question, choices = string(inner, "stem"), inner.get("choices")
    else:
        question, choices = string(row, "question_stem" if "question_stem" in row else "question"), row.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    if not isinstance(choices, dict):
        raise Broken("'choices' is neither {text, label} nor a list of such")
    texts, labels = (_strings(choices.get(key), f"choices.{key}") for key in ("text", "label"))
    if len(texts) != len(labels):
        raise Broken(f"{len(texts)} choices with {len(labels)} labels")
    return _english(question, texts, _place(string(row, "answerKey"), labels))


def logiqa(row: Fields) -> Example:
    """LogiQA: text or context, question or query, options, and the key as answer, correct_option or label."""
    passage = string(row, "text" if "text" in row else "context")
    question = string(row, "question" if "question" in row else "query")
    options = _strings(row.get("options"), "options")
    key = next((row[name] for name in ("answer", "correct_option", "label") if row.get(name) is not None), None)
    if isinstance(key, bool) or not isinstance(key, (int, str)):
        raise Broken("none of 'answer', 'correct_option', 'label' holds a number or a letter")
    counted = [str(i) for i in range(len(options))]  # these sets count from 0
    labels = counted if str(key).isdigit() else list(_LETTERS[: len(options)].lower())
    return _english(f"context: {passage}\nquestion: {question}", options, _place(str(key).lower(), labels))


def _english(question: str, options: list[str], right: int) -> Example:
    options = [option.strip() for option in options]
    _check_options(options)
    if not question.strip():
        raise Rejected("empty question")
    letters = list(_LETTERS[: len(options)])
    head = _ENGLISH.format(f"{', '.join(letters[:-1])} and {letters[-1]}")
    prompt = f"{head}\n\n{question.strip()}\n{lettered(options)}"
    return asked(prompt, f"{letters[right]}. {options[right]}", answer=letters[right], options=tuple(options))


def _place(key: str, labels: list[str]) -> int:
    key = key.strip()
    if not key:
        raise Rejected("no answer")
    if labels.count(key) != 1:
        raise Rejected("answer is none of the options")
    return labels.index(key)


def _strings(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Broken(f"{name!r} is not a list of strings")
    return value


def _check_options(options: Sequence[str]) -> None:
    if not 2 <= len(options) <= len(_LETTERS):
        raise Rejected("fewer than two options" if len(options) < 2 else "more than ten options")
    if not all(options):
        raise Rejected("an empty option")
    if len(set(options)) < len(options):
        raise Rejected("two options alike")


def _exam(row: Fields, explained: bool | None) -> Example:
    question, answer = string(row, "q_main").strip(), string(row, "std_ans").strip()
    detail, kind = optional(row, "answer_detail").strip(), optional(row, "q_type").strip()
    options = _exam_options(row)
    if not question:
        raise Rejected("empty question")
    if _NOTHING.fullmatch(answer):
        raise Rejected("no answer")
    letters = ""
    if options or "选" in kind:
        letters = answer = _exam_letters(answer, options, question)
        kind = kind or ("单选题" if len(letters) == 1 else "多选题")
        if "单" in kind and len(letters) > 1:
            raise Rejected("several answers to a single choice")
    prompt = f"以下是一道{kind or '题'}:\n{question}\n{lettered(options)}"
    single = {"answer": letters, "options": tuple(options)} if len(letters) == 1 else {}
    detail = "" if _NOTHING.fullmatch(detail) else _without_conclusion(detail, letters)
    if explained is None and len(detail) < _LEAST_DETAIL:
        return asked(f"{prompt}请给出答案。\n", f"{answer}。{detail}" if detail else answer, **single)
    return asked(f"{prompt}请先给出解释再给出答案。\n", f"{detail}\n答案为{answer}", **single)


def _exam_options(row: Fields) -> list[str]:
    options = [optional(row, f"option_{letter}").strip() for letter in "abcde"]
    while options and not options[-1]:
        options.pop()
    for i, letter in enumerate(_LETTERS[: len(options)]):
        options[i] = re.sub(rf"\A{letter}\s*[.．、:：]\s*", "", options[i])
    if options:
        _check_options(options)
    return options


def _exam_letters(answer: str, options: list[str], question: str) -> str:
    """The key of a choice question as letters in order."""
    if not options and not all(re.search(rf"{letter}\s*[.．、:：)）]", question) for letter in "AB"):
        raise Rejected("no options")
    plain = unicodedata.normalize("NFKC", answer)
    found = re.fullmatch(r"[(【]?\s*([A-Ja-j](?:[、,;\s和与及]*[A-Ja-j])*)\s*[)】]?[.。]?", plain)
    if not found:
        raise Rejected("answer is not a letter")
    letters = "".join(sorted(set(re.findall("[A-J]", found[1].upper()))))
    if options and not set(letters) <= set(_LETTERS[: len(options)]):
        raise Rejected("answer is none of the options")
    return letters


def _without_conclusion(detail: str, letters: str) -> str:
    """The explanation without its own last words on the answer ("故选B。"), which must agree with the key."""
    kept, found = len(detail), _CONCLUSION.search(detail) if letters else None
    while found:  # "综上所述，答案为C，故选C。"
        if "".join(sorted(set(re.findall("[A-J]", found[1])))) != letters:
            raise Rejected("explanation and answer differ")
        kept, found = min(kept, found.start()), _CONCLUSION.search(detail, found.end(1))
    return detail[:kept].rstrip() if kept < len(detail) else detail
