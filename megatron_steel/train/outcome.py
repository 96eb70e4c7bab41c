"""How a start of the job ended, from what its ranks reported; the launcher's own exit code is only a hint.

`deepspeed` ends with 0 when its node launcher is killed, with 247 when a rank is, and with 1 or 143 when it is told to
stop. So a job is done when every rank said 0, stopped when every rank said 75, and everything else is a failure, whose
first cause is looked for here. Pure: reports in, `Outcome` out.
"""

import re
import signal
from dataclasses import dataclass
from typing import Any

from megatron_steel.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED

_SHOWN_LINES = 60


@dataclass(frozen=True)
class Outcome:
    """`exit_code` is one of `errors.py`; `cause` one line; `detail` the failing rank's traceback, if it left one."""

    exit_code: int
    step: int
    cause: str
    detail: str = ""

    @property
    def kind(self) -> str:
        """Equal for two failures of the same kind at the same step, whatever their process numbers."""
        return f"{re.sub(r'[0-9]+', '#', self.cause)} after step {self.step}"


def judge(reports: list[dict[str, Any]], launcher_code: int, killed: set[int], asked: bool, node: str = "") -> Outcome:
    """The outcome of one start.

    Args:
        reports: of `report.read_all`, after every process has ended.
        launcher_code: the `returncode` of `deepspeed`: negative where a signal killed it; of several nodes, that of `node`,
            where it failed first (255: the way to it is lost).
        killed: processes that the supervisor had to end.
        asked: somebody wanted the job to stop, so that it does not matter what else the same hand has ended.
    """
    launcher = f"the launcher{' on ' + node if node else ''} {said(launcher_code)}"
    if not reports:
        return Outcome(EXIT_INTERNAL, 0, f"{launcher} before any rank had begun", "see its lines above")
    step = max(r["step"] for r in reports)
    codes = [r["exit_code"] for r in reports]
    complete = len(reports) == reports[0]["world_size"]
    if complete and set(codes) == {EXIT_DONE}:
        return Outcome(EXIT_DONE, step, "the run is complete")
    lost = any(r["launcher_lost"] for r in reports) and not asked
    if complete and set(codes) == {EXIT_STOPPED}:
        cause = f"{launcher} while the run went on" if lost else "stopped on request"
        return Outcome(EXIT_INTERNAL if lost else EXIT_STOPPED, step, cause)
    bad_input = [r for r in reports if r["exit_code"] == EXIT_BAD_INPUT]
    if bad_input:
        told = next((r for r in bad_input if r["error"]), bad_input[0])
        return Outcome(EXIT_BAD_INPUT, step, f"rank {told['rank']} found bad configuration or data", _tail(told))
    silent = [r for r in reports if r["exit_code"] is None and r["pid"] not in killed]
    if silent and not lost:  # the others' errors follow from it
        names = ", ".join(f"{r['rank']} (process {r['pid']} on {r['host']})" for r in silent)
        also = _first_error(reports)
        cause = f"rank {names} was killed without a word; {launcher}"
        return Outcome(EXIT_INTERNAL, step, cause, _tail(also) if also else "")
    first = _first_error(reports)
    if first is None:
        return Outcome(EXIT_INTERNAL, step, launcher)
    cause = f"rank {first['rank']} (process {first['pid']} on {first['host']}) failed first: {_last_line(first)}"
    return Outcome(EXIT_INTERNAL, max(step, first["step"]), cause, _tail(first))


def said(code: int) -> str:
    """An exit code in words. Launchers fold a signal into it in three ways: -9, 247 (-9 in a byte) and 137 (128 + 9)."""
    number = -code if code < 0 else 256 - code if code > 192 else code - 128 if code > 128 else None
    names = {s.value: s.name for s in signal.Signals}
    return f"ended with {names[number]} (exit code {code})" if number in names else f"ended with exit code {code}"


def _first_error(reports: list[dict[str, Any]]) -> dict[str, Any] | None:
    failed = [r for r in reports if r["exit_code"] not in (None, EXIT_DONE, EXIT_STOPPED)]
    return min(failed, key=lambda r: r["ended"], default=None)


def _last_line(report: dict[str, Any]) -> str:
    """The exception of a traceback, or what an error of ours says first."""
    lines = [line for line in report["error"].splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error: ")]
    return (ours or lines or ["no message"])[-1].removeprefix("error: ")


def _tail(report: dict[str, Any]) -> str:
    return "\n".join(report["error"].splitlines()[-_SHOWN_LINES:])
