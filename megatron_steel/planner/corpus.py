"""`megatron-steel plan --data`: hours and disk to prepare, clean and tokenize a corpus, by timing a sample of it here.

1. The beginning of the inputs is cut off as a sample, in their own format, and a quarter of it as a smaller one
   (`sample.py`).
2. Each stage runs on both, alone on one core, through the functions behind the verbs; CPU seconds are counted, not the
   clock's, so that a busy machine does not spoil them.
3. seconds = start + rate x bytes through the two points. Joining what the workers made is timed by itself, too: one
   process does that, however many cores there are, and N cores do the rest N times as fast. Bytes of the output grow as
   the input's. Loading the tokenizer and proving its encoder is timed by itself and counts as start: it takes
   seconds, which would hide the rate of a small sample, and reads the first documents only.

The rates are those of the machine it runs on, so that is where it must be asked. Knows nothing of models.
"""

import contextlib
import logging
import os
import re
import resource
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_steel.data import parallel
from megatron_steel.data.indexed import bin_path, idx_path
from megatron_steel.data.merge import concatenate
from megatron_steel.data.reserve import sha256
from megatron_steel.data.tokenize import load, tokenize
from megatron_steel.errors import SteelError
from megatron_steel.planner import sample

_ENOUGH = 1_000_000  # bytes: below, a stage takes few ticks of the clock that counts CPU seconds
_REPEATS = 100  # at most; the median counts
_ANY = 1.0  # share of malformed rows: too many of them are for the real stage to refuse
_LONG_ENOUGH = 1.0  # CPU seconds: what took less in all is run again


@dataclass(frozen=True)
class Stage:
    """One stage over the whole corpus."""

    name: str
    start_seconds: float
    join_seconds: float
    """CPU seconds of the part that grows with the corpus and that one process does."""
    core_seconds: float
    """CPU seconds of the part that cores share."""
    hours: float
    bytes: int
    """That stay on disk."""
    bytes_while_running: int
    """More than that, for as long as the stage runs."""


# Of what stays: parts beside the joined file; a numbered copy and the kept text; tokens twice (data/*.py say so).
_WHILE_RUNNING = {"prepare": 1.0, "clean": 2.0, "tokenize": 1.0}


def plan(
    inputs: Sequence[str],
    tokenizer: str | None = None,
    chain: str | None = None,
    cores: int | None = None,
    total_size: str | None = None,
    sample_bytes: int = sample.BYTES,
) -> dict[str, Any]:
    """Time a sample of `inputs` and scale it.

    Args:
        inputs: files, after the name of a source of `prepare` (default: text).
        tokenizer: to tokenize with; without it that stage is left out.
        chain: to clean with; without it that stage is left out.
        cores: that will work; by default those of this machine.
        total_size: of the corpus that the inputs are a part of, as in 620GB; by default their own.

    Raises:
        SteelError: no files, unreadable ones, a bad size or number, whatever the stages themselves refuse.
    """
    source, files = sample.source_of(inputs)
    if cores is not None and cores < 1:
        raise SteelError(f"{cores} cores can do nothing", "--cores", "give 1 or more")
    total, workers = _total(files, total_size), cores or parallel.cpus()
    with tempfile.TemporaryDirectory(prefix="megatron-steel-plan-") as name, _silent_stages():
        folder = Path(name)
        with sample.told_of(files, source, folder):
            large, small = sample.take(files, folder, sample_bytes)
            points = [_measured(source, taken, folder, tokenizer, chain) for taken in (small, large)]
    stages = [_stage(name, points, total, workers) for name in points[0]["stages"]]
    return {
        "source": source, "files": len(files), "bytes": total, "sampled_bytes": points[1]["bytes"], "cores": workers,
        "stages": [asdict(stage) for stage in stages], "hours": sum(stage.hours for stage in stages),
        "bytes_at_most": total + sum(stage.bytes for stage in stages)
                         + max(stage.bytes_while_running for stage in stages),
    }  # fmt: skip


def as_text(found: dict[str, Any]) -> str:
    unit, divisor = ("hours", 3600.0) if found["hours"] >= 1 else ("seconds", 1.0)
    lines = [f"{found['source']}: {found['bytes'] / 1e9:,.3f} GB in {found['files']} files, rates from "
             f"{found['sampled_bytes'] / 1e6:.2f} MB of them on this machine, {found['cores']} cores",
             f"{'':10} {unit:>9} {'core ' + unit:>12} {'join':>9} {'GB':>9} {'GB more while it runs':>21}"]  # fmt: skip
    for s in found["stages"]:
        whole, shared, join = (
            seconds / divisor for seconds in (s["hours"] * 3600, s["core_seconds"], s["join_seconds"])
        )
        lines.append(f"{s['name']:10} {whole:>9,.1f} {shared:>12,.1f} {join:>9,.1f} {s['bytes'] / 1e9:>9.3f} "
                     f"{s['bytes_while_running'] / 1e9:>21.3f}")  # fmt: skip
    if found["sampled_bytes"] < min(_ENOUGH, found["bytes"]):
        lines.append("note: from so small a sample the hours are noise: give at least a megabyte of the corpus")
    lines.append(
        f"{'all':10} {found['hours'] * 3600 / divisor:>9,.1f} {unit}; {found['bytes_at_most'] / 1e9:,.3f} GB of disk at most, input included"
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class _Point:
    """One stage on one sample, in CPU seconds, each part timed by itself."""

    start: float
    run: float  # the start left out, the join included
    join: float
    written: int  # bytes


def _measured(
    source: str, taken: Sequence[tuple[str, int]], folder: Path, tokenizer: str | None, chain: str | None
) -> dict[str, Any]:
    """{bytes: of input, stages: {name: _Point}} of one sample."""
    from megatron_steel.data.clean.run import clean
    from megatron_steel.data.prepare import prepare

    files, text, cleaned, prefix = [f for f, _ in taken], folder / "text.jsonl", folder / "clean.jsonl", folder / "data"
    run = _cpu_seconds(lambda: prepare(source, files, text, workers=1, max_malformed_ratio=_ANY))
    found = {"prepare": _Point(0.0, run, _cpu_seconds(lambda: _copy_and_hash(text)), text.stat().st_size)}
    if chain:
        run, join = _cpu_seconds_both(lambda: clean([text], chain, cleaned, workers=1))
        if not cleaned.stat().st_size:
            remedy = "give more of the corpus, or another chain"
            raise SteelError("the chain keeps no row of the sample", f"--chain {chain}", remedy)
        found["clean"] = _Point(0.0, run, join, cleaned.stat().st_size)
    if tokenizer:
        found["tokenize"] = _tokenized([cleaned if chain else text], tokenizer, prefix)
    return {"bytes": sum(stands for _, stands in taken), "stages": found}


def _tokenized(rows: list[Path], tokenizer: str, prefix: Path) -> _Point:
    loaded = []
    start = _cpu_seconds(lambda: loaded.append(load(tokenizer, rows)))
    run = _cpu_seconds(
        lambda: tokenize(rows, tokenizer, prefix, workers=1, max_malformed_ratio=_ANY, loaded=loaded[-1])
    )
    join = _cpu_seconds(lambda: concatenate([prefix], f"{prefix}-joined"))
    return _Point(start, run, join, bin_path(prefix).stat().st_size + idx_path(prefix).stat().st_size)


def _copy_and_hash(file: Path) -> None:
    """What `prepare` does when its parts are there."""
    copy = file.with_suffix(".copy")
    shutil.copyfile(file, copy)
    sha256(copy)
    copy.unlink()


@contextlib.contextmanager
def _silent_stages() -> Iterator[None]:
    """Each stage runs several times, on files that the user does not know: what it logs would only confuse."""
    log = logging.getLogger("megatron_steel")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _cpu_seconds(run: Callable[[], Any]) -> float:
    """Of this process and its children, user and system; the median of a few runs."""
    return _cpu_seconds_both(run)[0]


def _cpu_seconds_both(run: Callable[[], Any]) -> tuple[float, float]:
    """(of this process and its children, of this process alone), the medians of a few runs."""

    def now() -> tuple[float, float]:
        mine, its = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        alone = mine.ru_utime + mine.ru_stime
        return alone + its.ru_utime + its.ru_stime, alone

    taken: list[tuple[float, float]] = []
    while sum(whole for whole, _ in taken) < _LONG_ENOUGH and len(taken) < _REPEATS:
        before = now()
        run()
        after = now()
        taken.append((after[0] - before[0], after[1] - before[1]))
    return statistics.median(whole for whole, _ in taken), statistics.median(alone for _, alone in taken)


def _stage(name: str, points: Sequence[dict[str, Any]], total: int, cores: int) -> Stage:
    (small, large), (before, after) = [p["bytes"] for p in points], [p["stages"][name] for p in points]
    rate = max(after.run - before.run, 0.0) / (large - small) if large > small else 0.0
    if rate == 0.0:
        rate = max(after.run, 1e-9) / large
    start = max(0.0, after.run - rate * large) + after.start
    join = min(after.join / large, rate) * total
    work, kept = rate * total - join, round(after.written / large * total)
    hours = (start + join + work / cores) / 3600
    return Stage(name, start, join, work, hours, kept, round(_WHILE_RUNNING[name] * kept))


def _total(files: Sequence[str], size: str | None) -> int:
    own = sum(os.path.getsize(file) for file in files)
    total = _bytes(size) if size else own
    if total < own:
        what = f"{size} is less than the {own:,} bytes of the files given"
        raise SteelError(what, "--total-size", "give the size of the corpus that they are a part of, or leave it out")
    return total


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", size.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise SteelError(f"{size!r} is no size", "--total-size", "as in 620GB or 1.5TB")
    return round(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))
