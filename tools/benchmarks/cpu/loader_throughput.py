"""Samples a second out of the loader, beside torch's DataLoader over a memory-mapped file and over HF datasets (arrow).

    python tools/benchmarks/cpu/loader_throughput.py --out docs/benchmarks/cpu/loader_throughput

All give shuffled micro-batches of `input_ids` and `labels`, int64, from warm files. Ours blends and can resume at any step; it
reads the next step in a thread of its own, so here, where nothing trains, it is measured as fast as that thread is. Each
peer runs in the main process and, once more, with one worker process. CPU is all of the processes together.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import toy_data  # noqa: E402

from cpu.pairs import Measured, alternate, median, ratio_text, table, write  # noqa: E402
from megatron_steel.data.dataset import BlendedDataset  # noqa: E402
from megatron_steel.data.indexed import IndexedDataset  # noqa: E402
from megatron_steel.data.loader import Loader  # noqa: E402
from megatron_steel.data.manifest import trust  # noqa: E402
from megatron_steel.data.segments import Member, plan  # noqa: E402

LENGTH, MICRO, BATCH, WORDS = 2048, 8, 64, 64_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help=f"of {BATCH} samples")
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json and STEM.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        ways = prepared(Path(name), options.steps)
        found = alternate({way: lambda t=take: timed(t, options.steps) for way, take in ways.items()}, options.rounds)
    setting = {"length": LENGTH, "micro_batch": MICRO, "batch": BATCH, "steps": options.steps}
    write(options.out, "loader_throughput", setting, found, report(found))


def report(found: dict[str, list[Measured]]) -> str:
    rows = [
        [way, f"{median(found[way], 'samples_per_second'):,.0f}", f"{median(found[way], 'cpu_us'):.0f}",
         ratio_text(found["megatron_steel"], found[way], "samples_per_second")]
        for way in found
    ]  # fmt: skip
    return table(["loader", "samples/s", "CPU us a sample", "ours / it"], rows)


def prepared(folder: Path, steps: int) -> dict[str, Callable[[int], Iterator[Any]]]:
    """Write the data in both forms; each way, given a number of micro-batches, yields them."""
    prefix = toy_data.write_data(folder / "train", (steps * BATCH + 8) * LENGTH * 11 // 10, WORDS)
    blocks, arrow = Blocks(prefix), as_arrow(prefix, folder / "arrow")

    def ours(count: int) -> Iterator[Any]:
        found = trust(str(prefix))
        order = plan(None, [Member(str(prefix), found.digest, found.tokens)], LENGTH, BATCH, steps * BATCH, 1)
        dataset = BlendedDataset(order, {found.digest: IndexedDataset(str(prefix))})
        with Loader(dataset, order, BATCH, MICRO) as loader:
            for _ in range(count * MICRO // BATCH):
                yield from loader.step()

    def torch_loader(data: Any, workers: int) -> Callable[[int], Iterator[Any]]:
        def take(count: int) -> Iterator[Any]:
            sampler = torch.utils.data.RandomSampler(data, num_samples=count * MICRO)
            yield from torch.utils.data.DataLoader(data, MICRO, sampler=sampler, num_workers=workers)

        return take

    return {
        "megatron_steel": ours,
        "DataLoader, memmap": torch_loader(blocks, 0),
        "DataLoader, memmap, 1 worker": torch_loader(blocks, 1),
        "DataLoader, HF datasets": torch_loader(arrow, 0),
        "DataLoader, HF datasets, 1 worker": torch_loader(arrow, 1),
    }


class Blocks:
    """One file of tokens, memory-mapped, cut into samples: what one writes by hand."""

    def __init__(self, prefix: Path):
        self._tokens = np.memmap(f"{prefix}.bin", np.uint16, "r")

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // LENGTH

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self._tokens[number * LENGTH : (number + 1) * LENGTH + 1].astype(np.int64))
        return {"input_ids": row[:-1], "labels": row[1:]}


def as_arrow(prefix: Path, folder: Path) -> Any:
    """The same samples as HF datasets keeps tokenized text: a column of lists on disk, read as torch tensors."""
    import datasets

    datasets.disable_progress_bars()
    tokens = np.memmap(f"{prefix}.bin", np.uint16, "r")
    count = (len(tokens) - 1) // LENGTH
    rows = [tokens[i * LENGTH : (i + 1) * LENGTH + 1].astype(np.int32) for i in range(count)]
    datasets.Dataset.from_dict({"tokens": rows}).save_to_disk(folder)
    data = datasets.load_from_disk(str(folder)).with_format("torch")

    class Shifted:
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            row = data[number]["tokens"]
            return {"input_ids": row[:-1], "labels": row[1:]}

    return Shifted()


def timed(take: Callable[[int], Iterator[Any]], steps: int) -> Measured:
    """Samples a second and CPU microseconds a sample, over so many steps, from the first call to the last batch."""
    count, cpu = steps * BATCH // MICRO, _cpu_seconds()
    begin = time.perf_counter()
    given = 0
    for batch in take(count):
        assert batch["input_ids"].shape == (MICRO, LENGTH), batch["input_ids"].shape
        given += MICRO
    seconds = time.perf_counter() - begin
    assert given == count * MICRO, (given, count * MICRO)
    return {"samples_per_second": given / seconds, "cpu_us": 1e6 * (_cpu_seconds() - cpu) / given}


def _cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


if __name__ == "__main__":
    main()
