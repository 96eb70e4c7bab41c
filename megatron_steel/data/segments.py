"""When something changes: how a run's segments follow each other. Past samples never move.

`plan` compares what a run has with what it now wants. Other data, weights, sequence length, batch or batch ramp, or more
samples than planned open a new segment at C, the next sample, with the counters as they stand there; everything before C
keeps its place, and what old data sets have not used comes next in their own order, mixed with the new.

**A change of L** starts a new epoch of every data set whose epoch had begun, because blocks are cut anew. In an
epoch every token is predicted at most once, so a token is predicted at most as often as epochs of its data set have
begun: one change of L adds at most one to that. Nothing is lost: what the broken epoch had not drawn comes in the
new one, with everything else.

**Skipped samples** are spent: their draws count, their numbers are passed over. When a new segment opens at C, what
was to come after C is replaced, skipped ranges after C included.

Knows no bytes, files, ranks or tensors.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from megatron_steel.data.order import Drawn, OrderState, Segment, blocks
from megatron_steel.data.ramp import Ramp, ahead
from megatron_steel.errors import SteelError


class Member(NamedTuple):
    """One data set of a blend; the prefix is used in messages only."""

    prefix: str
    digest: str
    tokens: int
    weight: float | None = None
    pairs: bool = False
    """Of a prompt and a response, which `tokens` then counts (`pairs.counted_as_tokens`)."""


def samples_per_epoch(members: Iterable[Member], sequence_length: int) -> int:
    """Samples that use every block of every member once."""
    return sum(blocks(m.tokens, sequence_length) for m in members)


def plan(
    state: OrderState | None,
    members: Sequence[Member],
    sequence_length: int,
    batch: int,
    wanted_samples: int,
    seed: int,
    ramp: Ramp = (),
) -> OrderState:
    """The order of a run that trains `wanted_samples` in total: a new one, or `state` as it is, or extended.

    `state` comes back as it is when nothing that orders data has changed and its segments suffice, or when the run
    has all it wants. Otherwise a new segment opens at `state.next_sample`; nothing before it moves.

    Args:
        state: what the newest checkpoint holds; None for a new run.
        members: the data sets now, all with a weight or all without.
        sequence_length: L, in tokens; a sample has L + 1.
        batch: samples per step, over all ranks, once the ramp is over.
        wanted_samples: unskipped samples of the whole run.
        seed: of the run.
        ramp: (until, batch): steps that begin before so many trained samples of the run take `batch`.

    Raises:
        SteelError: nothing wanted, no data set, the same data twice, data shorter than two sequences, impossible
            or missing weights, or another seed than the state's.
    """
    _check_members(members, sequence_length)
    if wanted_samples < 1:
        raise SteelError("the run wants no sample at all", "train.steps, train.tokens, train.epochs", "make it longer")
    state = state or OrderState(seed, ())
    if state.seed != seed:
        raise SteelError(
            f"the run began with seed {state.seed}, which fixes its order of data; the recipe now says {seed}",
            "run.seed",
            f"set run.seed={state.seed}, or start another run in another folder",
        )
    members = sorted(members, key=lambda m: m.digest)
    tokens = {m.digest: m.tokens for m in members}
    weights = {m.digest: float(m.weight) for m in members if m.weight is not None} or None
    if state.segments:
        if wanted_samples <= state.trained_samples:
            return state
        last = state.segments[-1]
        done = state.trained_samples
        blend = (tokens, _shares(weights), sequence_length, batch, ahead(ramp, done))
        same = blend == (last.tokens, _shares(last.weights), last.sequence_length, last.batch, ahead(last.ramp, done))
        if same and _end_of(wanted_samples, state.skipped) <= last.end:
            return state
    state = _open_segments(state, tokens, weights, sequence_length, batch, wanted_samples)
    return _ramped(state, ramp)


def _ramped(state: OrderState, ramp: Ramp) -> OrderState:
    """The segments from the next sample on get what is left of the ramp."""
    left = ahead(ramp, state.trained_samples)
    return dataclasses.replace(state, segments=tuple(
        s if s.first_sample < state.next_sample else dataclasses.replace(s, ramp=left) for s in state.segments
    ))  # fmt: skip


def skip(state: OrderState, start: int, stop: int) -> OrderState:
    """Pass over samples [start, stop), all still to come. They are spent, not replaced.

    So that the run still gets as many samples as planned, a weighted blend goes on at its end with the same weights.
    Raises SteelError when the range is empty, past, or beyond the planned end.
    """
    last = state.segments[-1]
    if not state.next_sample <= start < min(stop, last.end):
        raise SteelError(
            f"samples {start} to {stop} cannot be skipped",
            f"the order of data, at sample {state.next_sample} of {last.end}",
            "give a range [start, stop) of samples that are still to come",
        )
    skipped: list[tuple[int, int]] = []
    for a, b in sorted((*state.skipped, (start, stop))):
        if skipped and a <= skipped[-1][1]:
            skipped[-1] = (skipped[-1][0], max(b, skipped[-1][1]))
        else:
            skipped.append((a, b))
    spent = _length(skipped) - _length(state.skipped)
    segments = state.segments
    if spent and not last.repeats:
        first = last.first_sample + last.samples
        more = _segment(segments, first, last.tokens, last.weights, last.sequence_length, last.batch, spent)
        segments += (dataclasses.replace(more, ramp=last.ramp),)
    return dataclasses.replace(state, segments=segments, skipped=tuple(skipped))


def carried(segments: Sequence[Segment], sample: int, sequence_length: int, digests: Iterable[str]) -> Drawn:
    """The counters with which a segment opens at `sample` after `segments`: "A change of L" above."""
    drawn: Drawn = {}
    if segments:
        drawn = segments[-1].drawn_before(sample)
        if segments[-1].sequence_length != sequence_length:
            drawn = {digest: (epoch + (used > 0), 0) for digest, (epoch, used) in drawn.items()}
    return {digest: drawn.get(digest, (0, 0)) for digest in sorted({*drawn, *digests})}


def _open_segments(
    state: OrderState, tokens: dict[str, int], weights: dict[str, float] | None, L: int, batch: int, wanted: int
) -> OrderState:
    at = state.next_sample
    skipped = tuple((a, b) for a, b in state.skipped if a < at)
    segments = tuple(s for s in state.segments if s.first_sample < at)
    samples = _end_of(wanted, skipped) - at
    segments += (_segment(segments, at, tokens, weights, L, batch, samples),)
    if weights is None and not segments[-1].repeats:
        segments += (_segment(segments, at + segments[-1].samples, tokens, None, L, batch),)
    return OrderState(state.seed, segments, skipped, at)


def _segment(
    before: Sequence[Segment],
    first: int,
    tokens: dict[str, int],
    weights: dict[str, float] | None,
    L: int,
    batch: int,
    samples: int = 0,
) -> Segment:
    segment = Segment(first, samples, L, batch, tokens, weights, carried(before, first, L, tokens))
    return segment if weights else dataclasses.replace(segment, samples=sum(segment.quotas()))


def _end_of(wanted: int, skipped: Iterable[tuple[int, int]]) -> int:
    """The sample number before which `wanted` unskipped samples lie."""
    end = wanted
    for start, stop in skipped:
        if start >= end:
            break
        end += stop - start
    return end


def _length(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def _shares(weights: dict[str, float] | None) -> dict[str, Fraction] | None:
    """Weights on one scale: 1 and 1 order data as 2 and 2 do."""
    if weights is None:
        return None
    return {d: Fraction(w) / sum(map(Fraction, weights.values())) for d, w in weights.items()}


def _check_members(members: Sequence[Member], sequence_length: int) -> None:
    if not members:
        raise SteelError("there is no data", "data.train", "name at least one prefix")
    seen: dict[str, str] = {}
    for m in members:
        if m.digest in seen:
            raise SteelError(
                f"the same data twice: {seen[m.digest]} and {m.prefix} have equal content",
                "data.train",
                "remove one; to see data more often, give it a larger weight",
            )
        seen[m.digest] = m.prefix
        if not blocks(m.tokens, sequence_length):
            longest = m.tokens // 2
            remedy = (
                f"data.sequence_length={longest} or less, or more data" if longest else "tokenize something into it"
            )
            raise SteelError(
                f"sequence longer than the data: {m.tokens} tokens, and sequences of {sequence_length} need at least "
                f"{2 * sequence_length}",
                m.prefix,
                remedy,
            )
    given = [m.weight for m in members if m.weight is not None]
    if len(given) not in (0, len(members)) or not all(0 < w < math.inf for w in given):
        weights = ", ".join(f"{m.prefix}: {m.weight}" for m in members)
        raise SteelError(f"weights that make no blend ({weights})", "data.train", "a number above 0 for each, or none")
