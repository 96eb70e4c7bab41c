"""Read the state of an order back from JSON, believing nothing.

`OrderState.to_json` writes it. What comes back must have the right shape and must agree with itself: each segment
must open with exactly the counters that the one before leaves, so that an edited or damaged state is found here and
not as data seen twice. Knows nothing of files.
"""

import itertools
import math
from typing import Any

from megatron_steel.data.order import OrderState, Segment
from megatron_steel.data.segments import carried
from megatron_steel.errors import SteelError


def from_json(tree: Any, where: object) -> OrderState:
    """The state that `OrderState.to_json` wrote.

    Args:
        tree: plain values, as `json.load` gives them.
        where: named in the error, such as the checkpoint's folder.

    Raises:
        SteelError: a value is missing, has another type, or contradicts the others.
    """
    try:
        state = OrderState(
            seed=_whole(tree["seed"], least=None),
            segments=tuple(_segment(s) for s in tree["segments"]),
            skipped=tuple((_whole(start), _whole(stop)) for start, stop in tree["skipped"]),
            next_sample=_whole(tree["next_sample"]),
        )
        _agree(state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise SteelError(
            f"the data order is damaged: {type(error).__name__}: {error}",
            where,
            "resume from an older checkpoint; the order of data cannot be mended by hand",
        ) from None
    return state


def _segment(tree: Any) -> Segment:
    weights = tree["weights"]
    return Segment(
        first_sample=_whole(tree["first_sample"]),
        samples=_whole(tree["samples"], least=1),
        sequence_length=_whole(tree["sequence_length"], least=1),
        batch=_whole(tree["batch"], least=1),
        tokens={digest: _whole(tokens) for digest, tokens in tree["tokens"].items()},
        weights=None if weights is None else {digest: _weight(w) for digest, w in weights.items()},
        drawn={digest: (_whole(epoch), _whole(used)) for digest, (epoch, used) in tree["drawn"].items()},
        ramp=tuple((_whole(until, 1), _whole(batch, 1)) for until, batch in tree.get("ramp", [])),  # younger than runs
    )


def _agree(state: OrderState) -> None:
    """Raise ValueError at the first contradiction."""
    _require(bool(state.segments) and state.segments[0].first_sample == 0, "the first segment does not begin at 0")
    for number, segment in enumerate(state.segments):
        before, name = state.segments[:number], f"segment {number}"
        _require(list(segment.tokens) == sorted(segment.tokens) != [], f"{name}: data sets not in order")
        _require(all(segment.blocks(d) for d in segment.tokens), f"{name}: a data set without a block")
        _require(segment.weights is None or list(segment.weights) == list(segment.tokens), f"{name}: weights")
        if before:
            _require(before[-1].first_sample < segment.first_sample <= before[-1].end, f"{name}: first sample")
        expected = carried(before, segment.first_sample, segment.sequence_length, segment.tokens)
        _require(segment.drawn == expected, f"{name}: counters do not follow from what was drawn before")
        _require(segment.samples == sum(segment.quotas()), f"{name}: samples")
        _require(all(a < b for (a, _), (b, _) in itertools.pairwise(segment.ramp)), f"{name}: ramp")
    _require(state.next_sample <= state.segments[-1].end, "the next sample is beyond the planned end")
    bounds = list(itertools.chain.from_iterable(state.skipped))
    _require(all(a < b for a, b in itertools.pairwise(bounds)), "skipped ranges overlap or are not sorted")
    inside = any(a < state.next_sample < b for a, b in state.skipped)
    _require(not inside, "the next sample is a skipped one")


def _whole(value: Any, least: int | None = 0) -> int:
    if type(value) is not int or (least is not None and value < least):
        raise ValueError(f"{value!r} is not a whole number" + ("" if least is None else f" of at least {least}"))
    return value


def _weight(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"weight {value!r}")
    return float(value)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
