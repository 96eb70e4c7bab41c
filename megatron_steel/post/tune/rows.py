"""DATA to rows: a folder of `sft-data`, or one jsonl file; every row that cannot be trained on is named.

    sft   {"messages": [{"role": ..., "content": ...}, ...]}
    dpo   {"prompt": [turns], "chosen": [one assistant turn], "rejected": [one assistant turn]}

Roles are system (the first turn only), user and assistant. Must not know tokenizers or models.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import SteelError

ROLES = ("system", "user", "assistant")
TRAIN, HELDOUT = "train.jsonl", "heldout.jsonl"
_NAMED = 5  # problems that a message spells out
_FORMS = {"sft": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
          "dpo": '{"prompt": [turns], "chosen": [{"role": "assistant", ...}], "rejected": [{"role": "assistant", ...}]}'}  # fmt: skip
_ELSEWHERE = (
    ("messages", "these rows are conversations: `megatron-steel sft` trains on them"),
    ("chosen", "these rows are preferences: `megatron-steel dpo` trains on them"),
    ("conversations", "ShareGPT rows: `megatron-steel sft-data` (type sharegpt) turns them into messages"),
    ("instruction", "Alpaca rows: `megatron-steel sft-data` (type alpaca) turns them into messages"),
    ("answer", "rows of `sft-data` for GRPO: docs/grpo.md says what trains on them"),
)


class _Unfit(Exception):  # noqa: N818  (a verdict on one row)
    """Why a row cannot be trained on."""


def data_files(data: str) -> dict[str, Path]:
    """{"train": file} and, where there is one, {"heldout": file}. Raises SteelError where DATA is neither folder nor jsonl."""
    path = Path(data)
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise SteelError(
            "there is no such data", path, "name a folder that `megatron-steel sft-data` wrote, or a jsonl file"
        )
    found = {side: path / name for side, name in (("train", TRAIN), ("heldout", HELDOUT)) if (path / name).is_file()}
    if "train" not in found:
        raise SteelError(
            f"the folder has no {TRAIN}", path, "name a folder that `megatron-steel sft-data` wrote, or a jsonl file"
        )
    if "heldout" in found and not _has_rows(found["heldout"]):
        dist.log.warning("%s has no rows: nothing is held out", found.pop("heldout"))
    return found


def _has_rows(file: Path) -> bool:
    with open(file, "rb") as lines:
        return any(line.strip() for line in lines)


def read_rows(file: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The rows of one file, in order, nothing but what is trained on.

    Args:
        kind: sft or dpo.

    Raises:
        SteelError: at the end of the file, naming the first unfit rows and how many there are; no row at all.
    """
    fit: Callable[[Any], dict[str, Any]] = _conversation if kind == "sft" else _preference
    problems: list[str] = []
    unfit = rows = 0
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                rows += 1
                try:
                    row = fit(_parsed(line))
                except _Unfit as verdict:
                    unfit += 1
                    if len(problems) < _NAMED:
                        problems.append(f"line {number}: {verdict}")
                    continue
                if not unfit:  # else nothing will be trained on: the rest is read for its problems alone
                    yield row
    except (OSError, UnicodeDecodeError) as error:
        raise SteelError(f"the file cannot be read: {error}", file, "give UTF-8 jsonl") from None
    if unfit:
        more = f"\n    and {unfit - len(problems):,} more" if unfit > len(problems) else ""
        told = "".join(f"\n    {problem}" for problem in problems)
        raise SteelError(f"{unfit:,} of {rows:,} rows cannot be trained on:{told}{more}", file,
                         f"a row is {_FORMS[kind]}; `megatron-steel sft-data` leaves unfit rows out and counts them")  # fmt: skip
    if not rows:
        raise SteelError("the file has no rows", file, "make it again with `megatron-steel sft-data`")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise _Unfit(f"not JSON: {error}") from None
    except RecursionError:
        raise _Unfit("not JSON: nested too deep") from None


def _conversation(row: Any) -> dict[str, Any]:
    messages = _turns(_column(row, "messages"), "messages")
    replies = [(place, turn["content"]) for place, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not replies:
        raise _Unfit("no assistant turn, so there is nothing to learn")
    silent = next((place for place, reply in replies if not reply.strip()), None)
    if silent is not None:  # its end mark would be learned: to answer nothing
        raise _Unfit(f"the assistant says nothing in messages[{silent}]")
    return {"messages": messages}


def _preference(row: Any) -> dict[str, Any]:
    prompt = _turns(_column(row, "prompt"), "prompt")
    if not any(turn["role"] == "user" for turn in prompt) or prompt[-1]["role"] == "assistant":
        raise _Unfit("the prompt does not end with what a user asks")
    read = {"prompt": prompt}
    for name in ("chosen", "rejected"):
        turns = _turns(_column(row, name), name)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise _Unfit(f"{name} is not one assistant turn")
        if not turns[0]["content"].strip():
            raise _Unfit(f"{name} is empty")
        read[name] = turns
    if read["chosen"] == read["rejected"]:
        raise _Unfit("chosen and rejected are the same")
    return read


def _column(row: Any, name: str) -> Any:
    if not isinstance(row, dict):
        raise _Unfit("not a JSON object")
    if name not in row:
        other = next((hint for column, hint in _ELSEWHERE if column in row), "")
        raise _Unfit(
            f"no {name!r}, it has {', '.join(map(repr, list(row)[:6])) or 'nothing'}" + (f" ({other})" if other else "")
        )
    return row[name]


def _turns(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _Unfit(f"{column} is not a list of turns")
    turns = []
    for place, turn in enumerate(value):
        if isinstance(turn, dict) and turn.get("tool_calls"):
            raise _Unfit(f"{column}[{place}] calls tools, which is not learned")
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise _Unfit(f"{column}[{place}] is not {{role, content}} with text")
        try:
            turn["content"].encode()
        except UnicodeEncodeError:
            raise _Unfit(f"{column}[{place}] holds half a character (a lone surrogate)") from None
        role = turn.get("role")
        if role not in ROLES:
            raise _Unfit(f"{column}[{place}] has the unknown role {role!r} (known: {', '.join(ROLES)})")
        if role == "system" and place:
            raise _Unfit(f"{column}[{place}] is a system turn that is not the first")
        turns.append({"role": role, "content": turn["content"]})
    return turns
