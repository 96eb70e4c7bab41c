"""What a GPU is to show: fused pieces equal their plain twins, and how fast the 1B recipes train beside plain PyTorch.

    python tools/benchmarks/gpu_suite.py --parity
    python tools/benchmarks/gpu_suite.py --speed [RECIPE ...]
    python tools/benchmarks/gpu_suite.py --toy --parity --speed --out /tmp/toy      tiny sizes, also on a CPU

Each part takes less than 9 minutes on one GPU and needs no network; both may be asked for at once. Every measurement
runs in a fresh process, so that neither memory nor DeepSpeed's state leaks into the next, and implementations
alternate, so that a clock that slows down slows all of them. `results.json` and `README.md` in the output folder are
written anew after every measurement; a part run later joins what is there. Exit code 1 when a parity check failed.

Except for toys this process imports neither torch nor DeepSpeed: it must not hold memory on the device.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from gpu import lines, report, sizes  # noqa: E402

PART_SECONDS = 525
RECIPE_SECONDS = 165
ROUNDS = 2
Row = dict[str, Any]


def main() -> int:
    options = _parser().parse_args()
    if options.child:
        return _child(json.loads(options.child))
    if options.speed is None and not options.parity and options.profile is None:
        _parser().error("ask for a part: --parity, --speed or --profile")
    device, driver = _gpu()
    if device is None and not options.toy:
        print("error: no GPU here (nvidia-smi finds none)\n  do: use --toy for tiny sizes on a CPU", file=sys.stderr)
        return 78
    suite = Suite(options, device, driver)
    if options.parity:
        suite.parity()
    names = list(sizes.TOY_RECIPES if options.toy else sizes.RECIPES)
    if options.speed is not None:
        suite.speed(options.speed or names)
    if options.profile is not None:
        suite.profiles(options.profile or names)
    print(f"results: {suite.out / 'README.md'}")
    failed = options.parity and any(c["status"] == "fail" for c in suite.results["checks"])
    return 1 if failed else 0


class Suite:
    """One run of the suite: starts processes, collects what they say, writes it down."""

    def __init__(self, options: argparse.Namespace, device: str | None, driver: str | None):
        self.toy, self.limit, self.build = options.toy, options.largest_micro_batch, options.build_deepspeed_adam
        today = datetime.date.today().isoformat()
        named = re.sub(r"[^a-z0-9]+", "-", (device or "cpu").lower()).strip("-")
        self.out = options.out or ROOT / "docs" / "benchmarks" / f"gpu-{named}-{today}"
        self.out.mkdir(parents=True, exist_ok=True)
        facts = {"date": today, "toy": self.toy, "driver": driver, **_commit()}
        empty: Row = {"checks": [], "throughput": [], "probes": [], "heads": [], "notes": [], "profiles": []}
        before = self.out / "results.json"
        self.results = json.loads(before.read_text()) if before.is_file() else empty
        if self.results.get("facts", facts)["toy"] != self.toy:
            raise SystemExit(f"error: {before} holds results of another kind (toy or real)\n  do: choose another --out")
        self.results["facts"] = self.results.get("facts", {}) | facts

    def parity(self) -> None:
        print("parity")
        rows, problem = self.ask({"task": "parity", "build": self.build}, PART_SECONDS)
        checks = [r for r in rows if r["kind"] == "check"]
        if problem:
            checks.append({"name": "the parity process itself", "status": "fail", "measured": None, "tolerance": None,
                           "reason": problem})  # fmt: skip
        self.results["checks"] = checks
        for check in checks:
            print(f"  {report.check_line(check)}")
        self.write()

    def speed(self, names: list[str]) -> None:
        end = time.monotonic() + PART_SECONDS
        for name in names:
            self.recipe(name, min(end, time.monotonic() + RECIPE_SECONDS))
        if end - time.monotonic() < 20:
            return self.note("head: not run: the part's time was over")
        print("head")
        rows, problem = self.ask({"task": "head"}, end - time.monotonic())
        self.results["heads"] = [r for r in rows if r["kind"] == "head"]
        if problem:
            self.note(f"head: {problem}")
        self.write()

    def recipe(self, name: str, end: float) -> None:
        """Find micro-batches, then measure all implementations in turn, `ROUNDS` times."""
        print(f"speed {name}")
        for kind in ("throughput", "probes"):
            self.results[kind] = [r for r in self.results[kind] if r["recipe"] != name]
        chosen = {way: self.probe(name, way, end) for way in ("ours auto", "plain")}
        chosen["ours zero3"] = chosen["ours auto"]
        for round_number in range(1, ROUNDS + 1):
            for way in ("ours auto", "plain", "ours zero3"):
                if chosen[way] is None:
                    continue
                if round_number > 1 and end - time.monotonic() < 25:
                    self.note(f"{name}, {way}, round {round_number}: not run: the recipe's time was over")
                    continue
                chosen[way] = self.measure(name, way, chosen[way], round_number, end)

    def probe(self, name: str, way: str, end: float) -> int | None:
        """The fastest micro-batch among those that fit, doubled up to the limit; halved while not even the first does."""
        first = 1 if self.toy else 8
        limit = min(self.limit, sizes.samples_per_step(self.toy))
        while first >= 1:
            task = {"task": "probe", "recipe": name, "way": way, "first": min(first, limit), "limit": limit}
            rows, problem = self.ask(task, end - time.monotonic())
            probes = [r | {"recipe": name, "way": way} for r in rows if r["kind"] == "probe"]
            self.results["probes"] += probes
            fits = [r for r in probes if r["fits"]]
            if fits:
                best = max(fits, key=lambda r: r["tokens_per_second"])
                print(f"  {way}: micro-batches {[r['micro_batch'] for r in fits]} fit; taken: {best['micro_batch']}")
                return best["micro_batch"]
            if not probes:
                self.note(f"{name}, {way}: not run: {problem or 'no answer'}")
                return None
            first, limit = first // 2, first // 2
        self.note(f"{name}, {way}: not run: not even a micro-batch of one sample fits")
        return None

    def measure(self, name: str, way: str, micro_batch: int, round_number: int, end: float) -> int | None:
        """One row of throughput. Returns the micro-batch that worked: smaller, where whole steps need more memory."""
        while micro_batch >= 1:
            task = {"task": "measure", "recipe": name, "way": way, "micro_batch": micro_batch}
            rows, problem = self.ask(task, end - time.monotonic())
            done = [r for r in rows if r["kind"] == "speed"]
            if done:
                peer = None if way.startswith("ours") else "plain PyTorch"
                row = report.with_shares(done[0]) | {"recipe": name, "way": way, "peer": peer, "round": round_number}
                self.results["throughput"].append(row)
                print(f"  {way}: {row['tokens_per_second']:,.0f} tokens/s")
                self.write()
                return micro_batch
            if not any(r["kind"] == "out of memory" for r in rows):
                self.note(f"{name}, {way}, round {round_number}: not run: {problem or 'no answer'}")
                return micro_batch
            micro_batch //= 2
        self.note(f"{name}, {way}: not run: out of memory at one sample")
        return None

    def profiles(self, names: list[str]) -> None:
        end = time.monotonic() + PART_SECONDS
        for name in names:
            found = [r for r in self.results["throughput"] if r["recipe"] == name and r["way"] == "ours auto"]
            size = found[0]["micro_batch"] if found else (1 if self.toy else 8)
            rows, problem = self.ask({"task": "profile", "recipe": name, "micro_batch": size}, end - time.monotonic())
            if problem:
                self.note(f"profile {name}: not run: {problem}")
            self.results["profiles"] = [r for r in self.results["profiles"] if r["recipe"] != name]
            self.results["profiles"] += [r | {"recipe": name} for r in rows if r["kind"] == "profile"]
            self.write()

    def ask(self, task: Row, seconds: float) -> tuple[list[Row], str]:
        """Run one task in a fresh process. Returns what it said, and what went wrong ('' for nothing)."""
        if seconds < 5:
            return [], "no time was left"
        if self.toy and task["task"] != "parity":
            return self._take(_in_this_process(task)), ""  # toys are too small to leak, and a start costs seconds
        command = [sys.executable, str(HERE / "gpu_suite.py"), "--child", json.dumps(task | {"toy": self.toy})]
        with (
            tempfile.TemporaryFile("w+", errors="replace") as said,
            tempfile.TemporaryFile("w+", errors="replace") as talk,
        ):
            process = subprocess.Popen(command, stdout=said, stderr=talk, cwd=ROOT, env=_environment())
            problem = ""
            try:
                code = process.wait(seconds)
                problem = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                problem = f"stopped after {seconds:.0f} s"
            finally:
                process.kill()  # it takes SIGTERM for a wish to save
                process.wait()
            said.seek(0), talk.seek(0)
            rows, last = self._take(lines.heard(said.read())), talk.read().strip().splitlines()[-1:]
        return rows, f"{problem}: {last[0][:300]}" if problem and last else problem

    def _take(self, rows: list[Row]) -> list[Row]:
        """Keep what is said about the machine and notes; pass everything on."""
        for row in rows:
            if row["kind"] == "device":
                self.results["facts"] |= {k: v for k, v in row.items() if k != "kind"}
            if row["kind"] == "note":
                self.note(row["text"])
        return rows

    def note(self, text: str) -> None:
        print(f"  {text}")
        if text not in self.results["notes"]:
            self.results["notes"].append(text)
        self.write()

    def write(self) -> None:
        for name, text in (("results.json", json.dumps(self.results, indent=1)),
                           ("README.md", report.markdown(self.results))):  # fmt: skip
            aside = self.out / f".{name}"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, self.out / name)


def _child(task: Row) -> int:
    """One measurement, in the process that `Suite.ask` started."""
    import logging

    from megatron_steel import dist

    device = dist.start()
    logging.getLogger("megatron_steel").setLevel(logging.WARNING)
    lines.say("device", **report.device_facts(device))
    if device.type != "cuda" and not task["toy"]:
        print("torch sees no CUDA device", file=sys.stderr)
        return 78
    toy = task["toy"]
    if task["task"] == "parity":
        from gpu import parity

        for check in parity.all_checks(device, toy, task["build"]):
            lines.say("check", **check.as_dict())
        return 0
    from gpu import speed

    if task["task"] == "probe":
        speed.probe(task["recipe"], task["way"], device, toy, task["first"], task["limit"])
    elif task["task"] == "measure":
        speed.measure(task["recipe"], task["way"], device, toy, task["micro_batch"])
    elif task["task"] == "profile":
        speed.profile(task["recipe"], device, toy, task["micro_batch"])
    else:
        speed.head(device, toy)
    return 0


def _in_this_process(task: Row) -> list[Row]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        _child(task | {"toy": True})
    return lines.heard(said.getvalue())


def _environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    # A micro-batch that fits must not fail because memory lies in pieces; the same for all implementations.
    return {**os.environ, **offline, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def _gpu() -> tuple[str | None, str | None]:
    """Name and driver of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        first = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None, None
    name, _, driver = first.partition(",")
    return name.strip(), driver.strip()


def _commit() -> Row:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "megatron_steel", "tools", "ds_configs")
        return {"commit": git("rev-parse", "HEAD"), "changed_files": bool(changed)}
    except OSError:
        return {"commit": None, "changed_files": None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parity", action="store_true", help="fused pieces and ZeRO steps against their plain twins")
    parser.add_argument(
        "--speed", nargs="*", metavar="RECIPE", help="tokens/s beside plain PyTorch (default: all three)"
    )
    parser.add_argument("--profile", nargs="*", metavar="RECIPE", help="where the time of our micro-batch goes")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, also on a CPU; no figure to quote")
    parser.add_argument("--out", type=Path, help="folder (default docs/benchmarks/gpu-DEVICE-DATE)")
    parser.add_argument("--largest-micro-batch", type=int, default=sizes.SAMPLES_PER_STEP, help="where doubling ends")
    parser.add_argument(
        "--build-deepspeed-adam", action="store_true", help="compile DeepSpeed's FusedAdam for --parity"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
