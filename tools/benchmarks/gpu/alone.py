"""What the device can do at best, and the head by itself: pieces measured outside of any model.

- `ceilings`: a large bf16 product on random data (zeros and constants draw less power, so clocks stay higher), and a copy.
- `head`: linear and cross-entropy, forward and backward, in each form that there is.
"""

import importlib.util
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gpu import lines
from gpu.speed import timed
from megatron_steel.model.head import ChunkedHead

ROUNDS = 5


def ceilings(device: torch.device, toy: bool) -> None:
    """Say one `ceiling` line each: FLOP/s of a product, bytes/s of a copy (read and written bytes counted)."""
    n = 256 if toy else 8192
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times = 1 if toy else 30
    seconds = _best(lambda: [torch.mm(a, b, out=out) for _ in range(times)], device) / times
    lines.say("ceiling", what="bf16 product", size=n, per_second=2 * n**3 / seconds, unit="FLOP/s", seconds=seconds)
    count = 2**16 if toy else 2**30
    source = torch.randint(255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: [target.copy_(source) for _ in range(times)], device) / times
    lines.say("ceiling", what="device copy", size=count, per_second=2 * count / seconds, unit="byte/s", seconds=seconds)


def _best(action: Callable[[], object], device: torch.device) -> float:
    action()
    return min(timed(action, device) for _ in range(ROUNDS))


def head(device: torch.device, toy: bool) -> None:
    """Say one `head` line an implementation: milliseconds forward and backward, and memory above the inputs."""
    from gpu.parity import head_inputs

    tokens, width, words = (64, 16, 257) if toy else (16_384, 1792, 151_936)  # steel-1b's micro-batch of 8
    hidden, weight, labels = head_inputs(device, "bf16", tokens, width, words)
    hidden.requires_grad_()
    linear = torch.nn.Linear(width, words, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight)
    ways = _heads(hidden, linear, labels, device)
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for _ in range(ROUNDS):  # alternating, so that a clock that slows down slows all of them
        for way, loss in ways.items():
            try:
                seconds, peaks[way] = _forward_and_backward(loss, [hidden, linear.weight], device)
                times[way].append(seconds)
            except torch.OutOfMemoryError as error:
                lines.say("note", text=f"head {way}: {str(error)[:200]}")
    sizes_used = {"tokens": tokens, "width": width, "words": words}
    for way, seconds in times.items():
        later = seconds[1:]  # the first run of a kernel picks and compiles it
        if later:
            median = 1000 * statistics.median(later)
            gib = peaks[way] if device.type == "cuda" else None
            lines.say("head", way=way, milliseconds=median, raw_seconds=seconds, extra_gib=gib, **sizes_used)


def _heads(
    hidden: torch.Tensor, linear: torch.nn.Linear, labels: torch.Tensor, device: torch.device
) -> dict[str, Callable[[], torch.Tensor]]:
    chunked = ChunkedHead(linear)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: chunked(hidden, labels),
        "plain": lambda: F.cross_entropy(F.linear(hidden, linear.weight).float(), labels, reduction="sum"),
    }
    if importlib.util.find_spec("liger_kernel") and device.type == "cuda":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

        ways["liger"] = lambda: fused(hidden, linear.weight, labels, reduction="sum")
    else:
        lines.say("note", text="head alone: liger: not installed" if device.type == "cuda" else "liger: needs a GPU")
    return ways


def _forward_and_backward(
    loss: Callable[[], torch.Tensor], wanted: list[torch.Tensor], device: torch.device
) -> tuple[float, float]:
    before = 0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: torch.autograd.grad(loss(), wanted), device)
    after = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return seconds, (after - before) / 2**30
