"""The GPU suite at toy size on this machine, through its real command, and what it does when memory runs out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
STAGES = ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32", "zero1 bf16", "zero3 bf16")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder that `--toy --parity --speed` has written."""
    from conftest import one_thread

    out = tmp_path_factory.mktemp("suite")
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--toy", "--parity", "--speed", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread(), timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_suite

    return gpu_suite


def _results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_every_parity_check_passed_or_says_why_it_did_not_run(toy):
    checks = {c["name"]: c for c in _results(toy)["checks"]}
    assert len(checks) >= 40
    for check in checks.values():
        assert check["status"] in ("pass", "not run"), check
        assert check["reason"] if check["status"] == "not run" else check["measured"] <= check["tolerance"], check
    for model in ("tiny", "zh-1b"):
        for stage in STAGES:
            for what in ("loss", "gradient norm", "update"):
                assert checks[f"step {model} {stage} against plain fp32: {what}"]["status"] == "pass"
    assert {c["status"] for name, c in checks.items() if name.startswith("head")} == {"pass"}
    assert checks["AdamW by torch against plain AdamW, 100 steps"]["status"] == "pass"


def test_throughput_rows_hold_raw_times_and_no_share_where_no_peak_is_known(toy):
    results = _results(toy)
    rows = results["throughput"]
    ways = ["ours auto", "plain", "ours zero3"]
    assert [r["way"] for r in rows] == ways * 2  # alternating rounds
    assert {r["way"]: r["peer"] for r in rows} == {"ours auto": None, "plain": "plain PyTorch", "ours zero3": None}
    for row in rows:
        assert row["recipe"] == "zh-1b"
        assert len(row["step_seconds"]) >= 3
        assert row["tokens_per_step"] == row["micro_batch"] * row["accumulation"] * row["sequence_length"]
        assert row["tokens_per_second"] > 0
        assert row["flops_per_token_causal"] < row["flops_per_token_hw"]
        assert abs(row["first_loss"] - rows[0]["first_loss"]) < 0.02  # the same model and the same batch
    assert {r["way"] for r in results["heads"]} == {"ours", "plain"}
    facts = results["facts"]
    assert facts["toy"] is True
    assert set(facts["versions"]) >= {"torch", "deepspeed", "transformers", "numpy", "liger_kernel"}
    if facts["device"] == "cpu":
        assert {r[f"mfu_{kind}"] for r in rows for kind in ("hw", "causal", "6n")} == {None}


def test_markdown_says_that_toys_prove_no_speed(toy):
    text = (toy / "README.md").read_text(encoding="utf-8")
    assert "nothing about speed" in text
    assert "| zh-1b | plain PyTorch |" in text
    assert "## Parity" in text


def test_a_failed_check_or_a_dead_process_is_exit_code_1(suite, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--toy", "--parity", "--out", str(tmp_path)])
    good = {"kind": "check", "name": "a", "status": "pass", "measured": 0.0, "tolerance": 1.0, "reason": ""}
    for rows, problem, code in (([good], "", 0), ([good], "exit code -11", 1), ([good | {"status": "fail"}], "", 1)):
        monkeypatch.setattr(suite.Suite, "ask", lambda *_, answer=(rows, problem): answer)
        assert suite.main() == code


def test_a_difference_that_is_not_a_number_fails(suite):
    from gpu.parity import compare

    assert [compare("x", value, 1.0).status for value in (1.0, 1.1, float("nan"))] == ["pass", "fail", "fail"]


def test_micro_batches_double_until_memory_ends_and_halve_until_it_suffices(suite, monkeypatch, tmp_path):
    """A device on which 3 samples fit while probing and 1 with a whole step."""
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path)])
    asked = []

    def ask(self, task, seconds):
        asked.append(task.get("first", task.get("micro_batch")))
        if task["task"] == "measure":
            return [{"kind": "out of memory"}] if task["micro_batch"] > 1 else [_speed_row()], ""
        rows, size = [], task["first"]
        while size <= task["limit"]:
            rows.append({"kind": "probe", "micro_batch": size, "fits": size <= 3, "tokens_per_second": 10.0 * size})
            if size > 3:
                break
            size *= 2
        return rows, ""

    monkeypatch.setattr(suite.Suite, "ask", ask)
    one = suite.Suite(suite._parser().parse_args(["--out", str(tmp_path)]), "Some GPU", "1.0")
    assert one.probe("zh-1b", "plain", end=1e12) == 2
    assert asked == [8, 4, 2]
    assert one.measure("zh-1b", "plain", 2, 1, end=1e12) == 1
    (row,) = _results(tmp_path)["throughput"]
    assert row["mfu_hw"] == pytest.approx(0.5)


def _speed_row():
    flops = {f"flops_per_token_{kind}": 1e9 for kind in ("hw", "causal", "6n")}
    return {"kind": "speed", "tokens_per_second": 1000.0, "tokens_per_step": 1000, "step_seconds": [1.0], "micro_batch": 1,
            "accumulation": 64, "memory_gib": 1.0, "sharding": None, "peak_flops": 2e12, **flops}  # fmt: skip


def test_without_a_gpu_and_without_toy_it_says_so_and_writes_nothing(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "_gpu", lambda: (None, None))
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--parity", "--out", str(tmp_path / "out")])
    assert suite.main() == 78
    assert "--toy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
