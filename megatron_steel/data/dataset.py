"""Sample number to tokens and document ids, read straight from the `.bin` files: nothing is built beforehand.

One sample costs one read of L + 1 tokens, and, where document ids are wanted, one search in the `.idx` pointers.
Knows the order and the reader; knows no ranks, batches or tensors.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_steel.data.indexed import IndexedDataset
from megatron_steel.data.order import OrderState
from megatron_steel.errors import SteelError


class BlendedDataset:
    """The samples of an order. Only its seed and segments are used; how far a run has come does not matter.

    Args:
        order: which sample lies where.
        datasets: digest -> open data set; every one that samples from `order.next_sample` on may draw.

    Raises:
        SteelError: such a data set is missing, or has another number of tokens than the order was planned with.
    """

    def __init__(self, order: OrderState, datasets: Mapping[str, IndexedDataset]):
        self.order = order
        self._datasets = dict(datasets)
        for digest, tokens in order.segments[-1].tokens.items():
            found = self._dataset(digest)
            if found.tokens != tokens:
                raise SteelError(
                    f"the data has {found.tokens} tokens; the order of data was planned with {tokens}",
                    found.prefix,
                    "restore the files, or verify the data set to renew its manifest",
                )

    def tokens(self, sample: int) -> npt.NDArray[np.int64]:
        """The L + 1 tokens of a sample, int64: inputs are [:-1], labels [1:]."""
        return self._read(sample).astype(np.int64)

    def fill(self, sample: int, inputs: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> None:
        """Write a sample's inputs and labels, L each, to where they are wanted."""
        tokens = self._read(sample)
        inputs[:], labels[:] = tokens[:-1], tokens[1:]

    def document_ids(self, sample: int) -> npt.NDArray[np.int64]:
        """To which document each of the L input tokens belongs: int64, from 0, one more at each cut.

        The label at a cut stays: the last token of a document (end of document) predicts the first of the next.
        """
        place = self.order.locate(sample)
        cuts = self._dataset(place.digest).document_cuts(place.start, place.start + place.sequence_length)
        begins = np.zeros(place.sequence_length, np.int64)
        begins[cuts - place.start] = 1
        return begins.cumsum()

    def _read(self, sample: int) -> npt.NDArray[Any]:
        place = self.order.locate(sample)
        return self._dataset(place.digest).read(place.start, place.start + place.sequence_length + 1)

    def _dataset(self, digest: str) -> IndexedDataset:
        if digest not in self._datasets:
            raise SteelError(
                f"the order of data draws from a data set that is not open (digest {digest[:12]}...)",
                "data.train",
                "name its prefix again, or continue from the newest checkpoint so that the change is planned",
            )
        return self._datasets[digest]
