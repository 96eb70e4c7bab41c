"""The choice of kernel, and every kernel present equals plain AdamW."""

import math

import pytest
import torch

from megatron_steel.errors import SteelError
from megatron_steel.recipe import Optim
from megatron_steel.train import optimizer


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
