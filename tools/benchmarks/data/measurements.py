"""One measurement each, for `dataset_vs_megatron.py`, which runs every one in a child process of its own.

`NAME_ours` and `NAME_theirs` return seconds for the same work: of opening, or per sample, or of a seek. The peer of a
seek is a loader of TinyLlama's kind, which has to take every batch out again; megatron-core is the others'.
"""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_steel.data.dataset import BlendedDataset
from megatron_steel.data.indexed import IndexedDataset
from megatron_steel.data.loader import Loader, _micro_batch
from megatron_steel.data.manifest import trust
from megatron_steel.data.order import OrderState
from megatron_steel.data.order_json import from_json
from megatron_steel.data.segments import Member, plan

L, EOD, SEED, BATCH = 2048, 0, 1234, 8


def ours(prefix: str, samples: int, batch: int = BATCH) -> tuple[BlendedDataset, OrderState]:
    found = trust(prefix)
    order = plan(None, [Member(prefix, found.digest, found.tokens)], L, batch, samples, SEED)
    return BlendedDataset(order, {found.digest: IndexedDataset(prefix)}), order


class Tokenizer:
    """What GPTDatasetConfig asks of one."""

    eod, pad, vocab_size = EOD, -1, 151_936
    unique_identifiers = special_tokens_dict = {"class": "stub"}  # noqa: RUF012


def theirs(megatron: str, prefix: str, samples: int, masks: bool = False) -> Any:
    """A `GPTDataset` over all documents. The import is done here, and timed by nobody."""
    sys.path.append(megatron)  # append, do not insert: it brings packages of its own
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Theirs
    from megatron.core.datasets.utils import Split

    def build() -> Any:
        config = GPTDatasetConfig(
            random_seed=SEED, sequence_length=L, blend=([prefix], None), split="1,0,0", tokenizer=Tokenizer(),
            reset_position_ids=masks, reset_attention_mask=masks, eod_mask_loss=False, create_attention_mask=masks,
        )  # fmt: skip
        data = Theirs(prefix, multimodal=False, mmap=True)
        documents = np.arange(data.document_indices.shape[0] - 1, dtype=np.int32)
        return GPTDataset(data, prefix, documents, samples, Split.train, config)

    return build


def equal(megatron: str, prefix: str, samples: int) -> str:
    """Both read the same tokens, and tell the documents of a sample apart in the same way. Raises AssertionError."""
    data = theirs(megatron, prefix, 1000, masks=True)()
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    from megatron_steel.model.attention import document_inputs

    dataset, _ = ours(prefix, samples)
    mine = IndexedDataset(prefix)
    for number in range(samples):
        row, (first, skip) = data[number], data.sample_index[data.shuffle_index[number]]
        parts, at = [], first
        while sum(map(len, parts)) < skip + L + 1:
            parts.append(mine.document(int(data.document_index[at])))
            at += 1
        tokens = np.concatenate(parts)[skip : skip + L + 1]
        assert np.array_equal(row["tokens"].numpy(), tokens[:-1])
        assert np.array_equal(row["labels"].numpy(), tokens[1:])
        batch = _micro_batch(dataset, [number], document_mask=True)
        mask, _, positions = _get_ltor_masks_and_position_ids(batch["input_ids"][0], EOD, True, True, False, True)
        inputs = document_inputs(batch["document_ids"])
        assert torch.equal(inputs["attention_mask"][0], ~mask)
        assert torch.equal(inputs["position_ids"][0], positions)
    return f"{samples} samples: tokens, labels, masks, positions"


def open_ours(megatron: str, prefix: str, samples: int, keep_cache: bool) -> float:
    begin = time.perf_counter()
    dataset, order = ours(prefix, samples)
    with Loader(dataset, order, BATCH, BATCH) as loader:
        (batch,) = loader.step()
        seconds = time.perf_counter() - begin
    assert batch["input_ids"].shape == (BATCH, L)
    return seconds


def open_theirs(megatron: str, prefix: str, samples: int, keep_cache: bool) -> float:
    build = theirs(megatron, prefix, samples)
    from torch.utils.data import default_collate

    cache = Path(prefix) / "cache"
    if keep_cache:
        build()
    else:
        shutil.rmtree(cache, ignore_errors=True)
    begin = time.perf_counter()
    data = build()
    batch = default_collate([data[i] for i in range(BATCH)])
    seconds = time.perf_counter() - begin
    assert batch["tokens"].shape == (BATCH, L)
    return seconds


def read_ours(megatron: str, prefix: str, samples: int, cold: bool) -> float:
    _forget(prefix)
    dataset, _ = ours(prefix, 10 * samples)
    return _per_sample(lambda numbers: _micro_batch(dataset, numbers, False), samples, cold)


def read_theirs(megatron: str, prefix: str, samples: int, cold: bool) -> float:
    build = theirs(megatron, prefix, 10 * samples)
    _forget(prefix)
    return _per_sample(_collated(build()), samples, cold)


def masked_ours(megatron: str, prefix: str, samples: int) -> float:
    """With `document_ids`, from which the training makes mask and positions where the model runs."""
    dataset, _ = ours(prefix, 10 * samples)
    return _per_sample(lambda numbers: _micro_batch(dataset, numbers, True), samples, False)


def dense_ours(megatron: str, prefix: str, samples: int) -> float:
    """And with the mask and the positions, made on the CPU as theirs are."""
    from megatron_steel.model.attention import document_inputs

    dataset, _ = ours(prefix, 10 * samples)
    return _per_sample(lambda n: document_inputs(_micro_batch(dataset, n, True)["document_ids"]), samples, False)


def masked_theirs(megatron: str, prefix: str, samples: int) -> float:
    return _per_sample(_collated(theirs(megatron, prefix, 10 * samples, masks=True)()), samples, False)


dense_theirs = masked_theirs


def _collated(data: Any) -> Callable[[range], Any]:
    """Micro-batches as torch's DataLoader makes them."""
    return lambda numbers: torch.utils.data.default_collate([data[i] for i in numbers])


def _per_sample(take: Callable[[range], Any], samples: int, cold: bool) -> float:
    """Seconds per sample, in micro-batches: of samples never read before from files that are not in memory, or of a second time."""
    batches = [range(i, i + BATCH) for i in range(0, samples, BATCH)]
    if not cold:
        for numbers in batches:
            take(numbers)
    begin = time.perf_counter()
    for numbers in batches:
        take(numbers)
    return (time.perf_counter() - begin) / (len(batches) * BATCH)


def _forget(prefix: str) -> None:
    """Take a data set's files out of the page cache (clean pages that nobody has mapped)."""
    for kind in ("bin", "idx"):
        fd = os.open(f"{prefix}.{kind}", os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def seek_ours(megatron: str, prefix: str, step: int, replayed: int) -> float:
    """From the JSON of a run's state to the place of every sample of a step: the median of 21 steps from `step` on."""
    _, order = ours(prefix, (step + 21) * BATCH)
    saved, seconds = order.to_json(), []
    for number in range(step, step + 21):
        begin = time.perf_counter()
        state, batch = from_json(saved, "here").before_step(number)
        places = [state.locate(state.next_sample + i) for i in range(batch)]
        seconds.append(time.perf_counter() - begin)
        assert len(set(places)) == BATCH
    return statistics.median(seconds)


def seek_theirs(megatron: str, prefix: str, step: int, replayed: int) -> float:
    """The resume of a loader that can only go forward, timed over `replayed` steps and scaled up to `step`."""
    loader = torch.utils.data.DataLoader(Blocks(prefix), batch_size=BATCH)
    begin = time.perf_counter()
    for number, _ in enumerate(loader):
        if number < replayed:
            continue  # TinyLlama's loop: the batch is made and thrown away
        break
    return (time.perf_counter() - begin) / (replayed + 1) * (step - 1)


class Blocks(torch.utils.data.IterableDataset):
    """Blocks of one file in a shuffled order, for ever: what TinyLlama's PackedDataset does with its chunks."""

    def __init__(self, prefix: str):
        self._tokens = np.memmap(f"{prefix}.bin", np.int32, "r")

    def __iter__(self) -> Any:
        generator, count = np.random.default_rng(SEED), len(self._tokens) // (L + 1)
        while True:
            for block in generator.permutation(count):
                piece = self._tokens[block * (L + 1) : (block + 1) * (L + 1)]
                yield torch.from_numpy(piece.astype(np.int64))


def memory(prefix: str) -> float:
    """MB by which this process grows, at its peak, from opening to the 200th batch; what it imported is not counted."""
    torch.zeros(1)
    before = _peak()
    dataset, order = ours(prefix, 10**6 * BATCH)
    with Loader(dataset, order, BATCH, BATCH) as loader:
        for _ in range(200):
            loader.step()
    return (_peak() - before) / 1e6


def _peak() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
