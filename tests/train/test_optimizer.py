"""Schedules at their corners, the choice of kernel, and every kernel present equals plain AdamW."""

import itertools
import math

import pytest
import torch

from megatron_steel.errors import SteelError
from megatron_steel.recipe import Optim, Schedule
from megatron_steel.train import optimizer


def _rates(total, **schedule):
    return [optimizer.learning_rate(s, Schedule(**schedule), 1.0, total) for s in range(1, total + 1)]


def test_warm_up_is_linear_and_reaches_the_peak():
    assert _rates(20, name="constant", warmup_steps=4)[:6] == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_the_last_step_has_the_floor(name):
    rates = _rates(100, name=name, warmup_steps=10, min_lr_ratio=0.1, decay_ratio=0.2)
    assert rates[9] == 1
    assert rates[-1] == pytest.approx(0.1, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_the_middle_of_each_decay():
    assert _rates(110, name="cosine", warmup_steps=10)[59] == pytest.approx(0.5)
    assert _rates(110, name="linear", warmup_steps=10)[59] == pytest.approx(0.5)
    wsd = _rates(100, name="wsd", warmup_steps=10, decay_ratio=0.2)
    assert wsd[9:80] == [1] * 71
    assert wsd[89] == pytest.approx(0.5)


def test_a_run_shorter_than_its_warm_up_is_valid():
    assert _rates(3, name="cosine", warmup_steps=10) == [0.1, 0.2, 0.3]


def test_auto_never_fails():
    assert optimizer.choose("auto", "cpu", offload=False) in ("torch", "deepspeed")
    assert optimizer.choose("auto", "cuda", offload=True) in ("torch", "deepspeed")


def test_apex_that_is_not_there_is_refused_with_the_reason():
    with pytest.raises(SteelError, match="NVIDIA's apex FusedAdam cannot run here") as caught:
        optimizer.choose("apex", "cpu", offload=False)
    assert "PyPI name is another project" in caught.value.remedy


def test_a_stale_build_lock_is_found(tmp_path, monkeypatch):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("ninja", "c++"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(SteelError, match="would hang this run forever") as caught:
        optimizer.choose("deepspeed", "cpu", offload=False)
    assert caught.value.where == str(lock)


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SteelError, match=r"compiles cpu_adam at first use and ninja, c\+\+ is not on the path"):
        optimizer.choose("deepspeed", "cpu", offload=False)


def _train(kind, steps=100):
    generator = torch.Generator().manual_seed(3)
    weights = [
        torch.nn.Parameter(torch.randn(7, 5, generator=generator)),
        torch.nn.Parameter(torch.randn(5, generator=generator)),
    ]
    groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
    optim = Optim(lr=1e-2)
    adam = (
        torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, foreach=False)
        if kind == "plain"
        else optimizer.build(kind, groups, optim, "cpu", offload=False)
    )
    for step in range(steps):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator) + w.detach() * 0.1
        for group in adam.param_groups:
            group["lr"] = 1e-2 * math.cos(step / 100)
        adam.step()
    return weights


def test_torch_fused_equals_plain_adamw_over_100_steps():
    for a, b in zip(_train("torch"), _train("plain"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_deepspeed_cpu_adam_equals_plain_adamw_over_100_steps():
    try:
        optimizer.choose("deepspeed", "cpu", offload=False)
    except SteelError as error:
        pytest.skip(str(error))
    for a, b in zip(_train("deepspeed"), _train("plain"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
