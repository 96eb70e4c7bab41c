"""Run one measurement in a fresh process, so that neither memory nor DeepSpeed's state leaks into the next.

The asking process imports neither torch nor DeepSpeed (except for toys): it must not hold memory on the device.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from gpu import lines

ROOT = Path(__file__).resolve().parents[3]
SUITE = ROOT / "tools" / "benchmarks" / "gpu_suite.py"
Row = dict[str, Any]


def ask(task: Row, seconds: float, paths: list[str]) -> tuple[list[Row], str]:
    """What a measurement said, and what went wrong ('' for nothing).

    Args:
        task: what `child.answer` takes; toys run in this process, since they are too small to leak and a start costs seconds.
        seconds: the process is killed after that.
        paths: put before the Python path of the process.
    """
    if task["toy"]:
        return _in_this_process(task)
    command = [sys.executable, str(SUITE), "--child", json.dumps(task)]
    with tempfile.TemporaryFile("w+", errors="replace") as said, tempfile.TemporaryFile("w+", errors="replace") as talk:
        process = subprocess.Popen(command, stdout=said, stderr=talk, cwd=ROOT, env=environment(paths))
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
        rows, last = lines.heard(said.read()), talk.read().strip().splitlines()[-1:]
    return rows, f"{problem}: {last[0][:300]}" if problem and last else problem


def _in_this_process(task: Row) -> tuple[list[Row], str]:
    from gpu import child

    problem = ""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            code = child.answer(task)
            problem = f"exit code {code}" if code else ""
        except Exception as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
    return lines.heard(said.getvalue()), problem


def environment(paths: list[str]) -> dict[str, str]:
    """For every implementation the same."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        # A micro-batch that fits must not fail because memory lies in pieces.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONPATH": os.pathsep.join(p for p in (*paths, os.environ.get("PYTHONPATH", "")) if p),
    }
