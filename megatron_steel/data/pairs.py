"""Pairs of a prompt and a response, for encoder-decoder models: sample number to ids, and samples to one padded batch.

A data set of pairs is Megatron's format with two sequences a document (`tokenize --prompt-key`), each with the end of
document behind it. The order of data counts pairs where it counts tokens for texts: with P + 1 tokens and sequences of 1
an epoch has P blocks, the offset is 0 and block k is pair k (`order.blocks`). So everything that holds of the order
(appending, weights, epochs, world sizes) holds of pairs.

A batch is cut to whole buckets, not to the longest length there is: padding costs time and few shapes cost nothing.
Knows no model, ranks or tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_steel.data.indexed import IndexedDataset, idx_path
from megatron_steel.data.order import OrderState
from megatron_steel.errors import SteelError

IGNORED = -100  # the label that cross-entropy leaves out
BUCKET_TOKENS = 32
"""Lengths in a batch are multiples of this many tokens, up to the longest that is allowed."""
SAMPLE_LENGTH = 1
"""The order's sequence length where it counts pairs."""


def counted_as_tokens(pairs: int) -> int:
    """The number of tokens that the order is told for so many pairs."""
    return pairs + SAMPLE_LENGTH


class PairDataset:
    """The pairs of an order. Only its seed and segments are used; how far a run has come does not matter.

    Args:
        order: which sample is which pair.
        datasets: digest -> open data set; every one that samples from `order.next_sample` on may draw.
        longest: tokens of a prompt, and of a response, that are kept; of a longer one its beginning, without an end of
            document.

    Raises:
        SteelError: such a data set is missing, has other documents than the order was planned with, or is no pairs.
    """

    def __init__(self, order: OrderState, datasets: Mapping[str, IndexedDataset], longest: int):
        self.order, self.longest = order, longest
        self._datasets = dict(datasets)
        for digest, planned in order.segments[-1].tokens.items():
            found = self._dataset(digest)
            if counted_as_tokens(found.documents) != planned or found.sequences != 2 * found.documents:
                what = (
                    f"the data has {found.documents} documents of {found.sequences} sequences; the order of data was "
                    f"planned with {planned - SAMPLE_LENGTH} pairs"
                )
                raise SteelError(what, found.prefix, "restore the files, or tokenize the pairs again")

    def pair(self, sample: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Prompt and response ids of a sample, at most `longest` each, in the file's dtype."""
        place = self.order.locate(sample)
        return read_pair(self._dataset(place.digest), place.start, self.longest)

    def _dataset(self, digest: str) -> IndexedDataset:
        if digest not in self._datasets:
            raise SteelError(
                f"the order of data draws from a data set that is not open (digest {digest[:12]}...)",
                "data.train",
                "name its prefix again, or continue from the newest checkpoint so that the change is planned",
            )
        return self._datasets[digest]


def read_pair(data: IndexedDataset, number: int, longest: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The two sequences of document `number`, cut to `longest` tokens each. Raises SteelError where it has another count."""
    first, stop = data.boundaries(number, number + 2).tolist()
    if stop - first != 2:
        what = f"document {number} (counted from 0) has {stop - first} sequences and is no pair"
        raise SteelError(what, idx_path(data.prefix), "tokenize the pairs again")
    lengths = data.lengths(first, stop).tolist()
    start = int(data.offsets(first, first + 1)[0]) // data.dtype.itemsize
    ids = data.read(start, start + sum(lengths))
    return ids[: lengths[0]][:longest], ids[lengths[0] :][:longest]


def pair_batch(dataset: PairDataset, numbers: Sequence[int], rows: int = 0) -> dict[str, npt.NDArray[np.int64]]:
    """Samples as one batch of int64 arrays, filled up to `rows` with rows that count nothing.

    Returns:
        input_ids [m, S]: prompts, 0 behind them. attention_mask [m, S]: 1 where a prompt is (its first place in a row that
        counts nothing, which attention needs). labels [m, T]: responses, not shifted, -100 behind them. S and T are the
        longest of the batch, up to the next bucket.
    """
    pairs = [dataset.pair(number) for number in numbers]
    m = max(rows, len(pairs))
    S, T = (bucket(max((len(pair[side]) for pair in pairs), default=1), dataset.longest) for side in (0, 1))
    ids, mask = np.zeros((m, S), np.int64), np.zeros((m, S), np.int64)
    labels = np.full((m, T), IGNORED, np.int64)
    mask[len(pairs) :, 0] = 1
    for row, (prompt, response) in enumerate(pairs):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        labels[row, : len(response)] = response
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bucket(length: int, longest: int) -> int:
    """The padded length: the next multiple of `BUCKET_TOKENS`, but no more than `longest`."""
    return min(-(-length // BUCKET_TOKENS) * BUCKET_TOKENS, longest)


def cut_share(data: IndexedDataset, longest: int) -> float:
    """The share of the pairs of which something lies behind `longest` tokens; one pass over the index."""
    cut, step = 0, 1 << 20
    for start in range(0, data.sequences, step):
        lengths = data.lengths(start, min(start + step, data.sequences)).reshape(-1, 2)
        cut += int(np.count_nonzero(lengths.max(axis=1) > longest))
    return cut / data.documents
