"""What a data set looks like: lengths, token frequency and a few documents, quickly and in bounded memory.

Small data is counted whole; of large data, stretches spread evenly over all of it are read, and the report says how much.
Must not know the byte format, runs or orders.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_steel.data import manifest
from megatron_steel.data.indexed import IndexedDataset, PathLike
from megatron_steel.data.reserve import published
from megatron_steel.data.tokenizer import Tokenizer
from megatron_steel.errors import SteelError

_MOST_DOCUMENTS, _MOST_TOKENS = 1 << 22, 1 << 23
"""What is looked at, at most: tens of MB of the index, and as many of the tokens."""
_STRETCHES = 256
_SHOWN, _SHOWN_TOKENS, _TOP = 4, 200, 20


@dataclass(frozen=True)
class Report:
    """`inspect PREFIX`. Plain values; shares are between 0 and 1."""

    facts: dict[str, Any]
    """Counts, sizes, digest, tokenizer: `manifest.describe`."""
    documents_counted: int
    lengths: dict[str, float]
    """Of the documents counted: mean, least, median, p90, p99, most (tokens, end of document included), empty (count)."""
    histogram: list[tuple[int, int]]
    """(shortest length of the bin, documents in it): 0, 1, 2 to 3, 4 to 7, ... tokens, from the first that has any."""
    tokens_counted: int
    vocabulary: int
    """Ids there could be: the tokenizer's, or up to the largest id seen."""
    distinct: int
    frequency: list[tuple[int, int, str]]
    """(id, times, text) of the most frequent ids; the text is empty without a tokenizer."""
    ranks: list[tuple[int, int]]
    """(rank from 1, times) of the ids by frequency, at ranks a few percent apart."""
    samples: list[tuple[int, int, str]]
    """(document number, its tokens, its beginning): documents spread over the data; ids without a tokenizer."""

    @property
    def vocabulary_used(self) -> float:
        return self.distinct / self.vocabulary

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"vocabulary_used": self.vocabulary_used}


def look(prefix: PathLike, tokenizer: Tokenizer | None = None) -> Report:
    """Read at most a few tens of MB of a data set. Raises SteelError as opening does, and for another tokenizer than its own."""
    facts = manifest.describe(prefix)
    own = facts.get("tokenizer fingerprint")
    if tokenizer and own not in (None, tokenizer.fingerprint):
        what = f"the data was made by another tokenizer ({facts['tokenizer name']}) than {tokenizer.name}"
        raise SteelError(what, prefix, "give the tokenizer that made it")
    with IndexedDataset(prefix) as data:
        stretches = _stretches(data.documents, _MOST_DOCUMENTS)
        lengths = np.concatenate([np.diff(data.document_starts(first, stop + 1)) for first, stop in stretches])
        tokens = np.concatenate([data.read(*stretch) for stretch in _stretches(data.tokens, _MOST_TOKENS)])
        numbers = sorted({round(i * (data.documents - 1) / (_SHOWN - 1)) for i in range(_SHOWN)})
        ids, times = np.unique(tokens, return_counts=True)
        if tokenizer and int(ids[-1]) >= tokenizer.vocab_size:
            what = f"the data holds id {ids[-1]}, and {tokenizer.name} has {tokenizer.vocab_size} ids"
            raise SteelError(what, prefix, "give the tokenizer that made it")
        samples = [_sample(data, number, tokenizer) for number in numbers]
    order = np.argsort(-times, kind="stable")
    top = [(int(ids[i]), int(times[i])) for i in order[:_TOP]]
    at = np.unique(np.geomspace(1, len(ids), 100).astype(np.int64))
    return Report(
        facts=facts,
        documents_counted=len(lengths),
        lengths=_summary(lengths),
        histogram=_histogram(lengths),
        tokens_counted=len(tokens),
        vocabulary=_vocabulary(facts, tokenizer, int(ids[-1])),
        distinct=len(ids),
        frequency=[(token, count, tokenizer.decode([token]) if tokenizer else "") for token, count in top],
        ranks=[(int(rank), int(times[order[rank - 1]])) for rank in at],
        samples=samples,
    )


def as_text(report: Report) -> str:
    """For the terminal."""
    facts = {key: value for key, value in report.facts.items() if value not in (None, [])}
    lines = [f"{key:26}{_plain(value)}" for key, value in facts.items()]
    lines += [
        "",
        f"document lengths in tokens, {_of(report.documents_counted, report.facts['documents'], 'documents')}",
    ]
    lines += ["  " + ", ".join(f"{key} {_plain(value)}" for key, value in report.lengths.items())]
    most = max(count for _, count in report.histogram)
    for (low, count), (above, _) in zip(report.histogram, [*report.histogram[1:], (0, 0)], strict=True):
        name = f"{low:,}" if low < 2 else f"{low:,} to {(above or 2 * low) - 1:,}"
        lines.append(f"  {name:>24} {count:>13,} {'#' * round(40 * count / most)}")
    lines += ["", f"token frequency, {_of(report.tokens_counted, report.facts['tokens'], 'tokens')}: {report.distinct:,} of "
              f"{report.vocabulary:,} ids are used ({report.vocabulary_used:.1%})"]  # fmt: skip
    lines += [f"  {token:>8} {count / report.tokens_counted:>8.3%}  {text!r}" if text else
              f"  {token:>8} {count / report.tokens_counted:>8.3%}" for token, count, text in report.frequency]  # fmt: skip
    for number, length, text in report.samples:
        lines += ["", f"document {number:,} (counted from 0), {length:,} tokens:", text]
    return "\n".join(lines)


def draw(report: Report, file: PathLike) -> None:
    """A PNG of two panels: how long documents are, and how often ids occur by rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.bar([f"{low:,}" for low, _ in report.histogram], [count for _, count in report.histogram], width=0.9)
    left.set(xlabel="tokens, from", ylabel="documents",
             title=f"document lengths: {_of(report.documents_counted, report.facts['documents'], 'documents')}")  # fmt: skip
    left.tick_params(axis="x", rotation=60)
    right.loglog(*zip(*report.ranks, strict=True))
    right.set(xlabel="rank of the id", ylabel="times",
              title=f"{report.distinct:,} of {report.vocabulary:,} ids: {_of(report.tokens_counted, report.facts['tokens'], 'tokens')}")  # fmt: skip
    right.grid(alpha=0.3)
    with published(file) as aside:
        figure.savefig(aside, format="png", dpi=110)


def _stretches(count: int, most: int) -> Iterator[tuple[int, int]]:
    """All of range(count), or ranges of it that lie evenly and have `most` numbers together."""
    if count <= most:
        yield 0, count
        return
    width = most // _STRETCHES
    for i in range(_STRETCHES):
        start = i * (count - width) // (_STRETCHES - 1)
        yield start, start + width


def _sample(data: IndexedDataset, number: int, tokenizer: Tokenizer | None) -> tuple[int, int, str]:
    start, stop = data.document_starts(number, number + 2).tolist()
    ids = data.read(start, min(stop, start + _SHOWN_TOKENS)).tolist()
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
    return number, stop - start, text + (" [...]" if stop - start > len(ids) else "")


def _summary(lengths: npt.NDArray[np.int64]) -> dict[str, float]:
    median, p90, p99 = np.quantile(lengths, [0.5, 0.9, 0.99], method="higher").tolist()
    return {
        "mean": round(float(lengths.mean()), 1), "least": int(lengths.min()), "median": median, "p90": p90, "p99": p99,
        "most": int(lengths.max()), "empty": int((lengths == 0).sum()),
    }  # fmt: skip


def _histogram(lengths: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    # Of a float the exponent is the number of bits, exact for any length that a document can have.
    bins = np.bincount(np.frexp(lengths.astype(np.float64))[1])
    first = int(np.flatnonzero(bins)[0])
    return [(2 ** (bits - 1) if bits else 0, int(bins[bits])) for bits in range(first, len(bins))]


def _vocabulary(facts: dict[str, Any], tokenizer: Tokenizer | None, largest: int) -> int:
    known = tokenizer.vocab_size if tokenizer else facts.get("tokenizer vocab_size", 0)
    return max(known, largest + 1)


def _of(counted: int, there: int, what: str) -> str:
    return f"all {there:,} {what}" if counted == there else f"{counted:,} of {there:,} {what}, evenly spread"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int | float) else str(value)
