"""A bundle of units of the input to one part: small data sets (training, validation) and a report, on disk.

The report is written last and makes the part finished; a part does not depend on who made it or when.
Pairs go through as texts do, prompt, response, prompt, response: a pair is one document of two sequences, each with the
end of document behind it, and stays out where either is empty. Must not know the byte format, other bundles, or processes.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_steel.data import readers
from megatron_steel.data.encoders import Encoder
from megatron_steel.data.indexed import IndexedDataset, IndexedWriter, best_dtype
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
    short: int = 0
    """Documents with text, left out for having fewer characters or tokens than the job keeps."""
    special: int = 0
    """Documents that hold a special string of the tokenizer, written out."""
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
    min_tokens: int = 0
    """Of a document that is kept, without the end of document."""
    min_chars: int = 0
    pair_keys: tuple[str, str] | None = None
    """Of prompt and response, instead of `text_key`."""

    @property
    def keys(self) -> str:
        return " and ".join(self.pair_keys or (self.text_key,))

    @property
    def each(self) -> int:
        """Texts of a document."""
        return 2 if self.pair_keys else 1


def make(item: tuple[int, list[readers.Unit], Job], encoder: Encoder) -> list[Outcome]:
    """Tokenize bundle number `item[0]` into its part. Raises SteelError: a file is broken; OSError: the disk."""
    number, bundle, job = item
    outcomes, dtype = [Outcome() for _ in bundle], best_dtype(encoder.vocab_size)
    with contextlib.ExitStack() as stack:
        writers: dict[str, IndexedWriter] = {}
        for outcome, texts in _batches(bundle, job, outcomes):
            ids, lengths = encoder(texts)
            least, whole = (f(lengths.reshape(-1, job.each), axis=1) for f in (np.min, np.sum))
            outcome.special += encoder.special(ids, whole)
            outcome.empty += int(np.count_nonzero(least == 0))  # there is text, but nothing that the tokenizer keeps
            outcome.short += int(np.count_nonzero((least > 0) & (whole < job.min_tokens)))
            for kind, chosen in _sides(texts[:: job.each], (least > 0) & (whole >= job.min_tokens), job):
                if kind not in writers:
                    writers[kind] = stack.enter_context(IndexedWriter(prefix(job, number, kind), dtype))
                ended = _ended(ids, lengths, np.repeat(chosen, job.each), encoder.eos_id, dtype)
                writers[kind].add_documents(*ended, sequences_each=job.each)
                setattr(outcome, kind, getattr(outcome, kind) + int(np.count_nonzero(chosen)))
    report = _report(job, number)
    aside = report.with_suffix(".partial")
    aside.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    os.replace(aside, report)
    return outcomes


def _sides(texts: list[str], kept: npt.NDArray[np.bool_], job: Job) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Which of the documents that are kept are for training and which for validation, by their (first) text; a side without
    any is left out."""
    held = np.zeros(len(texts), bool)
    if job.validation_ratio:
        held = np.array([_held_out(text, job.validation_ratio) for text in texts], bool)
    for kind, chosen in (("training", kept & ~held), ("validation", kept & held)):
        if chosen.any():
            yield kind, chosen


def _ended(
    ids: npt.NDArray[Any],
    lengths: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.bool_],
    eos_id: int,
    dtype: npt.DTypeLike,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The chosen documents' ids, each with the end of document behind its last, and their new lengths."""
    if not chosen.all():
        ids, lengths = ids[np.repeat(chosen, lengths)], lengths[chosen]
    ends = np.cumsum(lengths + 1) - 1
    is_text = np.ones(len(ids) + len(lengths), bool)
    is_text[ends] = False
    out = np.empty(len(is_text), dtype)
    out[is_text], out[ends] = ids, eos_id
    return out, lengths + 1


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
    """Texts of whole documents in batches of bounded size, each from one unit; counts every row on the way."""
    for unit, outcome in zip(bundle, outcomes, strict=True):
        texts: list[str] = []
        characters = 0
        found = (
            readers.pairs(unit, job.pair_keys) if job.pair_keys else ((r,) for r in readers.rows(unit, job.text_key))
        )
        for rows in found:
            _count(next((row for row in rows if not row.text), rows[0]), outcome)
            document = [row.text for row in rows if row.text]
            if len(document) < len(rows):
                continue
            size = sum(map(len, document))
            if size < job.min_chars:
                outcome.short += 1
                continue
            texts += document
            characters += size
            if characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
                yield outcome, texts
                texts, characters = [], 0
        if texts:
            yield outcome, texts


def _count(row: readers.Row, outcome: Outcome) -> None:
    outcome.numbered = row.number
    outcome.rows += bool(row.problem) or row.text is not None
    outcome.empty += row.text == ""
    if row.problem:
        outcome.malformed += 1
        if len(outcome.problems) < _NAMED_PROBLEMS:
            outcome.problems.append((row.number, row.problem))


def _held_out(text: str, validation_ratio: float) -> bool:
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return draw < validation_ratio * 2**64
