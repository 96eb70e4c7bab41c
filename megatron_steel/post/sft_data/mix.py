"""Which usable rows of several sets go into a mixture, and in which order: computed from their keys, not drawn by chance.

Must not know rows, files or tokenizers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    import numpy as np


class Wanted(Protocol):
    """How much of a set: a share, a number, a weight against the other sets, or (all None) everything."""

    @property
    def type(self) -> str: ...
    @property
    def ratio(self) -> float | None: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def weight(self) -> float | None: ...


@dataclass(frozen=True)
class Mixture:
    """Counts by set, and the drawn rows.

    Attributes:
        duplicates: rows of each set whose content stood earlier (in it or in a set before it).
        usable: different rows of each set.
        drawn: how many of them are in the mixture.
        order: [rows drawn] int64, positions in the sets laid end to end, in the order of the mixture.
    """

    duplicates: list[int]
    usable: list[int]
    drawn: list[int]
    order: "np.ndarray"


def mix(keys: Sequence["np.ndarray"], places: Sequence["np.ndarray"], wanted: Sequence[Wanted]) -> Mixture:
    """Choose rows by their keys: of each set those with the smallest; in the order of their places.

    Args:
        keys: of each set [rows] uint64; equal keys are equal rows. places: of each set [rows] uint64.
        wanted: of each set. The rows of a smaller draw are all in a larger one.

    Raises SteelError: fewer usable rows than wanted, weights that leave a set without any.
    """
    import numpy as np

    every = np.concatenate(keys)
    first = np.zeros(len(every), bool)
    first[np.unique(every, return_index=True)[1]] = True
    bounds = np.cumsum([0, *map(len, keys)])
    spans = [np.flatnonzero(first[a:b]) + a for a, b in itertools.pairwise(bounds)]
    usable = [len(span) for span in spans]
    drawn = _counts(usable, wanted)
    taken = [span[np.argsort(every[span], kind="stable")[:n]] for span, n in zip(spans, drawn, strict=True)]
    chosen = np.concatenate(taken)
    order = chosen[np.lexsort((every[chosen], np.concatenate(places)[chosen]))]
    return Mixture([len(k) - n for k, n in zip(keys, usable, strict=True)], usable, drawn, order)


def _counts(usable: Sequence[int], wanted: Sequence[Wanted]) -> list[int]:
    if wanted[0].weight is not None:
        weights = [part.weight or 0.0 for part in wanted]
        scale = min(n / weight for n, weight in zip(usable, weights, strict=True))
        shares = [int(scale * weight + 1e-6) for weight in weights]
        for part, n, share in zip(wanted, usable, shares, strict=True):
            if not share:
                what = f"by these weights none of the {n:,} usable rows of {part.type} is drawn"
                raise SteelError(what, f"source {part.type}", "give it a larger weight, or leave it out")
        return shares
    counts = []
    for n, part in zip(usable, wanted, strict=True):
        if part.rows is not None and part.rows > n:
            what = f"{part.rows:,} rows of {part.type} are wanted and {n:,} different ones are usable"
            raise SteelError(what, f"source {part.type}", "want fewer, or give more files: no row is used twice")
        counts.append(n if part.rows is None else part.rows)
        if part.ratio is not None:
            counts[-1] = int(part.ratio * n + 0.5)
    return counts
