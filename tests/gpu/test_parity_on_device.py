"""The suite's parity statements on a real device: head, optimizer kernels, a step at every ZeRO stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device():
    import torch

    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def parity(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import parity

    return parity


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(5001, 1792, 64_001, 2048), (77, 56, 1001, 16), (1, 8, 3, 4)])
def test_head_equals_whole_logits(parity, device, precision, shape):
    checks = list(parity.head(device, precision, shape))
    assert len(checks) == 3
    assert not [c for c in checks if c.status != "pass"]


@pytest.mark.parametrize("kernel", ["torch", "deepspeed", "apex"])
def test_fused_adam_equals_plain_adam(parity, device, kernel):
    (check,) = parity.adam(device, kernel, False)
    if check.status == "not run":
        pytest.skip(check.reason)
    assert check.status == "pass", check


def test_a_step_at_every_stage_equals_plain_torch(tmp_path):
    """In a process of its own, as DeepSpeed wants it: the suite's part, whole."""
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--part", "correctness", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["facts"]["device"] != "cpu"
    steps = [c for c in results["checks"] if c["name"].startswith("step ")]
    assert len(steps) == 2 * 6 * 3
    assert {c["status"] for c in steps} == {"pass"}
    assert {c["status"] for c in results["checks"]} <= {"pass", "not run", "peer"}
