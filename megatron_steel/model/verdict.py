"""`audit.json`: what an audit found out about a model, in its run folder and in its exports.

The rooms that export, score and generate read the verdict here; they know nothing of how an audit works. `causal` is true,
false, or null where the instrument could not find out.
"""

import json
from pathlib import Path
from typing import Any

from megatron_steel import dist

AUDIT = "audit.json"


def read_verdict(folder: Path) -> dict[str, Any] | None:
    """The report that lies in a folder; None: there is none. One that cannot be read is said and counts as none."""
    file = folder / AUDIT
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return {"causal": report["causal"], **report}
    except (OSError, ValueError, KeyError, TypeError) as error:
        dist.log.warning("%s is no report of an audit and is left aside: %r", file, error)
        return None


def write_verdict(folder: Path, report: dict[str, Any]) -> None:
    """Write a report (plain JSON values only)."""
    (folder / AUDIT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sees_future(config: Any, report: dict[str, Any] | None) -> bool:
    """Whether a model's loss is known to be no language-model loss: by its configuration, or by its audit."""
    return bool(getattr(config, "sees_future", False)) or (report is not None and report["causal"] is False)
