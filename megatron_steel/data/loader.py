"""Sample numbers to this rank's micro-batches, one step ahead of the training.

1. A step is the next B unskipped sample numbers, B as the order says for it (a batch ramp makes it grow). They form B / (m * W) passes; in pass a, rank r of W takes the
   m numbers from a * W * m + r * m. Ranks only cut the range, so the world size changes nothing.
2. One background thread reads the next step, counts its labels and pins its memory while this one trains.
   `Loader.state` moves when a step is handed out: saved after step k, it is the state after k steps, whatever was read ahead.

A batch is a dict of CPU tensors, int64 [m, L]: `input_ids`; `labels`, already shifted (labels[:, t] is the token
after input_ids[:, t]; -100 is ignored); `document_ids` where asked for. Of pairs it is what `pairs.pair_batch` says. Knows
no model or optimizer.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from megatron_steel.data.dataset import BlendedDataset
from megatron_steel.data.order import OrderState, next_batch
from megatron_steel.data.pairs import IGNORED, PairDataset, pair_batch

if TYPE_CHECKING:
    import torch

Batch: TypeAlias = "dict[str, torch.Tensor]"


class Loader:
    """The steps of a run for one rank. A context manager: leaving it ends the thread.

    Args:
        dataset: samples to read.
        state: where to go on; the same on every rank.
        batch: samples per step over all ranks once a ramp is over; every B is a multiple of micro_batch * world (the
            recipe's check).
        micro_batch: m, samples per rank and pass.
        rank, world: this rank and how many there are.
        document_mask: add `document_ids`.
        pin: lay the batches in page-locked memory, from which a GPU copies without holding up its host.
    """

    def __init__(
        self,
        dataset: BlendedDataset | PairDataset,
        state: OrderState,
        batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        document_mask: bool = False,
        pin: bool = False,
    ):
        assert batch % (micro_batch * world) == 0, (batch, micro_batch, world)
        assert batch == state.segments[-1].batch, (batch, state.segments[-1].batch)
        self.state = state
        self._dataset, self._document_mask, self._pin = dataset, document_mask, pin
        self._micro_batch, self._rank, self._world = micro_batch, rank, world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=_same_gpu() if pin else None)
        self._read_ahead()

    def step(self) -> list[Batch]:
        """This rank's micro-batches of the next step. What went wrong while reading ahead is raised here."""
        batches, _ = self._ahead.result()
        self.state = self._state_ahead
        self._read_ahead()
        return batches

    def labels_ahead(self) -> int:
        """Labels of this rank that count in the step which `step` hands out next; 0 where that step cannot be read.

        Waits for the reading thread. What went wrong there is `step`'s to raise.
        """
        return 0 if self._ahead.exception() else self._ahead.result()[1]

    def reopen(self, dataset: BlendedDataset | PairDataset, state: OrderState) -> None:
        """Go on from another state; what was read ahead is dropped."""
        self._ahead.exception()  # waits for it
        self.state, self._dataset = state, dataset
        self._read_ahead()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        numbers, self._state_ahead = next_batch(self.state, self.state.batch)
        self._ahead: Future[tuple[list[Batch], int]] = self._thread.submit(self._read, numbers)

    def _read(self, numbers: np.ndarray) -> tuple[list[Batch], int]:
        one_pass, mine = self._micro_batch * self._world, self._rank * self._micro_batch
        assert len(numbers) % one_pass == 0, (len(numbers), one_pass)
        cuts = [slice(a + mine, a + mine + self._micro_batch) for a in range(0, len(numbers), one_pass)]
        batches = [_micro_batch(self._dataset, numbers[cut].tolist(), self._document_mask) for cut in cuts]
        if self._pin:
            batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches, counted(batches)


def _same_gpu() -> Callable[[], None]:
    """For a thread's start: a new thread stands on the first GPU, whatever its process has chosen."""
    import torch

    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def counted(batches: list[Batch]) -> int:
    """Labels that count in a loss."""
    return sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)


def validation_batches(
    dataset: BlendedDataset | PairDataset,
    samples: Sequence[int],
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    document_mask: bool = False,
) -> Iterator[Batch]:
    """This rank's share of the samples with these numbers, cut as a step is.

    Every rank gets the same number of batches, all of `micro_batch` rows: under ZeRO-3 a rank that did fewer passes
    would leave the others waiting. Where samples run out, rows whose labels are all -100 fill up, so a loss must be
    summed and divided by the labels counted over all ranks. The caller bounds `samples` by the data's epoch.
    """
    for first in range(rank * micro_batch, len(samples) + rank * micro_batch, micro_batch * world):
        yield _micro_batch(dataset, samples[first : first + micro_batch], document_mask, rows=micro_batch)


def _micro_batch(
    dataset: BlendedDataset | PairDataset, numbers: Sequence[int], document_mask: bool, rows: int = 0
) -> Batch:
    """Samples as one batch, filled up to `rows` with rows that count nothing."""
    import torch

    if isinstance(dataset, PairDataset):
        return {name: torch.from_numpy(array) for name, array in pair_batch(dataset, numbers, rows).items()}
    length = dataset.order.segments[-1].sequence_length
    ids = np.empty((max(rows, len(numbers)), length), np.int64)
    labels = np.empty_like(ids)
    for row, number in enumerate(numbers):
        dataset.fill(number, ids[row], labels[row])
    ids[len(numbers) :], labels[len(numbers) :] = 0, IGNORED
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if document_mask:
        documents = np.zeros_like(ids)
        for row, number in enumerate(numbers):
            documents[row] = dataset.document_ids(number)
        batch["document_ids"] = torch.from_numpy(documents)
    return batch
