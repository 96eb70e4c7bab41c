"""`megatron-steel plan --data`: hours and disk to prepare, clean and tokenize a corpus, by timing a sample of it here.

1. The beginning of the inputs is cut off as a sample, in their own format, and a quarter of it as a smaller one.
2. Each stage runs on both, alone on one core, through the functions behind the verbs; CPU seconds are counted, not the
   clock's, so that a busy machine does not spoil them.
3. seconds = start + rate x bytes through the two points; N cores do the second part N times as fast. Bytes of the output
   grow as the input's. Choosing the encoder is timed by itself: it reads the first documents up to a limit, so it grows
   with a small sample and not with a corpus.

The rates are those of the machine it runs on, so that is where it must be asked. Knows nothing of models.
"""

import math
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_steel.data import parallel, readers, sources
from megatron_steel.data.tokenize import FIRST_CHARACTERS, choose_encoder, tokenize
from megatron_steel.errors import SteelError

_SAMPLE = 8_000_000  # bytes of input in the larger sample
_ENOUGH = 1_000_000  # bytes: below, a stage takes few ticks of the clock that counts CPU seconds
_FILES = 8  # at most, that the sample is taken from
_REPEATS = 2  # at least; the fastest counts
_LONG_ENOUGH = 0.5  # CPU seconds: what is shorter is repeated, a few times more


@dataclass(frozen=True)
class Stage:
    """One stage over the whole corpus."""

    name: str
    start_seconds: float
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
    sample_bytes: int = _SAMPLE,
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
    source, files = _source(inputs)
    if cores is not None and cores < 1:
        raise SteelError(f"{cores} cores can do nothing", "--cores", "give 1 or more")
    readers.check_inputs(files, "plan")
    for file in files:
        readers.units(file, 1 << 40)  # there, readable, of a known kind
    own = sum(os.path.getsize(file) for file in files)
    total = _bytes(total_size) if total_size else own
    workers = cores or parallel.cpus()
    with tempfile.TemporaryDirectory(prefix="megatron-steel-plan-") as folder:
        large = [cut(file, Path(folder, "large"), sample_bytes // min(len(files), _FILES)) for file in files[:_FILES]]
        small = [cut(file, Path(folder, "small"), math.ceil(stands / 4)) for file, stands in large]
        points = [_measured(source, taken, Path(folder), tokenizer, chain) for taken in (small, large)]
    stages = [_stage(name, points, total, workers) for name in points[0]["stages"]]
    return {
        "source": source, "files": len(files), "bytes": total, "sampled_bytes": points[1]["bytes"], "cores": workers,
        "stages": [asdict(stage) for stage in stages], "hours": sum(stage.hours for stage in stages),
        "bytes_at_most": total + sum(stage.bytes for stage in stages)
                         + max(stage.bytes_while_running for stage in stages),
    }  # fmt: skip


def as_text(found: dict[str, Any]) -> str:
    lines = [f"{found['source']}: {found['bytes'] / 1e9:,.3f} GB in {found['files']} files, rates from "
             f"{found['sampled_bytes'] / 1e6:.2f} MB of them on this machine, {found['cores']} cores",
             f"{'':10} {'hours':>9} {'core hours':>10} {'GB':>9} {'GB more while it runs':>21}"]  # fmt: skip
    for s in found["stages"]:
        lines.append(f"{s['name']:10} {s['hours']:>9.3f} {s['core_seconds'] / 3600:>10.3f} {s['bytes'] / 1e9:>9.3f} "
                     f"{s['bytes_while_running'] / 1e9:>21.3f}")  # fmt: skip
    if found["sampled_bytes"] < min(_ENOUGH, found["bytes"]):
        lines.append("note: from so small a sample the hours are noise: give at least a megabyte of the corpus")
    lines.append(
        f"{'all':10} {found['hours']:>9.3f}; {found['bytes_at_most'] / 1e9:,.3f} GB of disk at most, input included"
    )
    return "\n".join(lines)


def cut(file: str, folder: Path, limit: int) -> tuple[str, int]:
    """The beginning of a file in its own format: (the new file, bytes of the input that it stands for).

    Raises SteelError for a large file of a kind that cannot be entered in the middle.
    """
    folder.mkdir(exist_ok=True)
    size, target = os.path.getsize(file), folder / f"{len(list(folder.iterdir()))}-{Path(file).name}"
    kind = readers.units(file, 1 << 40)[0].kind if size else "lines"
    if size <= limit:
        shutil.copyfile(file, target)
        return str(target), size
    if kind == "parquet":
        return str(target), _cut_parquet(file, target, limit / size) or size
    if kind == "lines" and target.suffix not in (".gz", ".zst"):
        with open(file, "rb") as reader, open(target, "wb") as writer:
            while writer.tell() < limit and (line := reader.readline()):
                writer.write(line)
            return str(target), writer.tell()
    if size > 64 * _SAMPLE:
        what = f"no sample can be cut from {size / 1e9:.1f} GB of a compressed file or JSON array"
        raise SteelError(what, file, "give a smaller file of the same corpus, and --total-size of the whole")
    shutil.copyfile(file, target)
    return str(target), size


def _cut_parquet(file: str, target: Path, share: float) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = pq.ParquetFile(file)
    rows = max(1, round(share * whole.metadata.num_rows))
    taken, batches = 0, []
    for batch in whole.iter_batches(batch_size=min(rows, 1000)):
        batches.append(batch.slice(0, rows - taken))
        taken += len(batches[-1])
        if taken >= rows:
            break
    pq.write_table(pa.Table.from_batches(batches), target, compression=_codec(whole))
    return round(os.path.getsize(file) * taken / whole.metadata.num_rows)


def _codec(file: Any) -> str:
    return str(file.metadata.row_group(0).column(0).compression)


def _measured(
    source: str, taken: Sequence[tuple[str, int]], folder: Path, tokenizer: str | None, chain: str | None
) -> dict[str, Any]:
    """{bytes: of input, stages: {name: (CPU seconds, bytes of output)}} of one sample."""
    from megatron_steel.data.clean.run import clean
    from megatron_steel.data.prepare import prepare

    files, text, cleaned, prefix = [f for f, _ in taken], folder / "text.jsonl", folder / "clean.jsonl", folder / "data"
    stages: dict[str, Callable[[], Any]] = {"prepare": lambda: prepare(source, files, text, workers=1)}
    outputs = {"prepare": [text], "clean": [cleaned], "tokenize": [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]}
    if chain:
        stages["clean"] = lambda: clean([text], chain, cleaned, workers=1)
    if tokenizer:
        stages["tokenize"] = lambda: tokenize([cleaned if chain else text], tokenizer, prefix, workers=1)
    found = {}
    for name, run in stages.items():
        seconds = _cpu_seconds(run)
        found[name] = (seconds, sum(path.stat().st_size for path in outputs[name]))
    measured = {"bytes": sum(stands for _, stands in taken), "stages": found}
    if tokenizer:
        text_files = [cleaned if chain else text]
        characters = choose_encoder(text_files, tokenizer)[1]
        measured["choice"] = (_cpu_seconds(lambda: choose_encoder(text_files, tokenizer)), characters)
    return measured


def _cpu_seconds(run: Callable[[], Any]) -> float:
    """Of this process and its children, user and system; the fastest of a few runs."""

    def now() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(r.ru_utime + r.ru_stime for r in used)

    taken: list[float] = []
    while len(taken) < _REPEATS or (sum(taken) < _LONG_ENOUGH and len(taken) < 5 * _REPEATS):
        before = now()
        run()
        taken.append(now() - before)
    return min(taken)


def _stage(name: str, points: Sequence[dict[str, Any]], total: int, cores: int) -> Stage:
    (small, large), (before, after) = [p["bytes"] for p in points], [p["stages"][name] for p in points]
    chosen = [p["choice"] if name == "tokenize" else (0.0, 0) for p in points]
    seconds = [max(0.0, stage[0] - choice[0]) for stage, choice in zip((before, after), chosen, strict=True)]
    rate = max(seconds[1] - seconds[0], 0.0) / (large - small) if large > small else 0.0
    if rate == 0.0:
        rate = max(seconds[1], 1e-9) / large
    start = max(0.0, seconds[1] - rate * large) + _choosing(chosen, total / large)
    work, kept = rate * total, round(after[1] / large * total)
    hours = (start + work / cores) / 3600
    return Stage(name, start, work, hours, kept, round(_WHILE_RUNNING[name] * kept))


def _choosing(points: Sequence[tuple[float, int]], larger: float) -> float:
    """Seconds to choose the encoder for inputs so many times as large as those of the second point."""
    (before, few), (after, many) = points
    rate = max(0.0, after - before) / (many - few) if many > few else 0.0
    return after + rate * (max(many, min(FIRST_CHARACTERS, many * larger)) - many)


def _source(words: Sequence[str]) -> tuple[str, list[str]]:
    named = words[0] in sources.names()
    source, files = (words[0], list(words[1:])) if named else ("text", list(words))
    if not files:
        what = f"rates come from a sample of {source} on this machine, and no file of it is given"
        raise SteelError(what, "--data", f"plan --data {source} FILE..., with --total-size for the whole corpus")
    return source, files


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", size.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise SteelError(f"{size!r} is no size", "--total-size", "as in 620GB or 1.5TB")
    return round(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))
