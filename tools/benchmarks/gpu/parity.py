"""Equal to its plain twin, on this device, outside of any model: the chunked head, the optimizer kernels, Liger's pieces.

Knows nothing of speed.
"""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gpu.checks import Check, compare, guarded, relative
from megatron_steel.errors import SteelError
from megatron_steel.model.head import ChunkedHead
from megatron_steel.recipe import Optim
from megatron_steel.train import optimizer

# Relative (Frobenius) errors. In bf16 one rounding is 2^-9 = 0.002; products of such numbers are a few times worse.
HEAD_TOLERANCE = {"fp32": {"loss": 1e-6, "gradient": 1e-5}, "bf16": {"loss": 1e-3, "gradient": 1e-2}}
ADAM_TOLERANCE = 1e-5  # absolute, of weights near 1 after 100 steps


def heads(device: torch.device, toy: bool) -> Iterator[Check]:
    for precision in ("fp32", "bf16"):
        for shape in head_shapes(toy):
            yield from guarded(f"head {precision} {shape}", head, device, precision, shape)


def adams(device: torch.device, build_deepspeed: bool) -> Iterator[Check]:
    for kernel in ("torch", "deepspeed", "apex"):
        yield from guarded(f"AdamW by {kernel}", adam, device, kernel, build_deepspeed)


def ligers(device: torch.device) -> Iterator[Check]:
    for piece in ("head", "RMSNorm", "SwiGLU"):
        for check in guarded(f"liger {piece}", liger, device, piece):
            yield check if check.status == "not run" else replace(check, status="peer")


def head_shapes(toy: bool) -> list[tuple[int, int, int, int]]:
    """(tokens, width, words, chunk): odd on purpose, with a last chunk that is not full."""
    return [(77, 24, 101, 16), (1, 8, 3, 4)] if toy else [(5001, 1792, 64_001, 2048), (77, 56, 1001, 16), (1, 8, 3, 4)]


def head(device: torch.device, precision: str, shape: tuple[int, int, int, int]) -> Iterator[Check]:
    """Loss and both gradients of `ChunkedHead` against linear + cross-entropy in fp32 over the same numbers."""
    tokens, width, words, chunk = shape
    hidden, weight, labels = head_inputs(device, precision, tokens, width, words)
    linear = nn.Linear(width, words, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    mine = hidden.clone().requires_grad_()
    loss = ChunkedHead(linear, chunk_tokens=chunk)(mine, labels)
    gradients = torch.autograd.grad(loss * 0.37, [mine, linear.weight])
    yield from _head_checks(f"head {precision} {shape}", precision, loss, gradients, hidden, weight, labels)


def head_inputs(
    device: torch.device, precision: str, tokens: int, width: int, words: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [tokens, width], weight [words, width], labels [tokens] of which some are ignored."""
    generator = torch.Generator().manual_seed(tokens * words)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = (torch.randn(words, width, generator=generator) * width**-0.5).to(device, dtype)
    labels = torch.randint(words, (tokens,), generator=generator)
    labels[1::5] = -100
    return hidden, weight, labels.to(device)


def _head_checks(
    name: str, precision: str, loss: torch.Tensor, gradients: Any, hidden: Any, weight: Any, labels: Any
) -> Iterator[Check]:
    h, w = hidden.float().requires_grad_(), weight.float().requires_grad_()
    plain = F.cross_entropy(F.linear(h, w), labels, reduction="sum")
    plain_gradients = torch.autograd.grad(plain * 0.37, [h, w])
    tolerance = HEAD_TOLERANCE[precision]
    yield compare(f"{name}: loss", float((loss.detach() - plain.detach()).abs() / plain.detach()), tolerance["loss"])
    for what, a, b in zip(("hidden", "weight"), gradients, plain_gradients, strict=True):
        yield compare(f"{name}: gradient of {what}", relative(a, b), tolerance["gradient"])


def adam(device: torch.device, kernel: str, build_deepspeed: bool) -> Iterator[Check]:
    """100 steps of a fused kernel against torch's AdamW over single tensors, with two decay groups, in fp32."""
    name = f"AdamW by {kernel} against plain AdamW, 100 steps"
    missing = _why_missing(kernel, device, build_deepspeed)
    if missing:
        yield Check(name, "not run", None, ADAM_TOLERANCE, missing)
        return
    optim = Optim(lr=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(3)
    first = [torch.randn(shape, generator=generator) for shape in ((257, 33), (64,), (1,), (128, 128))]
    fused, plain = ([nn.Parameter(p.to(device, copy=True)) for p in first] for _ in range(2))
    ours = optimizer.build(kernel, _two_groups(fused), optim, device.type, offload=False)
    twin = torch.optim.AdamW(
        _two_groups(plain), lr=optim.lr, betas=optim.betas, eps=optim.eps, foreach=False, fused=False
    )
    for step in range(100):
        for a, b in zip(fused, plain, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(device)
            b.grad = a.grad.clone()
        for one in (ours, twin):
            for group in one.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            one.step()
    worst = max(float((a - b).detach().abs().max()) for a, b in zip(fused, plain, strict=True))
    moved = max(float((a.detach().cpu() - b).abs().max()) for a, b in zip(fused, first, strict=True))
    yield compare(name, worst if moved > 1e-3 else float("nan"), ADAM_TOLERANCE)


def _two_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[::2], "weight_decay": 0.1}, {"params": parameters[1::2], "weight_decay": 0.0}]


def _why_missing(kernel: str, device: torch.device, build_deepspeed: bool) -> str:
    if kernel == "deepspeed" and not build_deepspeed:
        from deepspeed.git_version_info import installed_ops

        if not installed_ops.get("cpu_adam" if device.type == "cpu" else "fused_adam", False):
            return "not built in advance; --build-deepspeed-adam compiles it"
    try:
        optimizer.choose(kernel, device.type, offload=False)
    except SteelError as error:
        return " ".join(str(error).split())
    return ""


def liger(device: torch.device, piece: str) -> Iterator[Check]:
    """A piece of liger-kernel in bf16 against plain torch in fp32: a peer, not a part of ours."""
    name = f"liger {piece} bf16"
    try:
        importlib.metadata.version("liger_kernel")
    except importlib.metadata.PackageNotFoundError:
        yield Check(name, "not run", None, None, "liger: not installed")
        return
    if device.type != "cuda":
        yield Check(name, "not run", None, None, "liger: its kernels need a GPU")
        return
    from liger_kernel.transformers import functional as peer

    hidden, weight, labels = head_inputs(device, "bf16", 5001, 1792, 64_001)
    mine = hidden.clone().requires_grad_()
    if piece == "head":
        w = weight.clone().requires_grad_()
        loss = peer.liger_fused_linear_cross_entropy(mine, w, labels, reduction="sum")
        yield from _head_checks(name, "bf16", loss, torch.autograd.grad(loss * 0.37, [mine, w]), hidden, weight, labels)
        return
    other = (
        torch.randn_like(hidden).requires_grad_() if piece == "SwiGLU" else torch.ones_like(hidden[0]).requires_grad_()
    )
    h, o = (x.detach().float().requires_grad_() for x in (mine, other))
    if piece == "SwiGLU":
        got, plain = peer.liger_swiglu(mine, other), F.silu(h) * o
    else:
        got = peer.liger_rms_norm(mine, other, 1e-6, in_place=False)
        plain = F.rms_norm(h, h.shape[-1:], o, 1e-6)
    tolerance = HEAD_TOLERANCE["bf16"]["gradient"]
    up = torch.randn_like(hidden)
    yield compare(f"{name}: output", relative(got, plain), tolerance)
    theirs, ours = torch.autograd.grad(got, [mine, other], up), torch.autograd.grad(plain, [h, o], up.float())
    for number, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        yield compare(f"{name}: gradient {number}", relative(a, b), tolerance)
