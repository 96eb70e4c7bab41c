"""Which sample is number n of a run: a function of a few numbers, never a stored list.

From the sample number down to tokens (segments.py opens segments, order_json.py reads the state back):

1. A run is a list of **segments**. Segment s holds samples [first, next segment's first); everything before a new
   segment keeps its place for ever.
2. Inside a segment `Interleave` says which data set draws sample n and how many draws it made before (blend.py).
3. A data set's draws go through its **epochs**, one finished before the next begins: with T tokens and sequence
   length L an epoch has (T - L) // L blocks, and draw j of epoch e is block permute(j) under a key of
   (seed, data set, e). Block k is the L + 1 tokens from offset(e) + kL, with 0 <= offset(e) < L from a hash;
   the fewer than 2L tokens before the first and after the last block sit that epoch out.

**Counters.** Where a data set stands is (epoch, blocks drawn of it). A segment stores them as they were at its
start, for every data set the run has ever seen, so that one taken out and put back goes on where it was.

**No weights** means by what is left: a segment over the rest of each data set's epoch, each block once, then one
of whole epochs by size, which repeats for ever (so a longer run needs no new segment).

A data set is its content digest; its path and its place in the list decide nothing. Knows no bytes, files, ranks or
tensors. State on disk: `OrderState.to_json`, plain numbers.
"""

import bisect
import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from megatron_steel.data.blend import Interleave, apportion
from megatron_steel.data.permutation import key_of, permute
from megatron_steel.data.ramp import Ramp, endless, joined, samples_of

Drawn: TypeAlias = dict[str, tuple[int, int]]
"""Digest -> (epoch, blocks drawn of that epoch)."""


class Place(NamedTuple):
    """Where a sample lies: tokens [start, start + sequence_length + 1) of a data set."""

    digest: str
    epoch: int
    start: int
    sequence_length: int


def blocks(tokens: int, sequence_length: int) -> int:
    """Blocks of one epoch. All fit, wherever the offset falls: (L - 1) + nL + 1 <= T."""
    return max(0, (tokens - sequence_length) // sequence_length)


@dataclass(frozen=True)
class Segment:
    """A stretch of samples with one blend. Its order is fixed by these fields and the seed."""

    first_sample: int
    samples: int
    """N, for which the quotas are exact. A later segment may begin before; one that `repeats` goes on past it."""
    sequence_length: int
    batch: int
    """Samples per step, once the ramp is over."""
    tokens: dict[str, int]
    """Digest -> tokens, by digest: how the user lists data sets does not matter."""
    weights: dict[str, float] | None
    drawn: Drawn
    """Counters at the start, of every data set the run has seen."""
    ramp: Ramp = ()
    """(until, batch): a step that begins before so many trained samples of the run takes `batch` (ramp.py)."""

    @property
    def repeats(self) -> bool:
        """Whole epochs by size, again and again."""
        return self.weights is None and all(self.drawn[d][1] == 0 for d in self.tokens)

    @property
    def end(self) -> float:
        """The first sample number that is not in this segment, were it the last (infinite where it repeats)."""
        return math.inf if self.repeats else self.first_sample + self.samples

    def quotas(self) -> list[int]:
        """How many of its N samples each data set gives."""
        if self.weights is not None:
            return apportion(self.samples, [self.weights[d] for d in self.tokens])
        return [self.blocks(d) - self.drawn[d][1] for d in self.tokens]

    def blocks(self, digest: str) -> int:
        return blocks(self.tokens[digest], self.sequence_length)

    @functools.cached_property
    def interleave(self) -> Interleave:
        return Interleave(self.quotas())

    def draw(self, sample: int) -> tuple[str, int, int]:
        """(digest, epoch, draw within the epoch) of a run's sample number."""
        member, draws = self.interleave.locate(sample - self.first_sample)
        digest = list(self.tokens)[member]
        epoch, used = self.drawn[digest]
        more, draw = divmod(used + draws, self.blocks(digest))
        return digest, epoch + more, draw

    def drawn_before(self, sample: int) -> Drawn:
        """Counters when all samples before `sample` have been drawn."""
        drawn = dict(self.drawn)
        for digest, draws in zip(self.tokens, self.interleave.counts(sample - self.first_sample), strict=True):
            epoch, used = drawn[digest]
            more, used = divmod(used + draws, self.blocks(digest))
            drawn[digest] = (epoch + more, used)
        return drawn


@dataclass(frozen=True)
class OrderState:
    """The whole state of a run's data: who comes when, what is passed over, and which sample is next."""

    seed: int
    segments: tuple[Segment, ...]
    skipped: tuple[tuple[int, int], ...] = ()
    """Sorted ranges [start, stop) that do not touch; `next_sample` is inside none, at most at a start."""
    next_sample: int = 0

    @property
    def trained_samples(self) -> int:
        """Samples before the next one that were not skipped."""
        return self.next_sample - sum(b - a for a, b in self.skipped if a < self.next_sample)

    def locate(self, sample: int) -> Place:
        """The tokens of sample number `sample`, past or future. Raises IndexError beyond the planned end."""
        if not 0 <= sample < self.segments[-1].end:
            raise IndexError(f"sample {sample} is not planned")
        segment = self._segment(sample)
        digest, epoch, draw = segment.draw(sample)
        block_key, offset_key = _keys(self.seed, digest, epoch)
        block = permute(draw, segment.blocks(digest), block_key)
        offset = offset_key % segment.sequence_length
        return Place(digest, epoch, offset + block * segment.sequence_length, segment.sequence_length)

    def drawn_before(self, sample: int) -> Drawn:
        """(epoch, blocks drawn) of every data set when all samples before `sample` have been drawn."""
        return self._segment(sample).drawn_before(sample)

    def shares(self) -> dict[str, float]:
        """Digest -> share of the samples drawn since the newest segment opened (none drawn: as it ends)."""
        segment = self._segment(max(0, self.next_sample - 1))
        counts = segment.interleave.counts((self.next_sample - segment.first_sample) or segment.samples)
        return {digest: count / sum(counts) for digest, count in zip(segment.tokens, counts, strict=True)}

    @property
    def batch(self) -> int:
        """Samples of the next step."""
        return samples_of(self.ramp(), self.trained_samples, 1)

    def ramp(self) -> Ramp:
        """Samples per step of the whole run, as its segments have it."""
        return joined(
            (dataclasses.replace(self, next_sample=s.first_sample).trained_samples, endless(s.ramp, s.batch))
            for s in self.segments
        )

    def after(self, count: int) -> "OrderState":
        """The state when `count` more unskipped samples are done: what `next_batch` leaves, without their numbers."""
        at, missing = self.next_sample, count
        for start, stop in self.skipped:
            if stop > at:
                if missing <= start - at:
                    break
                at, missing = stop, missing - (start - at)
        return dataclasses.replace(self, next_sample=at + missing)

    def after_steps(self, steps: int) -> "OrderState":
        """The state when `steps` more steps are done."""
        return self.after(samples_of(self.ramp(), self.trained_samples, steps))

    def before_step(self, step: int) -> tuple["OrderState", int]:
        """The state as optimizer step `step` (from 1) begins, and how many samples that step takes.

        Batches change where a ramp says so and where a run went on, both between two steps; samples that were passed over
        belong to no step. Raises IndexError for a step before 1.
        """
        if step < 1:
            raise IndexError(f"there is no step {step}: the first is 1")
        state = dataclasses.replace(self, next_sample=0).after_steps(step - 1)
        return state, state.batch

    def _segment(self, sample: int) -> Segment:
        return self.segments[bisect.bisect_right(self.segments, sample, key=lambda s: s.first_sample) - 1]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; `order_json.from_json` reads them back."""
        return dataclasses.asdict(self)


@functools.lru_cache(maxsize=4096)
def _keys(seed: int, digest: str, epoch: int) -> tuple[int, int]:
    """Of the order of a data set's blocks in an epoch, and of where they are cut."""
    return key_of("block", seed, digest, epoch), key_of("offset", seed, digest, epoch)


def next_batch(state: OrderState, count: int) -> tuple[np.ndarray, OrderState]:
    """The next `count` unskipped sample numbers (int64), and the state after them. Costs one look per skipped range."""
    pieces, at, missing = [], state.next_sample, count
    for start, stop in (*state.skipped, (math.inf, math.inf)):
        if stop > at:
            taken = int(min(missing, max(0, start - at)))
            pieces.append(np.arange(at, at + taken, dtype=np.int64))
            at, missing = at + taken, missing - taken
            if not missing:
                break
            at = int(stop)
    return np.concatenate(pieces), dataclasses.replace(state, next_sample=at)
