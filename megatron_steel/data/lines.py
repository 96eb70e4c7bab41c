"""Rows of a corpus to lines of prepared text: normalised, judged, control strings made harmless, templated.

The order matters: content is cleaned and judged before it gets a template, so no rule ever touches a turn marker; and
control strings are looked for after NFKC, which can make one out of full-width characters. Must not know where units
come from or what becomes of lines.
"""

import json
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megatron_steel.data import chatml, readers, sources
from megatron_steel.data.decontaminate import Matcher
from megatron_steel.errors import SteelError

_LEAST_CHARACTERS = 20
_NAMED = 5
EXAMPLES = 3
"""Of the items of a benchmark file that were found."""


@dataclass(frozen=True)
class Settings:
    """What decides the output, beside the input."""

    source: str
    tokenizer: str | None = None
    nfkc: bool = False
    min_upvotes: int = 100
    benchmarks: tuple[str, ...] = ()
    remove_contaminated: bool = False


@dataclass
class Counts:
    """What became of some rows."""

    rows: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    broken: int = 0
    control_strings: int = 0
    """Made harmless in rows that were kept."""
    rows_with_control_strings: int = 0
    contaminated: int = 0
    hits: Counter[int] = field(default_factory=Counter)
    """Rows that hold a benchmark's item, by item."""
    examples: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Of the first few items of each benchmark file: the first row that holds it and the shared run."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """Row number and what is wrong with it, for the first few."""

    def add(self, other: "Counts") -> None:
        for key, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, key, getattr(self, key) + value)
        self.rejected.update(other.rejected)
        self.hits.update(other.hits)
        self.problems = (self.problems + other.problems)[:_NAMED]


class Maker:
    """Rows to lines of the output; one in each process."""

    def __init__(self, settings: Settings):
        found = sources.source(settings.source, settings.min_upvotes)
        if found is None:
            known = ", ".join(sources.names())
            raise SteelError(f"there is no source {settings.source!r}", "prepare SOURCE", f"known are {known}")
        if settings.nfkc and found.code:
            remedy = "leave --nfkc out: it changes what programs mean"
            raise SteelError("NFKC is not for code", f"prepare {settings.source}", remedy)
        self._settings, self._source = settings, found
        self._format = chatml.load_format(settings.tokenizer)
        self._clean = chatml.harmless(self._format.control)
        self.matcher = Matcher(settings.benchmarks) if settings.benchmarks else None

    def facts(self) -> dict[str, Any]:
        """For the report."""
        template = {"template": self._format.name, "control": list(self._format.control)}
        return {key: getattr(self._settings, key) for key in ("nfkc", "min_upvotes")} | template

    def line(self, row: readers.Record, place: dict[str, Any], counts: Counts) -> bytes:
        """The output's line for a row. Raises sources.Rejected and sources.Broken."""
        fields = row.fields or {}
        made = self._source.read(fields)
        if isinstance(made, sources.Document):
            text, marks = self._document(made)
            name = None
        else:
            text, marks = self._conversation(made)
            name = made.id
        self._check_benchmarks(made, place["row"], counts)
        name = _name(fields.get(self._source.id_key) if name is None else name)
        tree = {"text": text, **place} | ({} if name is None else {"id": name})
        try:
            line = json.dumps(tree, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:
            raise sources.Broken("holds half a character (a lone surrogate)") from None
        counts.control_strings += marks
        counts.rows_with_control_strings += bool(marks)
        return line

    def _document(self, made: sources.Document) -> tuple[str, int]:
        text = made.text if made.whole else _newlines(made.text)
        text = text if made.code else self._normal(text)
        _check_length([text], "empty")
        return self._harmless(text)

    def _conversation(self, made: sources.Conversation) -> tuple[str, int]:
        turns, marks = [], 0
        for role, content in made.turns:
            content, count = self._harmless(self._normal(_newlines(content)))
            turns.append((role, content))
            marks += count
        _check_length([content for role, content in turns if role != "system"], "empty turn")
        try:
            return self._format.render(turns), marks
        except chatml.TemplateRefused:
            raise sources.Rejected("template refused it") from None

    def _harmless(self, text: str) -> tuple[str, int]:
        text, marks = self._clean(text)
        if self._format.forged(text):
            raise sources.Rejected("disguised control string")
        return text, marks

    def _normal(self, text: str) -> str:
        return unicodedata.normalize("NFKC", text) if self._settings.nfkc else text

    def _check_benchmarks(self, made: sources.Document | sources.Conversation, row: int, counts: Counts) -> None:
        if self.matcher is None:
            return
        contents = [made.text] if isinstance(made, sources.Document) else [content for _, content in made.turns]
        hits = self.matcher.find("\n".join(contents))
        for hit in hits:
            counts.hits[hit.item] += 1
            if hit.item not in counts.examples and self.matcher.among(counts.examples, hit.item) < EXAMPLES:
                counts.examples[hit.item] = (row, hit.run)
        counts.contaminated += bool(hits)
        if hits and self._settings.remove_contaminated:
            raise sources.Rejected("contaminated")


def make(item: tuple[readers.Unit, int, dict[str, str], str], maker: Maker) -> Counts:
    """One unit to its part `item[3]`; row numbers go on from `item[1]`, `item[2]` says where rows are from. Raises SteelError where the file is broken."""
    unit, before, origin, part = item
    counts = Counts()
    with open(part, "wb") as file:
        for row in readers.records(unit):
            if row.fields is None and not row.problem:
                continue  # an empty line
            counts.rows += 1
            number = before + row.number
            try:
                if row.problem:
                    raise sources.Broken(row.problem)
                file.write(maker.line(row, {**origin, "row": number}, counts))
                counts.kept += 1
            except sources.Rejected as verdict:
                counts.rejected[str(verdict)] += 1
            except sources.Broken as verdict:
                counts.broken += 1
                if len(counts.problems) < _NAMED:
                    counts.problems.append((number, str(verdict)))
    return counts


def _check_length(contents: list[str], empty: str) -> None:
    sizes = [len(content.strip()) for content in contents]
    if not all(sizes):
        raise sources.Rejected(empty)
    if sum(sizes) < _LEAST_CHARACTERS:
        raise sources.Rejected("short")


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _name(value: object) -> str | int | None:
    """The corpus's own name for a row, where it is one that JSON can hold."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return value if value.isprintable() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
