"""`tools/check_node.py`: what its report says, and the whole of it on two CPU ranks."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import one_thread

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {
    "began": 1_790_000_000.0, "seconds": 300.0, "ranks": 2,
    "machine": {"gpus": ["NVIDIA H100 80GB HBM3"] * 2, "gpu_gib": 79.6, "cuda": "12.8", "cpu": "a CPU", "cores": 64,
                "memory_gib": 512.0, "commit": "abc1234", "versions": {"torch": "2.13.0"}},
    "ceilings": {"gemm": [{"dtype": "bfloat16", "n": 8192, "slowest": 612.0, "all_ranks": 1230.0}],
                 "exchange": [{"what": "all_reduce", "bytes": 2**28, "seconds": 0.001, "bus_gb_per_s": 268.0}]},
    "stages": [{"name": name, "code": 0, "steps": 40, "milliseconds": 50.0, "loss": [4.0], "said": "", "from_fp32": apart}
               for name, apart in (("fp32-zero0", 0.0), ("bf16-zero1", 0.004), ("bf16-zero3", 0.005))],
    "kill": {"code": 0, "resumed_after": 41.0, "steps": 40, "difference": 0.0, "said": ""},
    "speed": {"code": 0, "said": "", "toy": False, "tokens_per_second": 50_000.0, "share_of_peak": 0.42, "memory_gib": 60.0,
              "save_seconds": 9.0, "save_bytes": 14e9, "settings": ["train.micro_batch_size=8"]},
    "plan": {"command": "plan zh-1b --gpus 2xH100", "tokens_per_second": 40_000.0},
}  # fmt: skip


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from node_check import report

    return report


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "0 ranks"),
        (["--gpus", "x"], "invalid int value: 'x'"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--out", "none/x.md"], "there is no folder for the report"),
        (["--out", "folder"], "this is a folder"),
        (["--out", ""], "this is a folder"),
    ],
)
def test_what_cannot_be_checked_or_written_is_refused_before_ten_minutes(tmp_path, words, said):
    (tmp_path / "folder").mkdir()
    command = ["bash", str(ROOT / "launch" / "check_node.sh"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    first, where, remedy = done.stderr.splitlines()
    assert "error: " in first
    assert said in first
    assert where.startswith("  where: ")
    assert remedy.startswith("  do:    ")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_held_becomes_a_row_and_what_did_not_is_said(report):
    text = report.as_markdown(RESULTS)
    assert report.all_hold(RESULTS)
    assert "| zh-1b at its own size: train.micro_batch_size=8 | 50,000 tokens/s (median) |" in text
    assert "says 40,000: measured 1.25 of it" in text
    assert "column “several GPUs”" in text
    row = "| bf16, ZeRO-3: 40 steps like fp32's | ran at commit abc1234 (2 x NVIDIA H100 80GB HBM3) |"
    assert row in text
    bad = copy.deepcopy(RESULTS)
    bad["stages"][2]["from_fp32"] = 0.5
    bad["kill"]["difference"] = 1e-9
    assert not report.all_hold(bad)
    told = report.as_markdown(bad)
    assert row not in told
    assert told.count("**did not hold**") == 2


def test_a_trial_that_failed_or_did_not_run_is_no_claim(report):
    broken = RESULTS | {"stages": {"failed": "RuntimeError: x"}, "plan": {"not run": "no such verb"}}
    broken["kill"] = {"code": 0, "resumed_after": None, "difference": 0.0, "said": ""}
    text = report.as_markdown(broken)
    assert "failed: RuntimeError: x" in text
    assert "| the plan | not run (no such verb) |" in text
    assert "- not run: SIGKILL of a rank" in text
    assert not report.all_hold(broken)


@pytest.mark.slow
def test_the_whole_of_it_on_two_cpu_ranks(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "check_node.py"), "--out", "report.md"]
    done = subprocess.run(command, cwd=tmp_path, env=one_thread(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "column “2 CPU ranks”" in text
    assert text.count("| ran at commit ") == 5  # three stages, the kill, the speed run
    assert not (tmp_path / "report.md").read_text().count("did not hold")
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]
