"""Does a text hold questions of a benchmark? Overlap of runs of words, as GPT-3's appendix C counts it.

1. Text becomes units: NFKC, case folded, punctuation gone; a unit is a word, or one Chinese character or kana.
2. A text is contaminated when it shares with a question a run of 13 words (the 13-gram of GPT-3), or of 20 Chinese
   characters (13 words say about as much as 20 characters), or a mixture in proportion. A question shorter than that
   counts when all of it is there and it has at least 8 words (GPT-3's least n) or 12 characters; one even shorter is
   joined with its labelled options, and where that is short too it is counted as unmatchable.
3. Runs are found from anchors: eight units from every sixth place of each question. Any run that counts holds one, so
   nothing is missed; around a hit the run is extended as far as both agree. Memory grows with the benchmarks alone.

Must not know corpora, templates, or what is done with a contaminated text.
"""

import csv
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel.data import readers
from megatron_steel.errors import SteelError

_WORDS, _CHARACTERS = 13, 20
_ANCHOR, _STRIDE = 8, 6  # a run of 13 units holds all of an anchor: 8 + 6 - 1
_LEAST_SHARE = 0.6  # of a run that counts: 8 of 13 words, 12 of 20 characters
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_RUN = re.compile(rf"([{_CJK}]+)|([^\W_{_CJK}]+)")  # of characters, or a word
_IS_CJK = re.compile(rf"[{_CJK}]")
_QUESTION_KEYS = ("question", "Question", "problem", "prompt", "query", "instruction", "input", "text")
_OPTION_KEYS = ("options", "choices", "endings")


@dataclass(frozen=True)
class Item:
    """One question: where it is from and its units."""

    file: int
    number: int
    """From 1 within the file."""
    units: tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """An item that a text holds, and the run that they share."""

    item: int
    run: str


class Matcher:
    """Finds benchmark items in texts.

    Attributes:
        files: the names of the benchmark files. items: every question that can be matched.
        counts: questions in each file. unmatchable: those of each file that are too short.
    """

    def __init__(self, paths: Iterable[str]):
        self.files: list[str] = []
        self.items: list[Item] = []
        self.counts: list[int] = []
        self.unmatchable: list[int] = []
        self._anchors: dict[str, list[tuple[int, int]]] = {}
        for name, path in _files(paths):
            self.files.append(name)
            self.counts.append(0)
            self.unmatchable.append(0)
            for number, (question, options) in enumerate(_questions(path), 1):
                self._add(number, question, options)

    def _add(self, number: int, question: str, options: list[str]) -> None:
        self.counts[-1] += 1
        units = _units(question)
        content = _weight(units)
        if content < _LEAST_SHARE:
            labelled = zip("ABCDEFGHIJ", options, strict=False)
            units = _units(f"{question} {' '.join(f'{label} {text}' for label, text in labelled)}")
            content = _weight(_units(" ".join([question, *options])))  # labels say nothing
        if content < _LEAST_SHARE or len(units) < _ANCHOR:
            self.unmatchable[-1] += 1
            return
        for at, anchor in enumerate(_anchors(units)):
            if at % _STRIDE == 0:
                self._anchors.setdefault(anchor, []).append((len(self.items), at))
        self.items.append(Item(len(self.files) - 1, number, tuple(units)))

    def find(self, text: str) -> list[Hit]:
        """Every item that `text` holds, in the order of the items."""
        units = _units(text)
        anchors = _anchors(units)
        if self._anchors.keys().isdisjoint(anchors):  # nearly always
            return []
        found: dict[int, str] = {}
        for at, anchor in enumerate(_anchors(units)):
            for item, place in self._anchors.get(anchor, ()):
                if item not in found and (run := self._run(units, at, item, place)):
                    found[item] = " ".join(run)
        return [Hit(item, found[item]) for item in sorted(found)]

    def _run(self, units: list[str], at: int, item: int, place: int) -> list[str]:
        """The longest run around an anchor that both share; empty where it does not count."""
        theirs = self.items[item].units
        left, right = 0, _ANCHOR
        while min(at, place) > left and units[at - left - 1] == theirs[place - left - 1]:
            left += 1
        while at + right < len(units) and place + right < len(theirs) and units[at + right] == theirs[place + right]:
            right += 1
        run = units[at - left : at + right]
        return run if len(run) == len(theirs) or _weight(run) >= 1 else []


def _units(text: str) -> list[str]:
    units: list[str] = []
    for characters, word in _RUN.findall(unicodedata.normalize("NFKC", text).casefold()):
        if characters:
            units.extend(characters)
        else:
            units.append(word)
    return units


def _anchors(units: list[str]) -> Iterator[str]:
    """Every run of eight units, each with a space behind it."""
    ends = [0, *itertools.accumulate(map((1).__add__, map(len, units)))]
    return map(f"{' '.join(units)} ".__getitem__, map(slice, ends, ends[_ANCHOR:]))


def _weight(units: Iterable[str]) -> float:
    """Of a run: 1 for 13 words or 20 characters."""
    return sum(1 / (_CHARACTERS if _IS_CJK.match(unit) else _WORDS) for unit in units) + 1e-9


def _files(paths: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(name, path) of every benchmark file, folders searched to the bottom, in the order of names."""
    for path in map(Path, paths):
        if path.is_dir():
            known = (".csv", ".jsonl", ".json", ".parquet")
            inner = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in known)
            if not inner:
                raise SteelError("the folder holds no benchmark", path, f"known are {', '.join(known)}")
            yield from ((str(file.relative_to(path)), file) for file in inner)
        elif path.is_file():
            yield path.name, path
        else:
            raise SteelError("there is no such benchmark file or folder", path, "name a file or a folder of files")


def _questions(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(question, options) of each row of a file."""
    if path.suffix.lower() == ".csv":
        yield from _of_csv(path)
        return
    for unit in readers.units(path, 1 << 40):
        for record in readers.records(unit):
            if record.problem:
                raise SteelError(f"row {record.number}: {record.problem}", path, "mend it: every question counts")
            if record.fields is not None:
                yield _of_fields(record.fields, path)


def _of_fields(fields: dict[str, Any], path: Path) -> tuple[str, list[str]]:
    for key in _QUESTION_KEYS:
        if isinstance(question := fields.get(key), str):
            break
    else:
        what = f"a row has no question (its keys: {', '.join(map(str, list(fields)[:8]))})"
        raise SteelError(what, path, f"name it {' or '.join(_QUESTION_KEYS)}")
    options = next((fields[key] for key in _OPTION_KEYS if key in fields), None)
    if isinstance(options, dict):  # {"text": [...], "label": [...]} of ARC, or {"A": ...}
        options = options["text"] if isinstance(options.get("text"), list) else list(options.values())
    if not isinstance(options, list):
        options = [fields[label] for label in "ABCDEFGHIJ" if label in fields]
    return question, [str(option) for option in options]


def _of_csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    """C-Eval and CMMLU name their columns (question, A, B, C, D, answer); MMLU has these six without a heading."""
    try:
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SteelError(f"the file cannot be read: {error}", path, "give a CSV file in UTF-8") from None
    rows = [row for row in rows if row]
    heading = [name.strip().lower() for name in rows[0]] if rows else []
    if "question" in heading:
        at = heading.index("question")
        columns = [heading.index(label) for label in "abcdefghij" if label in heading]
        rows = rows[1:]
    elif rows and len(rows[0]) == 6:
        at, columns = 0, [1, 2, 3, 4]
    else:
        remedy = "a heading with question, A, B, C, D, or six columns without one: question, A, B, C, D, answer"
        raise SteelError("the columns of this CSV file are not known", path, remedy)
    for number, row in enumerate(rows, 1):
        if len(row) <= max([at, *columns]):
            raise SteelError(f"row {number} has {len(row)} columns, too few", path, "mend it: every question counts")
        yield row[at], [row[column] for column in columns]
