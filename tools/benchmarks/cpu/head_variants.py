"""The head by itself on a CPU: whole logits, chunks, Liger's. Time and peak memory, forward and backward.

    python tools/benchmarks/cpu/head_variants.py --out docs/benchmarks/cpu/head_variants

Each variant runs in a process of its own, whose peak resident memory, less what it held before the head ran, is its memory. All
get the same numbers, and their losses are compared before anything is reported. On a CPU the three tell how much memory they
need; which is fastest on a GPU is `gpu_suite.py`'s to say.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]

from cpu.pairs import Measured, alternate, median, ratio_text, table, write  # noqa: E402

WAYS = ("plain", "chunked", "liger")
SIZES = {"tokens": 4096, "width": 128, "words": 64_000, "chunk": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json and STEM.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.dtype)))
        return
    reason = liger_problem()
    ways = [way for way in WAYS if way != "liger" or not reason]
    found = alternate({way: lambda way=way: child(way, options.dtype) for way in ways}, options.rounds)
    losses = {row["loss"] for rows in found.values() for row in rows}
    tolerance = 1e-5 if options.dtype == "fp32" else 1e-3
    assert max(losses) - min(losses) <= tolerance * abs(min(losses)), f"the losses differ: {losses}"
    text = report(found) + (f"\n\nLiger: not run: {reason}." if reason else "")
    write(options.out, "head_variants", SIZES | {"dtype": options.dtype}, found, text)


def report(found: dict[str, list[Measured]]) -> str:
    rows = [
        [way, f"{median(found[way], 'seconds'):.2f}", f"{median(found[way], 'cpu_seconds'):.2f}",
         f"{median(found[way], 'peak_mb'):,.0f}", ratio_text(found[way], found["plain"], "cpu_seconds"),
         ratio_text(found[way], found["plain"], "peak_mb")]
        for way in found
    ]  # fmt: skip
    return table(["head", "seconds", "CPU seconds", "MB at its peak", "CPU / plain", "memory / plain"], rows)


def child(way: str, dtype: str) -> Measured:
    command = [sys.executable, __file__, "--child", way, "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{way} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, dtype: str) -> Measured:
    """Seconds of the second of two passes, peak MB over what was held before, and the loss."""
    import torch

    hidden, linear, labels = _inputs(dtype)
    loss = _losses(way, hidden, linear, labels)
    before = _peak_mb()
    for _ in range(2):
        begin, cpu = time.perf_counter(), time.process_time()
        value = loss()
        torch.autograd.grad(value, [hidden, linear.weight])
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": _peak_mb() - before,
        "loss": float(value.detach()),
    }


def _inputs(dtype: str):
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    generator = torch.Generator().manual_seed(1)
    tokens, width, words = SIZES["tokens"], SIZES["width"], SIZES["words"]
    hidden = torch.randn(tokens, width, generator=generator).to(kind).requires_grad_()
    linear = torch.nn.Linear(width, words, bias=False, device="meta")
    weight = torch.randn(words, width, generator=generator) * width**-0.5
    linear.weight = torch.nn.Parameter(weight.to(kind))
    return hidden, linear, torch.randint(words, (tokens,), generator=generator)


def _losses(way: str, hidden, linear, labels):
    import torch.nn.functional as F

    if way == "plain":
        return lambda: F.cross_entropy(F.linear(hidden, linear.weight).float(), labels, reduction="sum")
    if way == "chunked":
        from megatron_steel.model.head import ChunkedHead

        head = ChunkedHead(linear, chunk_tokens=SIZES["chunk"])
        return lambda: head(hidden, labels)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

    return lambda: fused(hidden, linear.weight, labels, reduction="sum")


def liger_problem() -> str:
    """Why Liger's head cannot run here; empty where it can."""
    import importlib.util

    import torch

    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return "" if torch.cuda.is_available() else "its kernels are Triton's and need a GPU"


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
