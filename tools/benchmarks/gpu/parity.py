"""Equal to its plain twin, on this device: the chunked head, the optimizer kernels, a step at every ZeRO stage.

Every check is one number beside its tolerance. A check that raises has failed; one whose part is not installed did not
run, with the reason; neither passes. Knows nothing of speed.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gpu import runs, sizes
from megatron_steel.errors import SteelError
from megatron_steel.model import build
from megatron_steel.model.head import ChunkedHead
from megatron_steel.recipe import Optim, Recipe
from megatron_steel.train import optimizer

STEPS = 6
# Relative (Frobenius) errors. In bf16 one rounding is 2^-9 = 0.002; products of such numbers are a few times worse.
HEAD_TOLERANCE = {"fp32": {"loss": 1e-6, "gradient": 1e-5}, "bf16": {"loss": 1e-3, "gradient": 1e-2}}
ADAM_TOLERANCE = 1e-5  # absolute, of weights near 1 after 100 steps
# Loss: absolute. Norm: relative. Update: Frobenius of the difference of (weights - first weights), relative.
STEP_TOLERANCE = {
    "fp32": {"loss": 1e-5, "gradient norm": 1e-4, "update": 1e-3},
    "bf16": {"loss": 5e-3, "gradient norm": 2e-2, "update": 0.2},
}


@dataclass(frozen=True)
class Check:
    name: str
    status: str
    """pass, fail, not run, or peer: another project's figure, which decides nothing here"""
    measured: float | None
    tolerance: float | None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(name: str, measured: float, tolerance: float) -> Check:
    """Pass where measured <= tolerance; a NaN fails."""
    return Check(name, "pass" if measured <= tolerance else "fail", measured, tolerance)


def all_checks(device: torch.device, toy: bool, build_deepspeed: bool) -> Iterator[Check]:
    """Every check, as it is done; none raises. Needs `dist.start`."""
    # TF32 would round the twins' products to ten bits.
    torch.set_float32_matmul_precision("highest")
    for precision in ("fp32", "bf16"):
        for shape in head_shapes(toy):
            yield from _guarded(f"head {precision} {shape}", head, device, precision, shape)
    for kernel in ("torch", "deepspeed", "apex"):
        yield from _guarded(f"AdamW by {kernel}", adam, device, kernel, build_deepspeed)
    for piece in ("head", "RMSNorm", "SwiGLU"):
        for check in _guarded(f"liger {piece}", liger, device, piece):
            yield check if check.status == "not run" else replace(check, status="peer")
    for name in ("tiny", "zh-1b"):
        yield from _guarded(f"step {name}", steps, device, name, toy)


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
        return str(error).replace("\n", " ")
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


def steps(device: torch.device, name: str, toy: bool) -> Iterator[Check]:
    """`STEPS` optimizer steps at every stage against plain torch in fp32: losses, gradient norms, what weights did."""
    fp32 = sizes.parity_recipe(name, toy, _batch("fp32", "zero0.json"))
    batches = [runs.synthetic(fp32, 2, 2, seed) for seed in range(STEPS)]
    twin = _trace(runs.Plain(fp32, _same_start(fp32).to(device), device, fused=False), fp32, batches)
    for precision, files in (("fp32", ("zero0", "zero1", "zero2", "zero3")), ("bf16", ("zero1", "zero3"))):
        for file in files:
            label = f"step {name} {file} {precision} against plain fp32"
            recipe = sizes.parity_recipe(name, toy, _batch(precision, f"{file}.json"))
            try:
                trace = _trace(runs.Ours(recipe, _same_start(recipe), device), recipe, batches)
            except Exception as error:
                yield _failed(label, error)
                continue
            yield from _step_checks(label, STEP_TOLERANCE[precision], trace, twin)


@dataclass(frozen=True)
class _Trace:
    losses: list[float]
    norms: list[float]
    update: torch.Tensor
    """All weights after the last step minus before the first, flat, in fp32 on the CPU."""


def _trace(run: Any, recipe: Recipe, batches: list[list[runs.Batch]]) -> _Trace:
    losses, norms = [], []
    for batch in batches:
        done = run.exact_step(batch) if isinstance(run, runs.Plain) else run.step(batch)
        losses.append(float(done.loss))
        norms.append(run.grad_norm(done))
    first = torch.cat([p.detach().flatten() for p in _same_start(recipe).parameters()])
    return _Trace(losses, norms, _weights(run) - first)


def _step_checks(label: str, tolerance: dict[str, float], got: _Trace, plain: _Trace) -> Iterator[Check]:
    loss = max(abs(a - b) for a, b in zip(got.losses, plain.losses, strict=True))
    norm = max(abs(a / b - 1) for a, b in zip(got.norms, plain.norms, strict=True))
    yield compare(f"{label}: loss", loss, tolerance["loss"])
    yield compare(f"{label}: gradient norm", norm, tolerance["gradient norm"])
    yield compare(f"{label}: update", relative(got.update, plain.update), tolerance["update"])


def _same_start(recipe: Recipe) -> Any:
    return build.build_model(build.build_config(recipe.model), recipe.run.seed)


def _batch(precision: str, file: str) -> list[str]:
    batch = ["train.global_batch_size=4", "train.micro_batch_size=2"]
    return [*batch, f"train.precision={precision}", f"deepspeed.config={file}"]


def _weights(run: Any) -> torch.Tensor:
    if isinstance(run, runs.Plain) or not run.engine.zero_optimization():
        model = run.model if isinstance(run, runs.Plain) else run.engine.module
        return torch.cat([p.detach().float().flatten().cpu() for p in model.parameters()])
    from deepspeed.utils import safe_get_full_fp32_param

    return torch.cat([safe_get_full_fp32_param(p).float().flatten().cpu() for p in run.engine.module.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the twin `b`."""
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


def _guarded(name: str, check: Callable[..., Iterator[Check]], *arguments: Any) -> Iterator[Check]:
    try:
        yield from check(*arguments)
    except Exception as error:
        yield _failed(name, error)
    finally:
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


def _failed(name: str, error: Exception) -> Check:
    return Check(name, "fail", None, None, f"{type(error).__name__}: {str(error)[:300]}")
