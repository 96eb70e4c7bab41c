"""Published instruction, preference and question sets to one mixture that TRL and LLaMA-Factory read.

1. The specification (`sft_spec`) names sets and files; files are cut into units, and worker processes write the usable
   rows of each unit to a part (`sft_rows`), with their keys.
2. Parts are joined in the order of the input; `mix` computes which rows are drawn and where each goes.
3. Rows are copied to train.jsonl and heldout.jsonl; with the report and what LLaMA-Factory needs they are published by
   one rename.

Each row read is malformed, rejected (by reason), a duplicate, not drawn, or written; that is checked, as is that the
files hold what the mixture says. The output depends on the specification and the rows alone. Must not know what a row
looks like.
"""

import contextlib
import itertools
import json
import logging
import mmap
import os
import shutil
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from megatron_steel.checkpoint.commit import sync
from megatron_steel.data import parallel, readers
from megatron_steel.data.reserve import reserved
from megatron_steel.errors import SteelError
from megatron_steel.post.sft_data import llama_factory
from megatron_steel.post.sft_data import report as account
from megatron_steel.post.sft_data.mix import Mixture, mix
from megatron_steel.post.sft_data.rows import Maker, Outcome, Task, make
from megatron_steel.post.sft_data.spec import Spec, files_of, load_spec

log = logging.getLogger("megatron_steel")
_UNIT_BYTES = 16 << 20
_HOPELESS_ROWS, _SECONDS_BETWEEN_LINES = 10, 10.0


def sft_data(spec: str, output: str, force_test_splits: bool = False, workers: int | None = None) -> dict[str, Any]:
    """Write the mixture of a specification to a new folder; returns the report.

    Args:
        spec: a YAML file (`sft_spec.Spec`).
        output: a folder that does not exist or is empty.
        force_test_splits: train on test splits of benchmarks all the same; the report says so.
        workers: processes; by default one for each CPU that this process may use. The output does not depend on it.

    Raises:
        SteelError: bad specification, tokenizer, benchmark or input; a set with too many malformed rows, none usable or
            fewer than wanted. Nothing is published then.
    """
    read, target = load_spec(spec), Path(output)
    maker = Maker(read)
    files = [
        files_of(part, source.benchmark and not force_test_splits)
        for part, source in zip(read.sources, maker.sources, strict=True)
    ]
    with _publishing(target) as aside:
        with open(aside / "spool", "wb") as spool:
            outcomes = _read(read, maker, files, workers or parallel.cpus(), aside / "parts", spool)
        for part, source, total in zip(read.sources, maker.sources, outcomes, strict=True):
            account.judge(read, part, source, total)
        mixture = _mixture(read, outcomes)
        written = _write(aside, outcomes, mixture)
        report = account.build(read, maker, outcomes, mixture, written)
        report["forced_test_splits"] = force_test_splits
        (aside / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        llama_factory.hand_over(aside, read, report, target)
    return report


def _read(spec: Spec, maker: Maker, files: list[list[Path]], workers: int, folder: Path, spool: Any) -> list[Outcome]:
    """What became of each set's rows; usable lines go to `spool`, in the order of the input."""
    folder.mkdir()
    tasks = list(_tasks(files, folder))
    results: Generator[Outcome, None, None]
    if min(workers, len(tasks)) <= 1:
        results = (make(task, maker) for task in tasks)
    else:
        results = parallel.in_order(make, tasks, min(workers, len(tasks)), Maker, spec)
    outcomes, spoken = [Outcome() for _ in files], time.monotonic()
    with contextlib.closing(results):
        for done, (task, outcome) in enumerate(zip(tasks, results, strict=True), 1):
            part, total = spec.sources[task.part], outcomes[task.part]
            total.add(outcome)
            for where, problem in outcome.problems[:1]:
                log.warning("%s: malformed row left out: %s: %s", part.type, where, problem)
            if outcome.malformed == outcome.rows >= _HOPELESS_ROWS:  # another set, say: do not go on for hours
                account.judge(spec, part, maker.sources[task.part], total)
            if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                log.info(
                    "part %d of %d read; %s: %d rows, %d usable",
                    done,
                    len(tasks),
                    part.type,
                    total.rows,
                    len(total.keys),
                )
            with open(task.output, "rb") as lines:
                shutil.copyfileobj(lines, spool, 1 << 20)
            os.unlink(task.output)
    folder.rmdir()
    return outcomes


def _tasks(files: list[list[Path]], folder: Path) -> Iterator[Task]:
    number = itertools.count()
    for part, paths in enumerate(files):
        common = os.path.commonpath([path.absolute().parent for path in paths])
        for path in paths:
            name = os.fsencode(os.path.relpath(path.absolute(), common)).decode(errors="replace")
            before, units = 0, readers.units(path, _UNIT_BYTES)
            for i, unit in enumerate(units):
                yield Task(part, name, unit, before, str(folder / f"{next(number):06d}"))
                before += readers.numbers(unit) if i + 1 < len(units) else 0


def _mixture(spec: Spec, outcomes: list[Outcome]) -> Mixture:
    import numpy as np

    keys, places = (
        [np.frombuffer(getattr(outcome, name), np.uint64) for outcome in outcomes] for name in ("keys", "places")
    )
    return mix(keys, places, spec.sources)


def _write(aside: Path, outcomes: list[Outcome], mixture: Mixture) -> dict[str, list[int]]:
    """Copy the drawn lines from the spool; gives rows of train and heldout and tokens, by set."""
    import numpy as np

    def laid_end_to_end(name: str, kind: type) -> Any:
        return np.concatenate([np.frombuffer(getattr(outcome, name), kind) for outcome in outcomes]).astype(np.int64)

    sizes, heldout = laid_end_to_end("sizes", np.uint32), laid_end_to_end("heldout", np.int8) > 0
    begins = np.cumsum(sizes) - sizes
    sets = np.repeat(np.arange(len(outcomes)), [len(outcome.keys) for outcome in outcomes])
    tokens = laid_end_to_end("tokens", np.uint32)[mixture.order]
    written = {"tokens": np.bincount(sets[mixture.order], tokens, minlength=len(outcomes))}
    with open(aside / "spool", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
        for side in ("train", "heldout"):
            rows = mixture.order[heldout[mixture.order] == (side == "heldout")]
            written[side] = np.bincount(sets[rows], minlength=len(outcomes))
            if not len(rows):
                continue
            with open(aside / f"{side}.jsonl", "w+b") as out:
                out.writelines(lines[begins[row] : begins[row] + sizes[row]] for row in rows.tolist())
                out.seek(0)
                if (found := sum(1 for _ in out)) != len(rows):
                    raise RuntimeError(f"{side} holds {found} rows instead of {len(rows)}")
    (aside / "spool").unlink()
    return {key: values.astype(int).tolist() for key, values in written.items()}


@contextlib.contextmanager
def _publishing(target: Path) -> Iterator[Path]:
    """A folder to fill beside `target`; at a clean end it is synced and renamed, else it is gone."""
    if any(target.iterdir()) if target.is_dir() else target.exists() or target.is_symlink():
        raise SteelError("the output exists already and is never overwritten", target,
                         "name another folder, or move this one away")  # fmt: skip
    aside = target.with_name(f".{target.name}.tmp")
    try:
        with reserved(target):
            try:
                shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
                aside.mkdir()
                yield aside
                for path in [*aside.iterdir(), aside]:
                    sync(path)
                os.replace(aside, target)
                sync(target.parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:  # a full disk, say
        raise SteelError(f"cannot write: {error.strerror or error}", target, "mend it and repeat") from error
