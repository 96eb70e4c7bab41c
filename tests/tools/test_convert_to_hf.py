"""The script gives what the verb gives: its help, and its exit codes."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "convert_to_hf.py"


def _run(*words):
    return subprocess.run([sys.executable, "-I", str(SCRIPT), *words], capture_output=True, text=True)


def test_the_script_is_the_verb(tmp_path):
    helped = _run("--help")
    assert helped.returncode == 0
    assert all(word in helped.stdout for word in ("RUN_OR_CHECKPOINT", "--average", "--model", "--verify"))
    refused = _run(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert refused.returncode == 78
    assert "there is no run folder and no checkpoint here" in refused.stderr
