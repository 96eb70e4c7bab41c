"""The choice of kernel, and every kernel present equals plain AdamW."""

import importlib.util
import math
import sys

import pytest
import torch

from megatron_steel.errors import SteelError
from megatron_steel.recipe import Optim
from megatron_steel.train import optimizer


def test_auto_never_fails():
    assert optimizer.choose("auto", "cpu", offload=False) in ("torch", "deepspeed")
    assert optimizer.choose("auto", "cuda", offload=True) in ("torch", "deepspeed")


def _apex(folder, *parts):
    """A stand-in for an installed package: empty modules, as far as anybody looks before a GPU is used."""
    for part in parts:
        path = folder / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


@pytest.mark.parametrize(
    ("parts", "says", "remedy"),
    [
        ([], "it is not installed", "git clone https://github.com/NVIDIA/apex"),
        (["apex/__init__.py", "apex/views.py"], "another program, PyPI's", "pip uninstall apex && git clone"),
        (
            ["apex/__init__.py", "apex/optimizers/__init__.py"],
            "built without its CUDA part",
            "APEX_CUDA_EXT=1 pip install",
        ),
    ],
)
def test_an_apex_that_cannot_run_is_refused_with_the_reason(parts, says, remedy, tmp_path, monkeypatch):
    if importlib.util.find_spec("apex"):
        pytest.skip("an apex is installed here")
    _apex(tmp_path, *parts)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SteelError, match=f"NVIDIA's apex FusedAdam cannot run here: .*{says}") as caught:
        optimizer.choose("apex", "cuda", offload=False)
    assert remedy in caught.value.remedy
    assert optimizer.choose("auto", "cuda", offload=False) in ("torch", "deepspeed")


def test_apex_is_taken_where_it_is_whole_but_for_zero_3_and_the_cpu(tmp_path, monkeypatch):
    if importlib.util.find_spec("apex"):
        pytest.skip("an apex is installed here")
    _apex(tmp_path, "apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("amp_C", "apex", "apex.optimizers"):  # what this test imports leaves with it
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    assert optimizer.choose("auto", "cuda", offload=False) == optimizer.choose("apex", "cuda", offload=False) == "apex"
    for refused, says in (
        ({"device": "cpu"}, "on cpu"),
        ({"offload": True}, "on the CPU"),
        ({"sub_groups": True}, "ZeRO-3"),
    ):
        words = {"device": "cuda", "offload": False} | refused
        assert optimizer.choose("auto", **words) != "apex"
        with pytest.raises(SteelError, match=says):
            optimizer.choose("apex", **words)


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
