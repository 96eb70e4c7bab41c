"""Input files to rows: jsonl, json, parquet and text, each also as .gz or .zst (parquet compresses itself).

A file is cut into units that workers read alone: byte ranges of a plain jsonl file, row groups of a parquet file,
and the whole of anything else (a compressed file cannot be entered in the middle: many files feed many workers).
`rows` gives one text a row, `records` all its fields; memory holds one row, one parquet batch or one text file at a
time. Must not know tokenizers, corpora or the output.

    .jsonl .json     one JSON object a line; a file that begins with `[` is one array of objects and no more
    .parquet         one row, one document; `rows` reads the text column alone
    .txt             the whole file is one document (at most 64 MB), line ends as they are
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from megatron_steel.errors import SteelError

_MAX_TEXT_BYTES = 64 << 20
_READ, _MAX_ELEMENT = 1 << 20, 64 << 20  # characters
_CUT_SHORT = 16  # characters: no literal, number or escape that the end of a buffer may cut is longer
_BOM = b"\xef\xbb\xbf"
_BAD_UTF8, _NOT_UTF8 = object(), "bad UTF-8"
_GAP, _AFTER_ELEMENT = re.compile(r"[ \t\r\n,]*"), re.compile(r"[ \t\r\n,\]]")


@dataclass(frozen=True)
class Unit:
    """A part of one input file: bytes [start, stop) of lines, row groups [start, stop), or all of it."""

    path: str
    kind: str
    """lines, array, parquet or text"""
    start: int
    stop: int
    size: int
    """bytes of the file that it stands for, for progress and sampling"""


@dataclass(frozen=True)
class Row:
    """Text and no problem; a problem and no text; or neither: an empty line, which counts for the numbers alone."""

    number: int
    """From 1 within the unit: line, element or row."""
    text: str | None
    problem: str = ""


@dataclass(frozen=True)
class Record:
    """A whole row, under the rules of `Row`: fields and no problem, a problem and no fields, or neither."""

    number: int
    fields: dict[str, Any] | None
    problem: str = ""


R = TypeVar("R", Row, Record)
Made = Callable[[int, Any], R]  # number and parsed value to a row
Bad = Callable[..., R]  # number, None and perhaps a problem to a row


def check_inputs(inputs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    """Raises SteelError where there is none, or one is given twice."""
    if not inputs:
        raise SteelError("there is no input", output, "name at least one file")
    real = [os.path.realpath(path) for path in inputs]
    if twice := [os.fspath(path) for path, name in zip(inputs, real, strict=True) if real.count(name) > 1]:
        raise SteelError("an input file is given twice", ", ".join(twice), "name every file once")


def names(paths: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """How to call each input file without saying where it lies, by `str(Path(path))`: its own name, or, where two share
    one, what follows the folder that all have in common."""
    files = [os.path.abspath(path) for path in paths]
    own = [os.path.basename(file) for file in files]
    if len(set(own)) < len(own):
        folder = os.path.commonpath([os.path.dirname(file) for file in files])
        own = [Path(file).relative_to(folder).as_posix() for file in files]
    printable = [os.fsencode(name).decode(errors="replace") for name in own]
    return {str(Path(path)): name for path, name in zip(paths, printable, strict=True)}


def units(path: str | os.PathLike[str], range_bytes: int) -> list[Unit]:
    """Cut one file, in order. Raises SteelError: not there, unreadable, or of an unknown kind."""
    path = Path(path)
    if not path.is_file():
        what = "the input is a folder" if path.is_dir() else "there is no such input file"
        raise SteelError(what, path, "name the files, as in FOLDER/*.jsonl")
    kind, size = _kind(path), path.stat().st_size
    if kind == "parquet":
        with _named(path):
            groups = _parquet(path).metadata
            return [
                Unit(str(path), kind, i, i + 1, groups.row_group(i).total_byte_size)
                for i in range(groups.num_row_groups)
            ]
    if kind == "lines" and path.suffix not in (".gz", ".zst"):
        cuts = [*range(0, size, range_bytes), size]
        return [Unit(str(path), kind, a, b, b - a) for a, b in itertools.pairwise(cuts)]
    return [Unit(str(path), kind, 0, size, size)]


def rows(unit: Unit, text_key: str) -> Iterator[Row]:
    """Every row of a unit, malformed ones with their problem. Raises SteelError where the file itself is broken."""

    def made(number: int, value: Any) -> Row:
        return _row(number, value, text_key)

    with _named(Path(unit.path)):
        if unit.kind == "parquet":
            yield from _parquet_rows(unit, text_key)
        elif unit.kind == "text":
            yield Row(1, _text(unit))
        else:
            yield from (_lines if unit.kind == "lines" else _array)(unit, made, Row)


def pairs(unit: Unit, keys: tuple[str, str]) -> Iterator[tuple[Row, Row]]:
    """The texts of two keys of every row, a row each, as `rows` gives the text of one."""
    for record in records(unit):
        first, second = (
            Row(record.number, None, record.problem)
            if record.fields is None
            else _row(record.number, record.fields, key)
            for key in keys
        )
        yield first, second


def records(unit: Unit) -> Iterator[Record]:
    """Every row of a unit with all its fields, as `rows` gives their texts; a text file is {"text": ...}."""
    with _named(Path(unit.path)):
        if unit.kind == "parquet":
            yield from _parquet_records(unit)
        elif unit.kind == "text":
            yield Record(1, {"text": _text(unit)})
        else:
            yield from (_lines if unit.kind == "lines" else _array)(unit, _record, Record)


def numbers(unit: Unit) -> int:
    """How many row numbers a unit of a file that has several takes: what a later unit's numbers start from."""
    with _named(Path(unit.path)):
        if unit.kind == "parquet":
            groups = _parquet(Path(unit.path)).metadata
            return sum(groups.row_group(i).num_rows for i in range(unit.start, unit.stop))
        if unit.kind != "lines":
            raise ValueError(f"a {unit.kind} file is one unit")
        with open(unit.path, "rb") as file:  # a line begins behind a newline, the first one at the file's beginning
            file.seek(max(0, unit.start - 1))
            left, count = unit.stop - max(1, unit.start), int(unit.start == 0 < unit.stop)
            while left > 0 and (part := file.read(min(left, _READ))):
                left, count = left - len(part), count + part.count(b"\n")
        return count


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet" and name == path.name:
        return "parquet"
    if suffix == ".txt":
        return "text"
    if suffix not in (".jsonl", ".json"):
        known = ".jsonl, .json, .txt (each also .gz or .zst) and .parquet"
        raise SteelError(f"files that end in {path.suffix or 'nothing'} are not known", path, f"known are {known}")
    with _named(path), _open(path) as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    return "array" if head.startswith(b"[") else "lines"


def _open(path: Path) -> IO[bytes]:
    if (
        path.suffix in (".gz", ".zst") and path.stat().st_size == 0
    ):  # what a failed download leaves; no format allows it
        raise EOFError("a compressed file of 0 bytes is none")
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    return io.BufferedReader(_Zstd(path), 1 << 20) if path.suffix == ".zst" else open(path, "rb")


class _Zstd(io.RawIOBase):
    """Frames of a .zst file, one after another; a cut file is an error (the library's own reader says nothing)."""

    def __init__(self, path: Path):
        import zstandard

        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj  # of `zstd --long`, too
        self._file = open(path, "rb")  # noqa: SIM115  (closed with this object)
        self._frame, self._ready, self._fed = self._new_frame(), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            packed = (self._frame.unused_data if self._frame.eof else b"") or self._file.read(1 << 17)
            if self._frame.eof:
                self._frame, self._fed = self._new_frame(), False
            if not packed:
                if self._fed:
                    raise EOFError("the compressed file ended before its last frame did")
                return 0
            self._fed, self._ready = True, self._frame.decompress(packed)
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what a broken file makes its library say into one error that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SteelError(f"the file cannot be read: {error}", path, "fetch it again, or leave it out") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("pyarrow", "zstandard"):
            raise
        raise SteelError(f"the file cannot be read: {error}", path, "fetch it again, or leave it out") from None


def _lines(unit: Unit, made: Made[R], bad: Bad[R]) -> Iterator[R]:
    """A line belongs to the range in which it begins."""
    path = Path(unit.path)
    plain = path.suffix not in (".gz", ".zst")
    with _open(path) as file:
        at = unit.start
        if plain and unit.start:
            file.seek(unit.start - 1)
            at += len(file.readline()) - 1
        for number, line in enumerate(file, 1):
            if plain and at >= unit.stop:
                return
            at += len(line)
            if number == 1 and unit.start == 0:
                line = line.removeprefix(_BOM)
            yield _of_line(number, line, made, bad)


def _of_line(number: int, line: bytes, made: Made[R], bad: Bad[R]) -> R:
    if not line.strip():
        return bad(number, None)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return bad(number, None, f"not JSON ({error})")
    return made(number, value)


def _record(number: int, value: Any) -> Record:
    if not isinstance(value, dict):
        return Record(number, None, f"a JSON {type(value).__name__}, not an object")
    return Record(number, value)


def _row(number: int, value: Any, text_key: str) -> Row:
    if not isinstance(value, dict):
        return Row(number, None, f"a JSON {type(value).__name__}, not an object")
    if text_key not in value:
        return Row(number, None, f"no key {text_key!r} (it has: {', '.join(map(str, list(value)[:8])) or 'none'})")
    return _checked(number, value[text_key], text_key)


def _checked(number: int, text: Any, text_key: str) -> Row:
    if text is None:
        return Row(number, "")  # an empty document, as the corpora mean it
    if not isinstance(text, str):
        return Row(number, None, f"{text_key!r} holds a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Row(number, None, f"{text_key!r} holds half a character (a lone surrogate)")
    return Row(number, text)


def _array(unit: Unit, made: Made[R], bad: Bad[R]) -> Iterator[R]:
    """Elements of one JSON array, without holding the array; nothing may follow it."""
    decoder, number, line, size = json.JSONDecoder(), 0, 1, _READ
    with _open(Path(unit.path)) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        buffer = file.read(size)
        at = buffer.index("[") + 1
        while True:
            at = _GAP.match(buffer, at).end()  # type: ignore[union-attr]
            if buffer.startswith("]", at):
                rest = itertools.chain([buffer[at + 1 :]], iter(lambda: file.read(_READ), ""))
                if any(part and not part.isspace() for part in rest):
                    raise _not_an_array(unit, line + buffer.count("\n", 0, at), f"text behind its {number} elements")
                return
            value, end, problem, complete = _element(decoder, buffer, at)
            if not problem:
                number, at, size = number + 1, end, _READ
                yield made(number, value)
                continue
            more = "" if complete or len(buffer) - at > _MAX_ELEMENT else file.read(size)
            line += buffer.count("\n", 0, at)
            if not more:
                raise _not_an_array(unit, line, f"element {number + 1} of its JSON array: {problem}")
            buffer, at, size = buffer[at:] + more, 0, size * 2


def _element(decoder: json.JSONDecoder, buffer: str, at: int) -> tuple[Any, int, str, bool]:
    """The value at `at`, its end, what is wrong with it, and whether that stays wrong when more is read."""
    try:
        value, end = decoder.raw_decode(buffer, at)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - _CUT_SHORT
        return None, at, error.msg, not cut
    except (ValueError, RecursionError) as error:
        return None, at, str(error), True
    if _AFTER_ELEMENT.match(buffer, end):  # a number at the end of the buffer might go on
        return value, end, "", True
    return None, at, "no comma and no ] behind it", end < len(buffer) - _CUT_SHORT


def _not_an_array(unit: Unit, line: int, problem: str) -> SteelError:
    remedy = "mend it, or write one JSON object a line"
    return SteelError(f"the file cannot be read: {problem}", f"{unit.path}:{line}", remedy)


def _parquet(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)


def _parquet_rows(unit: Unit, text_key: str) -> Iterator[Row]:
    file = _parquet(Path(unit.path))
    names = file.schema_arrow.names
    if text_key not in names:
        raise SteelError(f"there is no column {text_key!r}", unit.path, f"--text-key: one of {', '.join(names)}")
    number = 0
    for batch in file.iter_batches(256, row_groups=list(range(unit.start, unit.stop)), columns=[text_key]):
        for text in _values(batch.column(0)):
            number += 1
            yield _checked(number, text, text_key) if text is not _BAD_UTF8 else Row(number, None, _NOT_UTF8)


def _parquet_records(unit: Unit) -> Iterator[Record]:
    number = 0
    for batch in _parquet(Path(unit.path)).iter_batches(256, row_groups=list(range(unit.start, unit.stop))):
        columns = [_values(column) for column in batch.columns]
        for values in zip(*columns, strict=True):
            number += 1
            bad = any(value is _BAD_UTF8 for value in values)
            yield (
                Record(number, None, _NOT_UTF8)
                if bad
                else Record(number, dict(zip(batch.schema.names, values, strict=True)))
            )


def _values(column: Any) -> list[Any]:
    """A column's values; `_BAD_UTF8` for a string that is not UTF-8, which parquet does not check."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(column, i) for i in range(len(column))]


def _value(column: Any, place: int) -> Any:
    try:
        return column[place].as_py()
    except UnicodeDecodeError:
        return _BAD_UTF8


def _text(unit: Unit) -> str:
    with _open(Path(unit.path)) as file:
        data = file.read(_MAX_TEXT_BYTES + 1)
    if len(data) > _MAX_TEXT_BYTES:
        what = f"a text file is one document, and this one is larger than {_MAX_TEXT_BYTES >> 20} MB"
        raise SteelError(what, unit.path, "cut it into documents: one JSON object a line in a .jsonl file")
    return data.decode("utf-8-sig")
