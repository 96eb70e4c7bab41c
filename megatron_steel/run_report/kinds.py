"""What the values in a run's files may be. Pure: what JSON gave in, rows of the right kinds out.

Files are damaged, and edited by hand: a row that lacks what it is read for is left out, and so is a value of another kind
than its key's. What `clean` lets through, no later step of the report has to ask about.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
Kind = Callable[[Any], bool]

_LARGEST = 3.4e38  # of float32, in which a run counts its numbers; far below what a plot's axis can span
_LAST_DATE = 253_402_214_400  # 9999-12-31: a later moment has no date


def number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def count(value: Any) -> bool:
    return number(value) and value >= 0


def time(value: Any) -> bool:
    return count(value) and value < _LAST_DATE


def text(value: Any) -> bool:
    return isinstance(value, str)


def number_or_none(value: Any) -> bool:
    return value is None or number(value)


def anything(value: Any) -> bool:
    return True


def _verdict(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _files(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(f, dict) and count(f.get("size")) for f in value.values())


def _data_sets(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(d, dict) and text(d.get("name")) and count(d.get("tokens")) for d in value
    )


@dataclass(frozen=True)
class Kinds:
    """Of one file's rows: keys without which a row is of no use, keys it may have, and every other key."""

    needed: dict[str, Kind] = field(default_factory=dict)
    known: dict[str, Kind] = field(default_factory=dict)
    others: Kind = anything

    def clean(self, row: Any) -> tuple[Row | None, bool]:
        """The row as far as it is right (None: it is of no use), and whether something was wrong.

        A null is what a run writes where it has no number: left out, and nothing wrong.
        """
        if not isinstance(row, dict):
            return None, True
        expected = self.needed | self.known
        kept = {key: value for key, value in row.items() if expected.get(key, self.others)(value)}
        if not self.needed.keys() <= kept.keys():
            return None, True
        return kept, any(row[key] is not None for key in row.keys() - kept.keys())


METRICS = Kinds({"step": count, "tokens": count}, {"time": time, "loss": number_or_none}, others=number)
SAMPLES = Kinds({"step": count, "prompt": text, "text": text}, {"time": time})
STARTS = Kinds({"event": text, "time": time, "from_step": count}, {"steps": count, "ranks": count})
LAUNCHES = Kinds({"began": time, "ended": time, "step": count, "exit_code": number, "cause": text})
MANIFEST = Kinds({"step": count, "tokens": count, "files": _files}, {"data": _data_sets, "world_size": count})
ENVIRONMENT = Kinds({}, {"versions": _mapping, "world_size": count, "command": _list})
AUDIT = Kinds({"causal": _verdict})
