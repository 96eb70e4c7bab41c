"""The corpora of the field: what a row of each looks like, and the document or conversation that it holds.

One function a form, one table of names. `docs/prepare.md` says where each form is documented, and where and why a
rule differs from what Steel-LLM's own scripts do. Must not know files, templates, or what becomes of a document.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Fields = dict[str, Any]


class Rejected(Exception):  # noqa: N818  (a verdict on one row, counted by its reason)
    """The row is well formed and not wanted; the argument is the reason."""


class Broken(Exception):  # noqa: N818  (likewise)
    """The row is not of the corpus's form; the argument says how."""


@dataclass(frozen=True)
class Document:
    """One text. `whole`: as it stands in the corpus, every character kept; else put together from fields."""

    text: str
    whole: bool = True
    code: bool = False
    """NFKC would change what a program means."""


@dataclass(frozen=True)
class Conversation:
    """(role, content) of each turn: perhaps a system line, then user and assistant by turns, assistant last."""

    turns: list[tuple[str, str]]
    id: object = None
    """The corpus's own name for the row, where it does not stand under a key of its own."""


@dataclass(frozen=True)
class Source:
    """How to read one corpus."""

    read: Callable[[Fields], Document | Conversation]
    id_key: str = "id"
    """The key of the corpus's own name for a row, where it has one."""
    code: bool = False


def string(row: Fields, key: str) -> str:
    """A string of the row, null as an empty one. Raises Broken where the key is missing or holds something else."""
    if key not in row:
        raise Broken(f"no key {key!r} (it has: {', '.join(map(str, list(row)[:8])) or 'none'})")
    return optional(row, key)


def optional(row: Fields, key: str) -> str:
    """The same, a missing key as an empty string."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Broken(f"{key!r} holds a {type(value).__name__}, not a string")
    return value


def _objects(row: Fields, key: str) -> list[Fields]:
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Broken(f"{key!r} is not a list of objects")
    return value


def _inner(row: Fields, key: str) -> Fields:
    """An object of the row that may be missing, and may be written as a JSON string."""
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _plain(key: str, code: bool = False) -> Callable[[Fields], Document]:
    return lambda row: Document(string(row, key), code=code)


def _pair(question: str, answer: str) -> Conversation:
    return Conversation([("user", question), ("assistant", answer)])


def _wanjuan(row: Fields) -> Document:
    """`content`; an exam row has q_main, option_a to option_e, std_ans and answer_detail instead."""
    if "q_main" not in row:
        return Document(string(row, "content"))
    if not (question := string(row, "q_main").strip()):
        raise Rejected("empty")
    lines = [question]
    lines += [f"{key.upper()}. {option}" for key in "abcde" if (option := optional(row, f"option_{key}").strip())]
    answer, detail = (optional(row, key).strip() for key in ("std_ans", "answer_detail"))
    detail = "" if detail == "略" else detail
    if not answer and not detail:
        raise Rejected("no answer")
    lines += [f"{name}：{text}" for name, text in (("标准答案", answer), ("解析", detail)) if text]
    return Document("\n".join(lines), whole=False)


def _baike(row: Fields) -> Document:
    title, summary = string(row, "title").strip(), string(row, "summary").strip()
    sections = _objects(row, "sections") if row.get("sections") is not None else []
    lines = [f"{title}：{summary}" if summary else title]
    for section in sections:
        name, content = optional(section, "title").strip(), optional(section, "content").strip("\r\n")
        if content.strip():
            lines.append(f"{name}：{content}" if name else content)
    if not title or (not summary and len(lines) == 1):
        raise Rejected("empty")
    return Document("\n".join(lines), whole=False)


def _baidu_qa(row: Fields) -> Conversation:
    """The title is often the description's beginning, cut; then the description alone is the question."""
    title, more = string(row, "title").strip(), optional(row, "desc").strip()
    if more in title:  # an empty one, too
        return _pair(title, string(row, "answer"))
    return _pair(more if title in more else f"{title}\n{more}", string(row, "answer"))


def upvotes(text: str) -> int | None:
    """How many agreed: "赞同 1.5 万" is 15000, "赞同 2.3K" 2300, the bare "赞同" (Zhihu's for none) 0; else None."""
    found = re.fullmatch(
        r"(?:赞同)?\s*(?:(\d[\d,]*(?:\.\d+)?)\s*(万|亿|千|[kKwWmM])?)?\s*(?:人赞同|赞同)?", text.strip()
    )
    if not found or not text.strip():
        return None
    unit = {"万": 10**4, "w": 10**4, "亿": 10**8, "千": 1000, "k": 1000, "m": 10**6}.get((found[2] or "").lower(), 1)
    return round(float((found[1] or "0").replace(",", "")) * unit)


def _zhihu(min_upvotes: int) -> Callable[[Fields], Conversation]:
    def read(row: Fields) -> Conversation:
        question, answer, about = (string(row, key) for key in ("INSTRUCTION", "RESPONSE", "METADATA"))
        try:
            known = json.loads(about)
            votes = known["upvotes"] if isinstance(known["upvotes"], int) else upvotes(known["upvotes"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Broken("'METADATA' is not a JSON object with upvotes") from None
        if votes is None:
            raise Rejected("upvotes unreadable")
        if votes < min_upvotes:
            raise Rejected("few upvotes")
        return Conversation(_pair(question, answer).turns, known.get("url"))

    return read


def _with_input(row: Fields) -> str:
    question, more = string(row, "instruction"), optional(row, "input")
    return f"{question}\n{more}" if more.strip() else question


def _alpaca(row: Fields) -> Conversation:
    """instruction, input, output; perhaps system and history, a list of [question, answer]."""
    turns = [("system", system)] if (system := optional(row, "system")) else []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Broken("'history' is not a list of [question, answer]")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return Conversation([*turns, ("user", _with_input(row)), ("assistant", string(row, "output"))])


_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def _turns(list_key: str, role_key: str, content_key: str) -> Callable[[Fields], Conversation]:
    """A list of turns. One turn out of order rejects the row: pairing on would give a question a wrong answer."""

    def read(row: Fields) -> Conversation:
        turns = []
        for turn in _objects(row, list_key):
            if (role := _ROLES.get(string(turn, role_key))) is None:
                raise Rejected("unknown role")
            turns.append((role, string(turn, content_key)))
        if (system := optional(row, "system")) and (not turns or turns[0][0] != "system"):
            turns.insert(0, ("system", system))
        spoken = [role for role, _ in turns[1 if turns and turns[0][0] == "system" else 0 :]]
        if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
            raise Rejected("role order")
        return Conversation(turns)

    return read


_MOSS_BEFORE, _MOSS_BEHIND = re.compile(r"\s*<\|(?:Human|MOSS)\|>\s*[:：]?\s*"), re.compile(r"\s*<(?:eoh|eom)>\s*\Z")


def _moss(row: Fields) -> Conversation:
    """`conversation`, a list of {human, assistant}; MOSS's own markers around a text go."""
    turns = []
    for pair in _objects(row, "conversation"):
        for key, role in (("human", "user"), ("assistant", "assistant")):
            text = string(pair, key)
            begin = _MOSS_BEFORE.match(text)
            turns.append((role, _MOSS_BEHIND.sub("", text[begin.end() if begin else 0 :])))
    if not turns:
        raise Rejected("role order")
    return Conversation(turns)


_STARCODER_HEAD = re.compile(r"(?:<(?:reponame|filename|gh_stars)>[^\n<]*)+\n")


def _starcoder(row: Fields) -> Document:
    """Without the line of StarCoder's own control strings that stands before many files (columns hold the same)."""
    text = string(row, "content")
    head = _STARCODER_HEAD.match(text)
    return Document(text[head.end() if head else 0 :], code=True)


def _mnbvc(row: Fields) -> Document | Conversation:
    """A text in paragraphs, a question with its answer, a forum thread, code, or the old {text, meta}."""
    if "段落" in row:
        return _paragraphs(_objects(row, "段落"))
    if "问" in row:
        return _pair(string(row, "问"), string(row, "答"))
    if "回复" in row:
        replies = [string(reply, "回复") for reply in _objects(row, "回复")]
        return Document("\n".join(filter(str.strip, [string(row, "主题"), *replies])), whole=False)
    text = string(row, "text")
    if "仓库名" in row:
        return Document(text, code=True)
    if text.startswith("[{") and "内容" in text:  # the old form of some subsets: the paragraphs as a JSON string
        try:
            return _paragraphs(_objects({"段落": json.loads(text)}, "段落"))
        except (ValueError, RecursionError, Broken):
            pass
    return Document(text)


def _paragraphs(paragraphs: list[Fields]) -> Document:
    return Document("\n".join(string(paragraph, "内容") for paragraph in paragraphs), whole=False)


def _redpajama(row: Fields) -> Document:
    """Of the first version text, meta and red_pajama_subset; of the second raw_content."""
    if "text" not in row and "raw_content" in row:
        return Document(string(row, "raw_content"))
    code = row.get("red_pajama_subset") == "github" or _inner(row, "meta").get("source") == "github"
    return Document(string(row, "text"), code=code)


def _with_set(meta_key: str, code_set: str) -> Callable[[Fields], Document]:
    return lambda row: Document(string(row, "text"), code=_inner(row, "meta").get(meta_key) == code_set)


def _dolma(row: Fields) -> Document:
    name = str(row.get("source") or "").lower()
    return Document(string(row, "text"), code=any(part in name for part in ("stack-dedup", "the-stack", "starcoder")))


def source(name: str, min_upvotes: int = 100) -> Source | None:
    """The corpus of that name; None where there is none."""
    return _table(min_upvotes).get(name)


def names() -> list[str]:
    """Every corpus that `source` knows."""
    return list(_table(0))


def _table(min_upvotes: int) -> dict[str, Source]:
    return {
        "skypile": Source(_plain("text")),
        "wanjuan": Source(_wanjuan),
        "wiki-cn": Source(_plain("completion")),
        "baidu-baike": Source(_baike, "url"),
        "baidu-qa": Source(_baidu_qa, "qid"),
        "zhihu-kol": Source(_zhihu(min_upvotes)),
        "belle-2m": Source(lambda row: _pair(_with_input(row), string(row, "output"))),
        "belle-3.5m": Source(_turns("conversations", "from", "value")),
        "moss": Source(_moss, "conversation_id"),
        "firefly": Source(lambda row: _pair(string(row, "input"), string(row, "target"))),
        "starcoder": Source(_starcoder, code=True),
        "mnbvc": Source(_mnbvc),
        "redpajama": Source(_redpajama, "doc_id"),
        "slimpajama": Source(_with_set("redpajama_set_name", "RedPajamaGithub")),
        "pile": Source(_with_set("pile_set_name", "Github")),
        "dolma": Source(_dolma),
        "text": Source(_plain("text")),
        "messages": Source(_turns("messages", "role", "content")),
        "alpaca": Source(_alpaca),
        "sharegpt": Source(_turns("conversations", "from", "value")),
    }
