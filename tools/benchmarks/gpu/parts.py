"""The three parts: what is measured in which order, the most important first, and what is left for the next call.

Each knows its time; a measurement that would not fit is left for the next call, which goes on there.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu import asked, report, sizes, ways
from gpu.ask import ask
from gpu.store import Store, code_digest

Row = dict[str, Any]
LEAST_SECONDS = 40
"""Below this no process is started: it would be killed before it says anything."""
MEASURE_SECONDS = 150
"""What one recipe's implementation may take: the share of it in a part."""
CHECK_GROUPS = ("head", "adam", "liger", "steps zh-1b", "steps tiny", "pieces", "documents", "resume", "export")


@dataclass
class Suite:
    """One call: where results go, until when it may run, and what every measuring process is told."""

    store: Store
    toy: bool
    seconds: float
    limit: int = 64
    """The largest micro-batch."""
    common: Row = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    """Apex, where it was built."""
    left_out: int = 0
    """Measurements that there was no time for."""

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    def ask(self, task: Row, most: float = MEASURE_SECONDS) -> tuple[list[Row], str]:
        """As `ask.ask`, within what is left. Notes and facts of the machine are kept here."""
        rows, problem = ask(task | self.common | {"toy": self.toy}, min(most, self.left()), self.paths)
        for row in rows:
            if row["kind"] == "device":
                self.store.facts({k: v for k, v in row.items() if k != "kind"})
            if row["kind"] == "note":
                self.store.note(row["text"])
        return rows, problem

    def left(self) -> float:
        return self._end - time.monotonic()

    def may_start(self) -> bool:
        if self.toy or self.left() >= LEAST_SECONDS:
            return True
        self.left_out += 1
        return False

    def cut_off(self) -> bool:
        """True where the last process was killed because the part's time was over, not its own."""
        if self.toy or self.left() > 1:
            return False
        self.left_out += 1
        return True


def build_apex(suite: Suite, checkout: Path | None) -> None:
    """Where apex's source is, build its Adam; else say that it did not run."""
    reason = "no source given (--apex DIR, a checkout of NVIDIA's repository)"
    if checkout is not None:
        folder = Path.home() / ".cache" / "megatron-steel-apex" / str(checkout.absolute()).strip("/").replace("/", "-")
        task = {"task": "apex", "checkout": str(checkout.absolute()), "folder": str(folder)}
        rows, problem = suite.ask(task, most=300)
        built = [r for r in rows if r["kind"] == "apex"]
        suite.paths = built[0]["paths"] if built else []
        reason = built[0]["reason"] if built else problem
        if suite.paths:
            suite.store.code = code_digest(str(checkout.absolute()))
    if reason:
        print(f"apex: not run: {reason}")
    suite.store.facts({"apex": f"not run: {reason}" if reason else f"built from {checkout}"})


def correctness(suite: Suite) -> None:
    """Every group of checks in a process of its own; what it said stays, also where it then died."""
    for group in CHECK_GROUPS:
        if suite.store.knows("checks", group):
            continue
        if not suite.may_start():
            continue
        rows, problem = suite.ask({"task": "checks", "group": group}, most=240)
        checks = [r for r in rows if r["kind"] == "check"]
        if problem and suite.cut_off():
            continue
        if problem:
            checks.append({"name": f"the process of {group} itself", "status": "fail", "measured": None,
                           "tolerance": None, "reason": problem})  # fmt: skip
        for check in checks:
            print(f"  {report.check_line(check)}")
        suite.store.put("checks", group, checks)


def throughput(suite: Suite, names: list[str]) -> None:
    """The ceilings; then every recipe by every implementation; then where the time goes of a recipe below its floor."""
    shipped = _shipped(suite, names)
    _once(suite, "ceilings", "ceilings", {"task": "ceilings"}, "ceiling")
    for name, way in ways.throughput_order(shipped):
        key = f"{name} / {way.name}"
        if suite.store.knows("throughput", key) or not suite.may_start():
            continue
        print(f"{key}")
        rows = measure(suite, key, {"recipe": name, "way": way.name, "overrides": []}, _first_size(suite, name, way))
        if rows:
            found = [report.with_shares(r) | {"recipe": name, "way": way.name, "peer": way.peer} for r in rows]
            suite.store.put("throughput", key, found)
            print(f"  {max(r['tokens_per_second'] for r in rows):,.0f} tokens/s")
    for name in shipped:
        if asked.below_floor(suite.store.results["throughput"], name):
            profile(suite, name)


def profile(suite: Suite, name: str) -> None:
    size = _best_size(suite, name) or 8
    _once(suite, "profiles", name, {"task": "profile", "recipe": name, "micro_batch": size}, "profile", recipe=name)


def ablation(suite: Suite, names: list[str]) -> None:
    """One change at a time at the micro-batch that throughput found best; the head by itself; the first row again."""
    _once(suite, "heads", "head", {"task": "head"}, "head")
    for name in _shipped(suite, names):
        changes = ways.TOY_ABLATION if suite.toy else ways.ABLATION
        last = [] if suite.toy else [ways.AS_IT_IS]  # a clock that slows down shows as a difference to the first
        for number, change in enumerate([*changes, *last]):
            again = change is ways.AS_IT_IS and number > 0
            key = f"{name} / {change.name}{' (again)' if again else ''}"
            if suite.store.knows("ablation", key) or not suite.may_start():
                continue
            print(f"{key}")
            size = _best_size(suite, name) or (1 if suite.toy else 8)
            task = {"recipe": name, "way": ways.AUTO.name, "overrides": list(change.overrides)}
            rows = measure(suite, key, task, size, doubling=False)
            if rows:
                row = report.with_shares(rows[-1]) | {"recipe": name, "change": change.name, "group": change.group}
                suite.store.put("ablation", key, [row | {"again": again}])


def measure(suite: Suite, key: str, task: Row, size: int, doubling: bool = True) -> list[Row]:
    """The `speed` rows of a task, one a micro-batch: upwards from `size`, or halved while not even that fits."""
    alone = ways.WAYS[task["way"]].own_process_per_size
    found: list[Row] = []
    while size >= 1:
        limit = suite.limit if doubling and not alone else size
        if suite.toy:
            limit = min(limit, 2 * size)
        rows, problem = suite.ask({"task": "measure", **task, "micro_batch": size, "limit": limit})
        refused = [r["reason"] for r in rows if r["kind"] == "cannot run"]
        done = [r for r in rows if r["kind"] == "speed"]
        if refused:
            suite.store.gap(key, refused[0])
            return found
        found += [row | {"cut_off": True} for row in done] if problem and suite.cut_off() else done
        full = any(r["kind"] == "out of memory" for r in rows)
        if done and alone and doubling and not problem and _worth_doubling(suite, found):
            size *= 2
        elif done or (found and full):
            return found
        elif full:
            size //= 2
        else:
            if not (problem and suite.cut_off()):
                suite.store.gap(key, problem or "no answer")
            return found
    suite.store.gap(key, "out of memory at one sample")
    return found


def _worth_doubling(suite: Suite, found: list[Row]) -> bool:
    """Whether twice the last micro-batch may fit and the last one was faster than the one before."""
    device, last = suite.store.results["facts"].get("device_gib"), found[-1]
    if suite.toy or not device or 2 * last["micro_batch"] > suite.limit or suite.left() < LEAST_SECONDS:
        return False
    faster = len(found) < 2 or last["tokens_per_second"] > 1.01 * found[-2]["tokens_per_second"]
    return faster and 1.8 * last["memory_gib"] < device


def _first_size(suite: Suite, name: str, way: ways.Way) -> int:
    """Ours doubles from the bottom; the others begin where ours was best, and go both ways from there."""
    best = _best_size(suite, name)
    if best and way is not ways.AUTO:
        return best
    return sizes.first_micro_batch(suite.toy, 1024 if name == "nanogpt-124m" else 2048)


def _best_size(suite: Suite, name: str) -> int | None:
    rows = suite.store.rows("throughput", recipe=name, way=ways.AUTO.name)
    return max(rows, key=lambda r: r["tokens_per_second"])["micro_batch"] if rows else None


def _once(suite: Suite, table: str, key: str, task: Row, kind: str, **more: Any) -> None:
    """A measurement that is one process and one table."""
    if suite.store.knows(table, key) or not suite.may_start():
        return
    print(key)
    rows, problem = suite.ask(task)
    if problem:
        if not suite.cut_off():
            suite.store.gap(key, problem)
        return
    suite.store.put(table, key, [r | more for r in rows if r["kind"] == kind])


def _shipped(suite: Suite, names: list[str]) -> list[str]:
    missing = sizes.missing_recipes(names)
    for name in names:
        if name in missing:
            suite.store.gap(name, "this tree ships no such recipe")
        else:
            suite.store.close(name)
    return [name for name in names if name not in missing]
