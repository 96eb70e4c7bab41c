"""Input files to `.bin`/`.idx`, in parallel, restartable, the same bytes whatever the number of workers.

1. The encoder is chosen (`data.encoders`), and every input is cut into units (`data.readers`); a bundle of them
   becomes a part (`data.parts`) in `PREFIX.parts/`.
2. Worker processes (`data.parallel`) take bundle after bundle; only a few numbers travel between processes, so memory is
   one batch of documents a worker.
3. The parts are joined in the order of the input, or permuted (`data.shuffle`), and manifests are written, all inside
   `PREFIX.parts/`. Until then the disk holds the tokens twice, three times where they are permuted.
4. The older data sets' manifests and indexes go, the new files of both sides take their names, `PREFIX.parts/` goes. Whoever
   is stopped between leaves a side without an index or manifest, never one that is half old and half new.

Rules: a document that has text gets the end-of-document id exactly once, after its last id. Empty documents (no
character, null, or nothing that the tokenizer keeps) are counted and skipped, so that there is one sequence a document.
Malformed rows are counted, skipped and named; too many fail the job. A killed job leaves `PREFIX.parts/` alone, and the
same command on the same input uses the parts that were finished. Must not know the byte format.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from megatron_steel.data import encoders, manifest, parallel, parts, readers
from megatron_steel.data.indexed import PathLike, bin_path, idx_path
from megatron_steel.data.merge import concatenate
from megatron_steel.data.permutation import key_of
from megatron_steel.data.reserve import Busy, reserved
from megatron_steel.data.shuffle import shuffled
from megatron_steel.data.tokenizer import Tokenizer, load_tokenizer
from megatron_steel.errors import SteelError

log = logging.getLogger("megatron_steel")
_LEAST_UNIT_BYTES, _MOST_UNITS = 16 << 20, 2048
_HOPELESS_ROWS = 10
_NAMED_PROBLEMS = 5
_SECONDS_BETWEEN_LINES = 10.0
_FIRST_FILES, _FIRST_DOCUMENTS, _FIRST_CHARACTERS = 32, 64, 400_000  # on which encoders are compared
_FILES = (bin_path, idx_path, manifest.manifest_path)  # of a data set, in the order in which they take their names
_LAYOUT = 2  # of a parts folder and of what decides its bytes; another number makes leftovers useless


class Loaded(NamedTuple):
    """A tokenizer and the encoder that stands in for it, proven on the first documents, however many follow."""

    tokenizer: Tokenizer
    encoder: encoders.Encoder


def load(path: PathLike, inputs: Sequence[PathLike], keys: tuple[str, ...] = ("text",)) -> Loaded:
    """What `tokenize` loads for these files before it starts."""
    tokenizer = load_tokenizer(path)
    units = [unit for file in inputs for unit in readers.units(file, _LEAST_UNIT_BYTES)]
    return Loaded(tokenizer, encoders.choose(tokenizer, os.path.abspath(path), _first_documents(units, keys)))


def tokenize(
    inputs: Sequence[PathLike],
    tokenizer_path: PathLike,
    output_prefix: PathLike,
    text_key: str = "text",
    workers: int | None = None,
    validation_ratio: float = 0.0,
    max_malformed_ratio: float = 0.001,
    shuffle: bool = False,
    seed: int = 0,
    min_tokens: int = 0,
    min_chars: int = 0,
    prompt_key: str | None = None,
    response_key: str | None = None,
    loaded: Loaded | None = None,
) -> manifest.Manifest:
    """Tokenize files into `output_prefix` and return its manifest. A data set of that name is replaced at the end.

    Args:
        inputs: .jsonl, .json, .txt (each also .gz, .zst) and .parquet files; documents keep their order.
        tokenizer_path: a Hugging Face folder or a sentencepiece .model.
        text_key: the key, or parquet column, of the text.
        workers: processes; by default one for each CPU that this process may use.
        validation_ratio: about this share of the documents goes to `output_prefix + "-validation"`. A hash of the
            text decides and nothing else does, so equal texts lie on one side.
        max_malformed_ratio: fail when more than this share of all rows is malformed; at once when a unit holds ten
            malformed rows or more and no other.
        shuffle: permute the documents; document j of the output is document `permute(j, N, key)` of the input order,
            where the key is `shuffle_key(seed, "training")` (or "validation") and N counts the documents of that side.
        min_tokens, min_chars: a document with fewer tokens (its end not counted) or characters is left out, and counted.
        prompt_key, response_key: the two keys of a pair, instead of `text_key`: for encoder-decoder models. A document is
            then two sequences, the manifest's kind is "pairs", and the hash of the prompt alone decides the side.
        loaded: from `load` for this tokenizer and these keys; by default it is loaded here.

    Raises:
        SteelError: bad argument, input or tokenizer; too many malformed rows; no text; another process makes the
            same output; a validation set of an earlier split would be left. The output is untouched then.
    """
    if workers is not None and workers < 1:
        raise SteelError(f"{workers} workers are none", output_prefix, "give at least 1, or leave it to the CPUs")
    _check_arguments(inputs, output_prefix, validation_ratio, max_malformed_ratio)
    if min(min_tokens, min_chars) < 0:
        raise SteelError(
            "a document cannot have fewer than 0 tokens or characters",
            "--min-tokens, --min-chars",
            "256 and 200 are OpenELM's",
        )
    keys = _pair_keys(prompt_key, response_key, shuffle)
    bundles = _bundles(inputs)
    units = [unit for bundle in bundles for unit in bundle]
    tokenizer, encoder = loaded or load(tokenizer_path, inputs, keys or (text_key,))
    job = parts.Job(f"{os.fspath(output_prefix)}.parts", text_key, validation_ratio, min_tokens, min_chars, keys)
    try:
        with contextlib.ExitStack() as stack:
            for target in _targets(output_prefix, validation_ratio).values():
                stack.enter_context(reserved(target))
            _open_folder(job, units, [tokenizer.fingerprint, encoder.choice.name])
            try:
                made = _make_parts(job, bundles, workers or parallel.cpus(), encoder, max_malformed_ratio)
                result = _publish(job, units, made, tokenizer, output_prefix, seed if shuffle else None)
            except (parallel.WorkerDied, Busy):  # the finished parts stay for the next try
                raise
            except SteelError:
                shutil.rmtree(job.folder, ignore_errors=True)
                raise
            shutil.rmtree(job.folder)
    except OSError as error:  # a full disk, say: they stay here, too
        raise SteelError(f"cannot write: {error.strerror or error}", job.folder, "mend it and repeat") from None
    return result


def _pair_keys(prompt: str | None, response: str | None, shuffle: bool) -> tuple[str, str] | None:
    if prompt is None and response is None:
        return None
    if prompt is None or response is None:
        raise SteelError("a pair has two keys", "--prompt-key, --response-key", "give both")
    if shuffle:
        what = "pairs are not permuted here"
        raise SteelError(what, "--shuffle", "leave it out: training draws them in an order of its own")
    return prompt, response


def _check_arguments(
    inputs: Sequence[PathLike], output: PathLike, validation_ratio: float, max_malformed_ratio: float
) -> None:
    readers.check_inputs(inputs, output)
    if not 0 <= validation_ratio < 1:
        raise SteelError(f"a validation ratio of {validation_ratio} is not in [0, 1)", output, "0.01 is usual")
    if not 0 <= max_malformed_ratio <= 1:
        raise SteelError(f"a ratio of {max_malformed_ratio} malformed rows is not in [0, 1]", output, "0.001 is usual")
    if os.path.basename(output) in ("", ".", ".."):
        raise SteelError("the output is a folder, not the beginning of file names", output, "give FOLDER/NAME")
    files = [path(target) for target in _targets(output, validation_ratio).values() for path in _FILES]
    if folders := [str(path) for path in files if path.is_dir()]:
        what = "a folder has the name that a file of the output would take"
        raise SteelError(what, ", ".join(folders), "move it away, or choose another output")
    validation = f"{os.fspath(output)}-validation"
    stale = [path(validation) for path in _FILES if path(validation).exists()]
    if stale and not validation_ratio:
        what = "an earlier validation set lies beside the output, and its documents would now be trained on"
        remedy = "delete these files, give --validation-ratio, or choose another output"
        raise SteelError(what, ", ".join(map(str, stale)), remedy)


def _targets(output: PathLike, validation_ratio: float) -> dict[str, str]:
    """The prefix of each side that is made."""
    targets = {"training": os.fspath(output)}
    return targets | ({"validation": f"{os.fspath(output)}-validation"} if validation_ratio else {})


def _bundles(inputs: Sequence[PathLike]) -> list[list[readers.Unit]]:
    """Units in order; small ones share a bundle, so that a thousand small files are not a thousand parts."""
    total = sum(os.path.getsize(path) for path in inputs if os.path.isfile(path))
    wanted = max(_LEAST_UNIT_BYTES, total // _MOST_UNITS)
    bundles: list[list[readers.Unit]] = []
    room = 0
    for unit in (unit for path in inputs for unit in readers.units(path, wanted)):
        if not bundles or unit.size > room:
            bundles.append([])
            room = wanted
        bundles[-1].append(unit)
        room -= unit.size
    return bundles


def _first_documents(units: Sequence[readers.Unit], keys: tuple[str, ...]) -> list[str]:
    """The beginnings of the first documents of the first files, for the choice of the encoder."""
    firsts = {unit.path: unit for unit in reversed(units)}
    paths = list(dict.fromkeys(unit.path for unit in units))[:_FIRST_FILES]
    documents = []
    for path in paths:
        room = _FIRST_CHARACTERS // len(paths)
        found = (
            readers.pairs(firsts[path], keys) if len(keys) == 2 else ((r,) for r in readers.rows(firsts[path], *keys))
        )
        for row in itertools.chain.from_iterable(itertools.islice(found, _FIRST_DOCUMENTS)):
            if row.text and room > 0:
                documents.append(row.text[:room])
                room -= len(row.text)
    return documents


def _open_folder(job: parts.Job, units: Sequence[readers.Unit], encoding: list[str]) -> None:
    """Keep an earlier attempt's parts where they belong to the very same job; otherwise start empty."""
    times = [os.stat(path).st_mtime_ns for path in dict.fromkeys(unit.path for unit in units)]
    paths = [asdict(unit) | {"path": os.path.abspath(unit.path)} for unit in units]
    whole = [_LAYOUT, _LEAST_UNIT_BYTES, paths, times, *encoding, job.text_key, job.validation_ratio]
    whole += [job.min_tokens, job.min_chars] if job.min_tokens or job.min_chars else []
    whole += [job.pair_keys] if job.pair_keys else []
    fingerprint = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    mark = Path(job.folder, "job")
    if not mark.is_file() or mark.read_text() != fingerprint:
        shutil.rmtree(job.folder, ignore_errors=True)
        mark.parent.mkdir(parents=True)
        mark.write_text(fingerprint)


def _make_parts(
    job: parts.Job,
    bundles: Sequence[list[readers.Unit]],
    workers: int,
    encoder: encoders.Encoder,
    max_malformed_ratio: float,
) -> list[list[parts.Outcome]]:
    """The outcomes of every bundle, in order. Raises SteelError where too many rows are malformed."""
    found = {i: outcomes for i in range(len(bundles)) if (outcomes := parts.finished(job, i))}
    if found:
        log.info("%d of %d parts of an earlier attempt are used again", len(found), len(bundles))
    todo = [(i, bundle, job) for i, bundle in enumerate(bundles) if i not in found]
    results: Generator[list[parts.Outcome], None, None]
    if min(workers, len(todo)) > 1:
        results = parallel.in_order(parts.make, todo, min(workers, len(todo)), encoders.Encoder, encoder.choice)
    else:
        results = (parts.make(item, encoder) for item in todo)
    progress = _Progress(sum(unit.size for _, bundle, _ in todo for unit in bundle))
    report = _Report(job.keys, max_malformed_ratio)
    made = []
    with contextlib.closing(results):  # no worker writes any more once this is left, error or not
        for i, bundle in enumerate(bundles):
            outcomes = found.get(i) or next(results)
            made.append(outcomes)
            if i not in found:
                progress.add(outcomes, bundle)
            for unit, outcome in zip(bundle, outcomes, strict=True):
                report.add(unit, outcome)
    report.finish()
    return made


class _Report:
    """Counts rows, names the first malformed ones by their line in the file, and says when there are too many."""

    def __init__(self, keys: str, limit: float):
        self._keys, self._limit = keys, limit
        self._rows = self._empty = self._short = self._malformed = self._special = 0
        self._named: list[str] = []
        self._numbered: dict[str, int] = {}

    def add(self, unit: readers.Unit, outcome: parts.Outcome) -> None:
        before = self._numbered.get(unit.path, 0)
        self._numbered[unit.path] = before + outcome.numbered
        self._rows, self._empty = self._rows + outcome.rows, self._empty + outcome.empty
        self._malformed, self._special = self._malformed + outcome.malformed, self._special + outcome.special
        self._short += outcome.short
        for number, problem in outcome.problems[: _NAMED_PROBLEMS - len(self._named)]:
            self._named.append(f"{unit.path}:{before + number}")
            log.warning("malformed row skipped: %s: %s", self._named[-1], problem)
        if outcome.malformed == outcome.rows >= _HOPELESS_ROWS:  # the wrong key: do not go on for hours
            raise self._too_many(f"all {outcome.rows} rows of a part are malformed: {outcome.problems[0][1]}")

    def finish(self) -> None:
        if self._malformed > self._limit * self._rows:
            raise self._too_many(
                f"{self._malformed} of {self._rows} rows are malformed, more than {self._limit:.2%}; the first are named"
            )
        log.info("%d rows: %d empty, %d malformed and %d short ones skipped; %d hold a special string of the tokenizer, written out",
                 self._rows, self._empty, self._malformed, self._short, self._special)  # fmt: skip

    def _too_many(self, what: str) -> SteelError:
        key = f"name the key that holds the text (--text-key, or --prompt-key and --response-key; now {self._keys!r})"
        remedy = f"mend the rows, {key}, or allow more (--max-malformed-ratio; now {self._limit})"
        return SteelError(what, ", ".join(self._named), remedy)


def _publish(
    job: parts.Job,
    units: Sequence[readers.Unit],
    made: Sequence[list[parts.Outcome]],
    tokenizer: Tokenizer,
    output: PathLike,
    seed: int | None,
) -> manifest.Manifest:
    """Join the parts, permuted where there is a seed, and put all in place. Raises SteelError: a side has no document."""
    outcomes = [outcome for bundle in made for outcome in bundle]
    targets = _targets(output, job.validation_ratio)
    for kind in targets:
        if not parts.documents(outcomes, kind):
            what = f"there is no document for {kind} among {sum(o.rows for o in outcomes)} rows"
            remedy = "give more text" if kind == "training" else "give more text, or a larger --validation-ratio"
            raise SteelError(what, ", ".join(dict.fromkeys(unit.path for unit in units)) or output, remedy)
    ready = {kind: f"{job.folder}/{kind}" for kind in targets}
    for path in (path(aside) for aside in ready.values() for path in _FILES):
        path.unlink(missing_ok=True)  # an earlier attempt's: the disk may have no room for it beside this one's
    results = {}
    for kind, aside in ready.items():
        joined = [parts.prefix(job, i, kind) for i, bundle in enumerate(made) if parts.documents(bundle, kind)]
        if seed is None:
            facts = concatenate(joined, aside)
        else:
            facts = shuffled(joined, aside, shuffle_key(seed, kind), Path(job.folder, "shuffle"))
        provenance = _provenance(units, outcomes, kind, seed, job)
        results[kind] = manifest.write(
            aside, facts, tokenizer.facts(), provenance, "pairs" if job.pair_keys else "text"
        )
    _put_in_place([(ready[kind], target) for kind, target in targets.items()])
    for kind, target in targets.items():
        log.info("%s: %d documents, %d tokens of %s",
                 target, results[kind].documents, results[kind].tokens, results[kind].dtype)  # fmt: skip
    return results["training"]


def _put_in_place(moves: Sequence[tuple[str, str]]) -> None:
    """Rename whole data sets to their prefixes in the same file system; older ones stop being whole before the first move."""
    for path in (manifest.manifest_path, idx_path):
        for _, target in moves:
            path(target).unlink(missing_ok=True)
    for path in _FILES:
        for ready, target in moves:
            os.replace(path(ready), path(target))
    folder = os.open(Path(moves[0][1]).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def shuffle_key(seed: int, kind: str) -> int:
    """The key of the permutation of one side's documents."""
    return key_of("shuffle", seed, kind)


def _provenance(
    units: Sequence[readers.Unit], outcomes: Sequence[parts.Outcome], kind: str, seed: int | None, job: parts.Job
) -> list[dict[str, Any]]:
    """One entry a file: its name, sizes, what became of its rows, and how documents were permuted or dropped, if they were."""
    files: dict[str, dict[str, Any]] = {}
    documents = parts.documents(list(outcomes), kind)
    shuffle = {} if seed is None else {"shuffled": {"key": shuffle_key(seed, kind), "documents": documents}}
    dropping = {"min_tokens": job.min_tokens, "min_chars": job.min_chars} if job.min_tokens or job.min_chars else {}
    counted = ("rows", "empty", "malformed", "special", *(("short",) if dropping else ()))
    names = readers.names(list(dict.fromkeys(unit.path for unit in units)))
    for unit, outcome in zip(units, outcomes, strict=True):
        new: dict[str, Any] = {"name": names[unit.path], "bytes": os.path.getsize(unit.path)} | shuffle | dropping
        entry = files.setdefault(unit.path, new | dict.fromkeys(("documents", *counted), 0))
        entry["documents"] += getattr(outcome, kind)
        for key in counted:
            entry[key] += getattr(outcome, key)
    return list(files.values())


class _Progress:
    """A line now and then: share, documents and MB a second, time left."""

    def __init__(self, size: int):
        self._size, self._done, self._documents = size, 0, 0
        self._started = self._spoken = time.monotonic()

    def add(self, outcomes: Sequence[parts.Outcome], bundle: Sequence[readers.Unit]) -> None:
        self._done += sum(unit.size for unit in bundle)
        self._documents += sum(outcome.training + outcome.validation for outcome in outcomes)
        now = time.monotonic()
        if now - self._spoken < _SECONDS_BETWEEN_LINES:
            return
        self._spoken, seconds = now, now - self._started
        left = seconds * (self._size - self._done) / max(1, self._done)
        speed = self._documents / seconds, self._done / seconds / 1e6
        log.info("tokenizing: %.0f%%, %.0f documents/s, %.2f MB/s, about %.0f s left",
                 100 * self._done / max(1, self._size), *speed, left)  # fmt: skip
