"""A bundle of units of the input to one part: small data sets (training, validation) and a report, on disk.

The report is written last and makes the part finished; a part does not depend on who made it or when.
Must not know the byte format, other bundles, or processes.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_steel.data import readers
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter, best_dtype
from megatron_steel.data.tokenizer import Tokenizer
from megatron_steel.errors import SteelError

_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 512
_NAMED_PROBLEMS = 5
KINDS = ("training", "validation")


@dataclass
class Outcome:
    """What became of one unit."""

    rows: int = 0
    empty: int = 0
    malformed: int = 0
    numbered: int = 0
    """The last row number of the unit: where the numbers of the file's next unit start from."""
    training: int = 0
    validation: int = 0
    """Documents of each kind."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """Row number within the unit, and what is wrong with it, for the first few."""


@dataclass(frozen=True)
class Job:
    """What is the same for every bundle."""

    folder: str
    text_key: str
    validation_ratio: float


def make(item: tuple[int, list[readers.Unit], Job], tokenizer: Tokenizer) -> list[Outcome]:
    """Tokenize bundle number `item[0]` into its part. Raises SteelError: a file is broken; OSError: the disk."""
    number, bundle, job = item
    outcomes, dtype = [Outcome() for _ in bundle], best_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        writers: dict[str, IndexedWriter] = {}
        for outcome, texts in _batches(bundle, job, outcomes):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                kind = _kind(text, job.validation_ratio)
                if kind not in writers:
                    writers[kind] = stack.enter_context(IndexedWriter(prefix(job, number, kind), dtype))
                writers[kind].add_document([*ids, tokenizer.eos_id])
                setattr(outcome, kind, getattr(outcome, kind) + 1)
    report = _report(job, number)
    aside = report.with_suffix(".partial")
    aside.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    os.replace(aside, report)
    return outcomes


def finished(job: Job, number: int) -> list[Outcome] | None:
    """The report of a part that an earlier attempt finished; None where there is none that is whole."""
    try:
        outcomes = [Outcome(**tree) for tree in json.loads(_report(job, number).read_text())]
        for kind in KINDS:
            if count := documents(outcomes, kind):
                with IndexedDataset(prefix(job, number, kind)) as data:
                    if data.documents != count:
                        return None
    except (OSError, ValueError, TypeError, SteelError):
        return None
    return outcomes


def documents(outcomes: list[Outcome], kind: str) -> int:
    """How many documents of that kind are in the units."""
    return sum(getattr(outcome, kind) for outcome in outcomes)


def prefix(job: Job, number: int, kind: str) -> str:
    """Where the part's data set of that kind lies (there is none for 0 documents)."""
    return f"{job.folder}/{number:06d}-{kind}"


def _report(job: Job, number: int) -> Path:
    return Path(f"{job.folder}/{number:06d}.json")


def _batches(bundle: list[readers.Unit], job: Job, outcomes: list[Outcome]) -> Iterator[tuple[Outcome, list[str]]]:
    """Texts in batches of bounded size, each from one unit; counts every row on the way."""
    for unit, outcome in zip(bundle, outcomes, strict=True):
        texts: list[str] = []
        characters = 0
        for row in readers.rows(unit, job.text_key):
            _count(row, outcome)
            if not row.text:
                continue
            texts.append(row.text)
            characters += len(row.text)
            if characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
                yield outcome, texts
                texts, characters = [], 0
        yield outcome, texts


def _count(row: readers.Row, outcome: Outcome) -> None:
    outcome.numbered = row.number
    outcome.rows += bool(row.problem) or row.text is not None
    outcome.empty += row.text == ""
    if row.problem:
        outcome.malformed += 1
        if len(outcome.problems) < _NAMED_PROBLEMS:
            outcome.problems.append((row.number, row.problem))


def _kind(text: str, validation_ratio: float) -> str:
    if not validation_ratio:
        return "training"
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return "validation" if draw < validation_ratio * 2**64 else "training"
