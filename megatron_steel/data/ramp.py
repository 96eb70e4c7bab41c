"""How many samples a step takes, where that grows during a run: a function of the samples trained before it.

A ramp is a tuple of pieces (until, batch): steps that begin before `until` trained samples take `batch` samples. `endless`
puts the piece behind it that has no end, which all counting needs. Samples that a run passes over are not trained, so a roll-back moves no piece. Knows no
data, ranks or micro-batches.
"""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

Ramp: TypeAlias = tuple[tuple[float, int], ...]


class Stage(NamedTuple):
    """Steps of `batch` samples until the run has trained so many tokens, or done so many steps: one of the two."""

    batch: int
    until_tokens: int | None = None
    until_steps: int | None = None


def plan_ramp(stages: Iterable[Stage], sequence_length: int) -> Ramp:
    """The pieces of a run of sequences of `sequence_length` tokens.

    A stage in tokens ends with the first step that reaches them. Raises ValueError for one that is over before it begins.
    """
    pieces = []
    steps = samples = 0
    for number, stage in enumerate(stages, start=1):
        if stage.until_steps is not None:
            more = stage.until_steps - steps
        else:
            more = math.ceil((math.ceil((stage.until_tokens or 0) / sequence_length) - samples) / stage.batch)
        if more < 1:
            raise ValueError(
                f"stage {number} is over before it begins, at step {steps} and {samples * sequence_length} tokens"
            )
        steps, samples = steps + more, samples + more * stage.batch
        pieces.append((samples, stage.batch))
    return tuple(pieces)


def endless(ramp: Ramp, batch: int) -> Ramp:
    """Once the ramp is over, steps take `batch` samples for ever."""
    return (*ramp, (math.inf, batch))


def ahead(ramp: Ramp, trained: int) -> Ramp:
    """The pieces that are not over when `trained` samples are done."""
    return tuple(piece for piece in ramp if piece[0] > trained)


def samples_of(ramp: Ramp, trained: int, steps: int) -> int:
    """Samples that the next `steps` steps take."""
    at, left = trained, steps
    for until, batch in ahead(ramp, trained):
        here = left if until == math.inf else min(left, max(0, math.ceil((until - at) / batch)))
        at, left = at + here * batch, left - here
    return at - trained


def steps_of(ramp: Ramp, trained: int, samples: int) -> tuple[int, int]:
    """(whole steps that `samples` more samples make, samples left over)."""
    steps, left = 0, samples
    for until, batch in ahead(ramp, trained):
        at = trained + samples - left
        here = left // batch if until == math.inf else min(left // batch, max(0, math.ceil((until - at) / batch)))
        steps, left = steps + here, left - here * batch
        if at + here * batch < until:
            break
    return steps, left


def joined(ramps: Iterable[tuple[int, Ramp]]) -> Ramp:
    """One ramp of several, each with the trained samples from which on it holds, in their order."""
    pieces: list[tuple[float, int]] = []
    for (_, ramp), (end, _) in itertools.pairwise([*ramps, (math.inf, ())]):
        pieces += [(min(until, end), batch) for until, batch in ramp if not pieces or pieces[-1][0] < min(until, end)]
    return tuple(pieces)
