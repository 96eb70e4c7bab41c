"""Where the time of a run went: its starts and how each ended, productive seconds, lost steps, GPU-hours.

Pure: lines of files in, figures out.

- A start is what `starts.jsonl` says; where the supervisor has noted its end, that line gives exit code and cause, and its
  times, which hold what comes before the first step too.
- Productive are the seconds of the steps that are still part of the run: `metrics.jsonl` is cut back at each resume, so
  that steps made twice count once. Goodput is their share of the time since the first start.
"""

import itertools
import os
import socket
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from megatron_steel.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED
from megatron_steel.run_report.kinds import Row
from megatron_steel.run_report.read import RunFiles

ASIDE = ("validation", "samples", "save")  # parts of a step's time that are no training


@dataclass(frozen=True)
class Start:
    """One start of the run; times in seconds since 1970.

    `reached`: the last step it is known to have made. `ended`: its last sign of life where nothing says how it ended
    (`noted` is False).
    """

    began: float
    ended: float
    noted: bool
    from_step: int | None
    reached: int | None
    ranks: int
    exit_code: int | None = None
    cause: str = ""


@dataclass(frozen=True)
class Account:
    """Seconds by what they were spent on; they add up to `wall`. `idle`: no process ran. `rest`: starting, loading, work
    that was lost, and an evaluation or a save with which a start ended (no later line holds its seconds)."""

    wall: float
    training: float
    validation: float
    samples: float
    save: float
    idle: float
    rest: float

    @property
    def goodput(self) -> float | None:
        return self.training / self.wall if self.wall > 0 else None


def starts_of(run: RunFiles) -> list[Start]:
    """In order. Empty where the run was recorded before starts were noted and had no supervisor.

    One pass over each file: a run may have thousands of starts and millions of lines.
    """
    begins = sorted((r for r in run.starts if r["event"] == "start"), key=lambda row: row["time"])
    times = [row["time"] for row in begins]
    ends = _latest(times, [r for r in run.starts if r["event"] == "end"], "time")
    signs = _latest(times, [*run.training, *run.validation, *run.samples], "time")
    steps = _latest(times, run.training, "step")
    launches = sorted(run.launches, key=lambda row: row["began"])
    launched = [row["began"] for row in launches]
    found, known = [], set()
    for i, line in enumerate(begins):
        began = line["time"]
        at = bisect_right(launched, began) - 1
        launch = launches[at] if at >= 0 and began <= launches[at]["ended"] else None
        reached = [*([steps[i]] if i in steps else []), *([launch["step"]] if launch else [])]
        known |= {at} if launch else set()
        found.append(
            Start(
                began=launch["began"] if launch else began,
                ended=launch["ended"] if launch else max(began, ends.get(i, began), signs.get(i, began)),
                noted=bool(launch or i in ends),
                from_step=line["from_step"],
                reached=max(reached, default=None),
                ranks=line.get("ranks", 1),
                exit_code=launch["exit_code"] if launch else None,
                cause=launch["cause"] if launch else "",
            )
        )
    ranks = found[-1].ranks if found else run.environment.get("world_size", 1)
    found += [
        Start(x["began"], x["ended"], True, None, x["step"] or None, ranks, x["exit_code"], x["cause"])
        for at, x in enumerate(launches)
        if at not in known
    ]
    return sorted(found, key=lambda start: start.began)


def _latest(begins: list[float], rows: list[Row], key: str) -> dict[int, float]:
    """The largest value in the rows of each start, by the start's number; rows without a time are nobody's."""
    found: dict[int, float] = {}
    for row in rows:
        start = bisect_right(begins, row.get("time", -1)) - 1
        if start >= 0:
            found[start] = max(row[key], found.get(start, row[key]))
    return found


def account_of(run: RunFiles, starts: list[Start]) -> Account | None:
    """None where the files hold no times."""
    if not starts:
        return None
    wall = max(s.ended for s in starts) - starts[0].began
    idle = sum(max(0.0, b.began - a.ended) for a, b in itertools.pairwise(starts))
    begins = [s.began for s in starts]
    parts, before = dict.fromkeys(("training", *ASIDE), 0.0), 0
    for row in run.training:
        aside = {name: row.get(f"seconds_{name}", 0.0) for name in ASIDE}
        # A mean is over the steps since the last line or since the start, whichever was later.
        start = starts[max(0, bisect_right(begins, row.get("time", 0)) - 1)]
        averaged = row["step"] - max(before, min(start.from_step or 0, row["step"]))
        for name, seconds in aside.items():
            parts[name] += averaged * seconds
        parts["training"] += (row["step"] - before) * max(0.0, row.get("seconds_step", 0.0) - sum(aside.values()))
        before = row["step"]
    rest = wall - idle - sum(parts.values())
    return Account(wall=wall, idle=idle, rest=max(0.0, rest), **parts)


def lost_steps(starts: list[Start]) -> int:
    """Steps that were made and had to be made again, as far as somebody noted how far a start had come."""
    trained = [s for s in starts if s.from_step is not None]
    return sum(
        max(0, a.reached - b.from_step)
        for a, b in itertools.pairwise(trained)
        if a.reached is not None and b.from_step is not None
    )


def gpu_hours(starts: list[Start]) -> float:
    """Ranks times hours, of all starts."""
    return sum(s.ranks * (s.ended - s.began) for s in starts) / 3600


def state_of(run: RunFiles, starts: list[Start]) -> tuple[str, str]:
    """(one of running, done, stopped, failed, unknown; the same in words)."""
    step, steps = steps_of(run)
    if steps is not None and step >= steps:
        return "done", "complete"
    if not starts:
        return "unknown", "nothing is noted of its starts"
    last = starts[-1]
    if not last.noted:
        alive = _lives(run.holder)
        words = {True: f"running (process {run.holder})", False: "ended without a word", None: "running, or killed"}
        return {True: "running", False: "failed", None: "unknown"}[alive], words[alive]
    if last.exit_code is None:
        return "stopped", f"ended at step {step:,}"
    if last.exit_code == EXIT_DONE:
        return "done", "complete"
    if last.exit_code == EXIT_STOPPED:
        return "stopped", f"stopped on request at step {last.reached or step:,}"
    kind = "bad configuration or data" if last.exit_code == EXIT_BAD_INPUT else "failed"
    return "failed", f"{kind} (exit code {last.exit_code}): {last.cause}"


def steps_of(run: RunFiles) -> tuple[int, int | None]:
    """The newest step that is known, and how many the run shall have."""
    newest = max([r["step"] for r in run.training] + [c["step"] for c in run.checkpoints], default=0)
    wanted = [r["steps"] for r in run.starts if r.get("steps")]
    return newest, wanted[-1] if wanted else None


def seconds_left(run: RunFiles) -> float | None:
    """By the time of the last ten logged steps, without evaluations and saves."""
    step, steps = steps_of(run)
    last: list[Row] = [r for r in run.training[-10:] if r.get("seconds_step")]
    if steps is None or not last:
        return None
    seconds = sorted(r["seconds_step"] - sum(r.get(f"seconds_{name}", 0.0) for name in ASIDE) for r in last)
    return max(0, steps - step) * seconds[len(seconds) // 2]


def _lives(holder: str) -> bool | None:
    """Whether the process of a lock lives; None: it is on another machine, or unknown."""
    pid, _, host = holder.partition(" ")
    if not pid.isdigit() or host != socket.gethostname():
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return Path("/proc", pid).is_dir()
