"""What is known so far: `results.json`, and the Markdown made of it, written anew after every measurement.

A row has a `key` (what was measured) and a `code`: a digest of the code that was measured and of the packages that shape the
numbers. The same files give the same digest, committed or not, with git or without. What this code has measured, or could not,
is not tried again, so that a part that was cut off goes on where it stood; a row of other code is replaced.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from gpu import report

ROOT = Path(__file__).resolve().parents[3]
MEASURED_CODE = ("megatron_steel", "ds_configs", "tools/benchmarks/gpu")
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "accelerate", "liger-kernel", "flash-attn", "apex")
TABLES = ("checks", "ceilings", "throughput", "heads", "ablation", "profiles", "gaps")
Row = dict[str, Any]


class Store:
    """The results of one output folder.

    Raises SystemExit where the folder holds results of another kind (toy or real).
    """

    def __init__(self, out: Path, toy: bool, driver: str | None, again: bool = False):
        self.out, self.code, self._again = out, code_digest(), again
        out.mkdir(parents=True, exist_ok=True)
        facts = {"date": datetime.date.today().isoformat(), "toy": toy, "driver": driver, **commit()}
        before = out / "results.json"
        self.results: Row = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
        if self.results.get("facts", facts)["toy"] != toy:
            raise SystemExit(f"error: {before} holds results of another kind (toy or real)\n  do: choose another --out")
        self.results = {name: self.results.get(name, []) for name in TABLES} | {
            "facts": self.results.get("facts", {}) | facts, "notes": self.results.get("notes", []),
        }  # fmt: skip
        self._fresh: set[str] = set()

    def knows(self, table: str, key: str) -> bool:
        """True where this code has been measured, or has failed to be: in an earlier call, or in this one."""
        if self._again and key not in self._fresh:
            return False
        mine = [r for r in (*self.results[table], *self.results["gaps"]) if (r["key"], r["code"]) == (key, self.code)]
        return bool(mine) and not any(r.get("cut_off") for r in mine)

    def put(self, table: str, key: str, rows: list[Row]) -> None:
        """Replace what is known under a key, and write."""
        facts = self.results["facts"]
        own = {"key": key, "code": self.code, "commit": facts["commit"], "date": facts["date"]}
        self._fresh.add(key)
        self.results[table] = [r for r in self.results[table] if r["key"] != key] + [row | own for row in rows]
        self.close(key)
        self.write()

    def gap(self, key: str, reason: str) -> None:
        """Say why something was not measured; forgotten as soon as it is."""
        print(f"  not run: {key}: {reason}")
        self._fresh.add(key)
        self.close(key)
        self.results["gaps"].append({"key": key, "code": self.code, "reason": reason})
        self.write()

    def close(self, key: str) -> None:
        """Forget that something was not measured."""
        self.results["gaps"] = [g for g in self.results["gaps"] if g["key"] != key]

    def note(self, text: str) -> None:
        if text not in self.results["notes"]:
            print(f"  {text}")
            self.results["notes"].append(text)

    def rows(self, table: str, **wanted: Any) -> list[Row]:
        return [r for r in self.results[table] if all(r.get(k) == v for k, v in wanted.items())]

    def facts(self, found: Row) -> None:
        self.results["facts"] |= found

    def write(self) -> None:
        for name, text in (("results.json", json.dumps(self.results, indent=1) + "\n"),
                           ("README.md", report.markdown(self.results))):  # fmt: skip
            aside = self.out / f".{name}"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, self.out / name)


def code_digest(apex: str = "") -> str:
    """Twelve hex digits of the files and packages that a measurement depends on, and of the apex that was built for it."""
    versions = {name: _version(name) for name in PACKAGES}
    digest = hashlib.sha256(json.dumps([apex, versions]).encode())
    for folder in MEASURED_CODE:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".yaml", ".json"):
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> Row:
    """The commit, and whether files that are measured differ from it; None where this is no git checkout."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED_CODE)
        return {"commit": git("rev-parse", "HEAD"), "changed_files": bool(changed)}
    except OSError:
        return {"commit": None, "changed_files": None}
