"""Files of a corpus to one jsonl file of texts with their provenance, every row accounted for.

1. Inputs are cut into units (`data.readers`); each row becomes a document or a conversation (`data.sources`).
2. Worker processes write one part a unit (`data.lines`: normalise, judge, make control strings harmless, template).
3. Parts are joined in the order of the input: the same bytes for any number of workers. Output and report are written
   aside and renamed.

A row is kept, rejected (well formed and not wanted, by reason) or broken (not of the corpus's form); the three are
all rows, and that is checked. Must not know the corpora's forms, templates or benchmarks.
"""

import contextlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_steel.data import parallel, readers
from megatron_steel.data.decontaminate import Matcher
from megatron_steel.data.indexed import PathLike
from megatron_steel.data.lines import EXAMPLES, Counts, Maker, Settings, make
from megatron_steel.data.reserve import reserved, sha256
from megatron_steel.errors import SteelError

log = logging.getLogger("megatron_steel")
_UNIT_BYTES = 16 << 20
_HOPELESS_ROWS, _NAMED = 10, 5
_SECONDS_BETWEEN_LINES = 10.0


def prepare(
    source: str,
    inputs: Sequence[PathLike],
    output: PathLike,
    tokenizer: PathLike | None = None,
    nfkc: bool = False,
    min_upvotes: int = 100,
    decontaminate: Sequence[PathLike] = (),
    remove_contaminated: bool = False,
    workers: int | None = None,
    max_malformed_ratio: float = 0.001,
    max_reject_ratio: float = 1.0,
) -> dict[str, Any]:
    """Write the texts of `inputs` to `output` (.jsonl) and a report beside it; returns the report.

    Args:
        source: a name of `data.sources`.
        inputs: .jsonl, .json, .txt (each also .gz, .zst) and .parquet files; rows keep their order.
        tokenizer: a Hugging Face folder whose chat template and special tokens are used; by default ChatML.
        nfkc: fold compatibility characters; refused for code, and rows of code in other corpora stay as they are.
        min_upvotes: of an answer, for zhihu-kol.
        decontaminate: benchmark files or folders; rows that hold their questions are reported.
        remove_contaminated: such rows are rejected.
        workers: processes; by default one for each CPU that this process may use.
        max_malformed_ratio: fail when more than this share of the rows is broken; at once when the rows of a unit,
            ten or more, all are.
        max_reject_ratio: fail when more than this share of the rows is rejected.

    Raises:
        SteelError: bad argument, input, tokenizer or benchmark; too many broken or rejected rows; nothing to keep.
            Nothing is published then, and an earlier output stays.
    """
    output = Path(output)
    _check_arguments(inputs, output, max_malformed_ratio, max_reject_ratio, workers)
    where = tuple(os.path.abspath(path) for path in decontaminate)
    if remove_contaminated and not where:
        raise SteelError("there is no benchmark to compare with", "--remove-contaminated", "give --decontaminate")
    path = None if tokenizer is None else os.path.abspath(tokenizer)
    settings = Settings(source, path, nfkc, min_upvotes, where, remove_contaminated)
    maker = Maker(settings)
    folder = Path(f"{output}.parts")
    try:
        with reserved(output):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                report = _Report(output, max_malformed_ratio, max_reject_ratio)
                units = [unit for path in inputs for unit in readers.units(path, _UNIT_BYTES)]
                whole = folder / "output"
                with open(whole, "wb") as file:
                    _join(units, maker, settings, workers or parallel.cpus(), file, report)
                tree = report.finish(settings, maker, inputs, whole)
                _publish(whole, output, tree)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:  # a full disk, say
        raise SteelError(f"cannot write: {error.strerror or error}", output, "mend it and repeat") from None
    return tree


def table(report: dict[str, Any]) -> str:
    """The report as a few lines of text."""
    lines = [("rows", report["rows"]), ("kept", report["kept"])]
    lines += [(f"rejected: {reason}", count) for reason, count in report["rejected"].items()]
    lines += [
        ("broken", report["broken"]),
        ("rows with control strings, made harmless", report["rows_with_control_strings"]),
    ]
    if "benchmarks" in report:
        lines.append(("rows that hold benchmark items", report["contaminated"]))
        found = [entry for entry in report["benchmarks"] if entry["items_found"]]
        lines += [(f"  {entry['file']}: items found, of {entry['items']:,}", entry["items_found"]) for entry in found]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {count:>12,}" for name, count in lines)


def _join(
    units: list[readers.Unit], maker: Maker, settings: Settings, workers: int, file: IO[bytes], report: "_Report"
) -> None:
    items, todo = itertools.tee(_items(units, settings.source, os.path.dirname(file.name)))
    results: Generator[Counts, None, None]
    if min(workers, len(units)) <= 1:
        results = (make(item, maker) for item in todo)
    else:
        results = parallel.in_order(make, todo, min(workers, len(units)), Maker, settings)
    with contextlib.closing(results):
        for counts, item in zip(results, items, strict=True):
            report.add(item[0], counts, maker.matcher)
            with open(item[3], "rb") as part:
                shutil.copyfileobj(part, file, 1 << 20)
            os.unlink(item[3])
    file.flush()
    os.fsync(file.fileno())


def _items(
    units: list[readers.Unit], source: str, folder: str
) -> Iterator[tuple[readers.Unit, int, dict[str, str], str]]:
    names = readers.names(list(dict.fromkeys(unit.path for unit in units)))
    before = 0
    for i, unit in enumerate(units):
        same = i > 0 and units[i - 1].path == unit.path
        before = before + readers.numbers(units[i - 1]) if same else 0
        yield unit, before, {"source": source, "file": names[unit.path]}, os.path.join(folder, f"{i:06d}")


def _check_arguments(
    inputs: Sequence[PathLike], output: Path, malformed: float, reject: float, workers: int | None
) -> None:
    readers.check_inputs(inputs, output)
    if output.suffix != ".jsonl" or output.is_dir():
        raise SteelError("the output is one .jsonl file", output, "give FOLDER/NAME.jsonl")
    if os.path.realpath(output) in map(os.path.realpath, inputs):
        raise SteelError("the output is also an input", output, "choose another output")
    if workers is not None and workers < 1:
        raise SteelError(f"{workers} worker processes can do nothing", output, "give 1 or more")
    for value in (malformed, reject):
        if not 0 <= value <= 1:
            raise SteelError(f"a ratio of {value} is not in [0, 1]", output, "0.001 is usual for malformed rows")


class _Report:
    """Counts what became of every row, by file, and says when too many are lost."""

    def __init__(self, output: Path, max_malformed_ratio: float, max_reject_ratio: float):
        self._output, self._limit, self._reject_limit = output, max_malformed_ratio, max_reject_ratio
        self._total, self._files = Counts(), dict[str, Counts]()
        self._examples: dict[int, dict[str, Any]] = {}
        self._named: list[str] = []
        self._spoken = time.monotonic()

    def add(self, unit: readers.Unit, counts: Counts, matcher: Matcher | None) -> None:
        self._total.add(counts)
        self._files.setdefault(unit.path, Counts()).add(counts)
        for item, (row, run) in counts.examples.items():
            if matcher is not None and matcher.among(self._examples, item) < EXAMPLES:
                self._examples.setdefault(item, {"file": Path(unit.path).name, "row": row, "shared": run})
        for number, problem in counts.problems[: _NAMED - len(self._named)]:
            self._named.append(f"{unit.path}:{number}")
            log.warning("broken row left out: %s: %s", self._named[-1], problem)
        if counts.broken == counts.rows >= _HOPELESS_ROWS:  # another corpus, say: do not go on for hours
            self._too_many(f"all {counts.rows} rows of a part are broken: {counts.problems[0][1]}")
        if time.monotonic() - self._spoken > _SECONDS_BETWEEN_LINES:
            self._spoken = time.monotonic()
            log.info("preparing: %d rows, %d kept", self._total.rows, self._total.kept)

    def finish(self, settings: Settings, maker: Maker, inputs: Sequence[PathLike], whole: Path) -> dict[str, Any]:
        """The report as it is published. Raises SteelError where the limits are passed or nothing is kept."""
        total = self._total
        rejected = sum(total.rejected.values())
        if total.rows != total.kept + rejected + total.broken:
            raise RuntimeError(f"{total.rows} rows, but {total.kept} + {rejected} + {total.broken} accounted for")
        if total.broken > self._limit * total.rows:
            self._too_many(f"{total.broken} of {total.rows} rows are broken, more than {self._limit:.2%}")
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(total.rejected.items()))
        if rejected > self._reject_limit * total.rows:
            what = f"{rejected} of {total.rows} rows are rejected, more than {self._reject_limit:.2%} ({reasons})"
            raise SteelError(what, self._output, "look at the reasons, or allow more (--max-reject-ratio)")
        if not total.kept:
            where = ", ".join(self._files) or self._output
            raise SteelError(f"none of {total.rows} rows is kept ({reasons or 'there is no row'})", where, "give more")
        files = [
            {"name": name, "bytes": os.path.getsize(path), **_plain(self._files.get(path, Counts()))}
            for path, name in readers.names(inputs).items()
        ]
        head = {"source": settings.source, **maker.facts(), "bytes": whole.stat().st_size, "sha256": sha256(whole)}
        return head | _plain(total) | self._benchmarks(maker) | {"files": files}

    def _benchmarks(self, maker: Maker) -> dict[str, Any]:
        if (matcher := maker.matcher) is None:
            return {}
        files: list[dict[str, Any]] = [
            {"file": name, "items": count, "too_short": short, "items_found": 0, "examples": []}
            for name, count, short in zip(matcher.files, matcher.counts, matcher.unmatchable, strict=True)
        ]
        for index in sorted(self._total.hits):
            item, rows = matcher.items[index], self._total.hits[index]
            files[item.file]["items_found"] += 1
            if index in self._examples:
                files[item.file]["examples"].append({"item": item.number, "rows": rows, **self._examples[index]})
        return {"contaminated": self._total.contaminated, "benchmarks": files}

    def _too_many(self, what: str) -> None:
        remedy = f"is it this corpus? mend the rows, or allow more (--max-malformed-ratio; now {self._limit})"
        raise SteelError(what, ", ".join(self._named), remedy)


def _plain(counts: Counts) -> dict[str, Any]:
    keys = ("rows", "kept", "broken", "control_strings", "rows_with_control_strings")
    return {key: getattr(counts, key) for key in keys} | {"rejected": dict(sorted(counts.rejected.items()))}


def _publish(whole: Path, output: Path, report: dict[str, Any]) -> None:
    """The report goes last: where it lies, it is of the output beside it."""
    target = Path(f"{output}.report.json")
    aside = whole.with_name("report")
    aside.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    target.unlink(missing_ok=True)
    os.replace(whole, output)
    os.replace(aside, target)
