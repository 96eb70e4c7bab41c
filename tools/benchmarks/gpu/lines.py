"""How a measuring process speaks to the suite: one marked JSON line per result, anything else is chatter.

A line is out as soon as its result is known, so that a crash or the time limit loses only what comes after it.
"""

import json
from typing import Any

_MARK = "@gpu_suite "


def say(kind: str, **values: Any) -> None:
    """Send one result; `kind` is device, check, probe, speed, piece or note."""
    print(_MARK + json.dumps({"kind": kind, **values}), flush=True)


def heard(output: str) -> list[dict[str, Any]]:
    """The results in a process's standard output, in order; a line cut off by a kill is left out."""
    rows = []
    for line in output.splitlines():
        if line.startswith(_MARK):
            try:
                rows.append(json.loads(line[len(_MARK) :]))
            except json.JSONDecodeError:
                continue
    return rows
