"""What the hardware gives at most: matrix products on every rank at once, and the exchange between ranks.

deepspeed tools/node_check/ceilings.py OUT.json      started by `trials`; rank 0 writes
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_steel import dist

_SECONDS = 1.5  # of each measurement


def main(out: str) -> None:
    device = dist.start()
    found = {"gemm": _gemms(device), "exchange": _exchanges(device) if dist.world_size() > 1 else []}
    if dist.is_main():
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()


def _gemms(device: torch.device) -> list[dict]:
    """TFLOP/s of n x n x n products, all ranks at once: the slowest rank's, and the sum."""
    gpu = device.type == "cuda"
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        n = 8192 if gpu else 768
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = _seconds(lambda a=a, b=b: a @ b, device)
        rate = 2 * n**3 / seconds / 1e12
        slowest, total = -dist.max_over_ranks([-rate])[0], dist.sum_over_ranks([rate])[0]
        rows.append({"dtype": str(dtype).removeprefix("torch."), "n": n, "slowest": slowest, "all_ranks": total})
    return rows


def _exchanges(device: torch.device) -> list[dict]:
    """Bus bandwidth, counted as nccl-tests does (PERFORMANCE.md): what a link must carry, whatever the number of ranks."""
    ranks = dist.world_size()
    group = torch.distributed
    largest = 2**28 if device.type == "cuda" else 2**22
    rows = []
    for size in (largest // 64, largest):  # bytes of the whole tensor
        whole = torch.ones(size // 4 // ranks * ranks, device=device)
        part = whole[: len(whole) // ranks].clone()
        calls: dict[str, tuple[Callable[[], object], float]] = {
            "all_reduce": (lambda w=whole: group.all_reduce(w), 2 * (ranks - 1) / ranks),
            "all_gather": (lambda w=whole, p=part: group.all_gather_into_tensor(w, p), (ranks - 1) / ranks),
            "reduce_scatter": (lambda w=whole, p=part: group.reduce_scatter_tensor(p, w), (ranks - 1) / ranks),
        }
        for name, (call, share) in calls.items():
            seconds = dist.max_over_ranks([_seconds(call, device)])[0]
            rows.append({"what": name, "bytes": size, "seconds": seconds, "bus_gb_per_s": share * size / seconds / 1e9})
    return rows


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Of one call, after three; equally often on every rank."""

    def timed(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    timed(3)
    often = int(min(1000, max(3, _SECONDS / dist.max_over_ranks([timed(1)])[0])))
    return timed(often)


if __name__ == "__main__":
    main(next(word for word in sys.argv[1:] if not word.startswith("--local_rank")))
