"""The files that `plan --data` was given, and a sample of them: the beginning of each, in its own format, in a folder that goes.

The stages know the sample only; what they say of it is told here of the files that it was cut from. Knows no stage.
"""

import contextlib
import difflib
import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_steel.data import readers, sources
from megatron_steel.errors import SteelError

BYTES = 32_000_000  # of input in the larger sample
_FILES = 8  # at most, that the sample is taken from
_SIZES = ("large", "small")  # folders of the samples
_WHOLE = 1 << 40  # bytes: no file is cut into several units
_FULL = (errno.ENOSPC, errno.EDQUOT)

Taken = list[tuple[str, int]]  # a file, and the bytes of the input that it stands for


def source_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The source of `prepare` and its files, all of them there and with something in them. Raises SteelError."""
    named = words[0] in sources.names()
    if not named and not os.path.exists(words[0]):
        near = difflib.get_close_matches(words[0], sources.names(), n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        what = "there is no such input file, and no source of that name"
        raise SteelError(what, words[0], f"{hint}name the files, as in FOLDER/*.jsonl, behind their source")
    source, files = (words[0], list(words[1:])) if named else ("text", list(words))
    if not files:
        what = f"rates come from a sample of {source} on this machine, and no file of it is given"
        raise SteelError(what, "--data", f"plan --data {source} FILE..., with --total-size for the whole corpus")
    readers.check_inputs(files, "plan --data")
    for file in files:
        units = readers.units(file, _WHOLE)  # there, readable, of a known kind
        if not any(readers.numbers(unit) if unit.kind == "parquet" else unit.size for unit in units):
            raise SteelError("the file is empty", file, "leave it out, or fetch it again")
    return source, files


def take(files: Sequence[str], folder: Path, sample_bytes: int) -> tuple[Taken, Taken]:
    """Sample and smaller sample, a quarter of it."""
    share = sample_bytes // min(len(files), _FILES)
    large = [cut(file, folder / _SIZES[0], share) for file in files[:_FILES]]
    return large, [cut(file, folder / _SIZES[1], math.ceil(stands / 4)) for file, stands in large]


def cut(file: str, folder: Path, limit: int) -> tuple[str, int]:
    """The beginning of a file: (the new file, bytes of the input that it stands for).

    Raises SteelError for a large file of a kind that cannot be entered in the middle.
    """
    folder.mkdir(exist_ok=True)
    own = folder / str(len(list(folder.iterdir())))  # so that it keeps its name, which `prepare` writes into every row
    own.mkdir()
    size, target = os.path.getsize(file), own / Path(file).name
    kind = readers.units(file, _WHOLE)[0].kind
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
    if size > 16 * BYTES:
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
    try:
        for batch in whole.iter_batches(batch_size=min(rows, 1000)):
            batches.append(batch.slice(0, rows - taken))
            taken += len(batches[-1])
            if taken >= rows:
                break
    except (OSError, pa.ArrowException) as error:  # its end was good, which is all that was read before
        raise SteelError(f"the file cannot be read: {error}", file, "fetch it again, or leave it out") from None
    pq.write_table(pa.Table.from_batches(batches), target, compression=_codec(whole))
    return round(os.path.getsize(file) * taken / whole.metadata.num_rows)


def _codec(file: Any) -> str:
    return str(file.metadata.row_group(0).column(0).compression)


@contextlib.contextmanager
def told_of(files: Sequence[str], source: str, folder: Path) -> Iterator[None]:
    """What fails on the sample in `folder` is told of the files themselves, with a remedy that `plan` has."""
    try:
        yield
    except (SteelError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno in _FULL:
            remedy = "make room there, or set TMPDIR to a folder that has it"
            raise SteelError("there is no room for the sample", tempfile.gettempdir(), remedy) from None
        if isinstance(error, OSError):
            raise
        raise _told(error, files[:_FILES], source, folder) from None


def _told(error: SteelError, files: Sequence[str], source: str, folder: Path) -> SteelError:
    if str(folder) not in error.where:  # of the tokenizer, the chain or its environment: `clean` has more options
        clauses = [clause for clause in error.remedy.split("; ") if not re.search(r"--(python|workers)\b", clause)]
        error.remedy = "; ".join(clauses)
        return error
    what, where = error.what, error.where
    for path in (path for size in _SIZES for path in folder.glob(f"{size}/*/*")):
        file = files[int(path.parent.name)]
        what, where = what.replace(str(path), file), where.replace(str(path), file)
    if str(folder) in where:  # of what a stage has made of all of them
        where = ", ".join(files)
    remedy = f"is it {source}? if not, name its source first (plan --data SOURCE FILE...); or give more of the corpus"
    return SteelError(what, where, remedy)
