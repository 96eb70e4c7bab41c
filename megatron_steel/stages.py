"""A recipe with stages as a sequence of plain recipes, each up to its stage's last step.

1. What a stage says (data, sequence length, batch, schedule, peak rate) replaces the recipe's from there on, as if somebody
   had changed it at a checkpoint: the next stage's recipe has it too.
2. Lengths become steps by arithmetic alone (batch, sequence length, batch ramp), so that every start finds the same
   boundaries, whatever checkpoint it goes on from. The stage without a length takes what the others leave.
3. A schedule counts over the stages from the one that gives it to the next that gives one (`schedule.span`).

Training a stage is training its plain recipe from the newest checkpoint on: the order of data opens a new segment there
(data/segments.py). Knows nothing of engines, checkpoints or files.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_steel.data.ramp import samples_of, steps_of
from megatron_steel.errors import SteelError
from megatron_steel.preflight import batch_ramp
from megatron_steel.recipe import Recipe, Stage
from megatron_steel.recipe_checks import problems_of


@dataclass(frozen=True)
class Part:
    """One stage of a run, or the whole of a run that has none."""

    recipe: Recipe
    """Without stages; `train.steps` is the run's step with which the stage ends (as it was where there are none)."""
    number: int = 0
    """From 1; 0: the run has no stages."""
    name: str = ""
    first_step: int = 0
    """Steps of the run before it."""
    first_tokens: int = 0
    steps: int = 0
    tokens: int = 0
    """Its own length; 0 where there are no stages."""


def parts_of(recipe: Recipe) -> list[Part]:
    """The run's stages in order; of a recipe without stages the recipe itself.

    Raises SteelError: a stage makes an impossible recipe, nothing is left for the stage without a length, or the batch
    ramp is not over when the first stage ends.
    """
    if not recipe.stages:
        return [Part(recipe)]
    merged = _merged(recipe)
    steps = _steps(recipe, merged)
    parts: list[Part] = []
    at = tokens = 0
    for number, (stage, one, n) in enumerate(zip(recipe.stages, merged, steps, strict=True), start=1):
        own = tokens_of_steps(one, n)
        ends = dataclasses.replace(one, train=dataclasses.replace(one.train, steps=at + n, tokens=None))
        parts.append(Part(ends, number, stage.name, at, tokens, n, own))
        at, tokens = at + n, tokens + own
    _refuse_long_ramp(recipe, parts[0])
    return _with_spans(parts, [i for i, stage in enumerate(recipe.stages) if stage.schedule or i == 0])


def to_come(parts: Sequence[Part], step: int) -> list[Part]:
    """Those that are not over when `step` steps are done; the last one in any case."""
    return [p for p in parts[:-1] if step < p.first_step + p.steps] + [parts[-1]]


def refuse_tokens(recipe: Recipe) -> None:
    """For data of pairs, whose labels nobody has counted. Raises SteelError where a length of a stage is one in tokens."""
    in_tokens = [stage.name for stage in recipe.stages if stage.tokens is not None]
    if recipe.stages and (in_tokens or recipe.train.tokens is not None):
        where = f"stages: {in_tokens[0]}" if in_tokens else "train.tokens"
        raise SteelError("pairs of a prompt and a response cannot be counted in tokens", where, "count in steps")


def described(part: Part) -> str:
    """One line: which steps, how long, on what."""
    data, train = part.recipe.data, part.recipe.train
    names = [data.train] if isinstance(data.train, str) else [p.prefix for p in data.train]
    return (
        f"stage {part.number} ({part.name}): steps {part.first_step + 1:,} to {part.first_step + part.steps:,}, "
        f"{part.tokens:,} tokens in batches of {train.global_batch_size} x {data.sequence_length} of {', '.join(names)}, "
        f"{part.recipe.schedule.name} from {part.recipe.optim.lr:g}"
    )


def facts_of(part: Part, parts: Sequence[Part]) -> dict[str, Any]:
    """What a checkpoint says of its stage, and of all of the run's; nothing for a run without stages."""
    told = ("name", "first_step", "steps", "tokens")
    every = [{key: getattr(each, key) for key in told} for each in parts]
    return {"stage": part.number, "stages": every} if part.number else {}


def _merged(recipe: Recipe) -> list[Recipe]:
    """The recipe of each stage but for its length and the span of its schedule."""
    found: list[Recipe] = []
    now = dataclasses.replace(recipe, stages=[])
    for stage in recipe.stages:
        lr = stage.optim.lr
        optim = now.optim
        if lr is not None:
            muon = optim.muon_lr and optim.muon_lr * (lr / optim.lr)
            optim = dataclasses.replace(optim, lr=lr, muon_lr=muon)
        train = dataclasses.replace(
            now.train, **_said(stage.train), batch_ramp=now.train.batch_ramp if not found else []
        )
        data = dataclasses.replace(now.data, **_said(stage.data))
        now = dataclasses.replace(now, data=data, schedule=stage.schedule or now.schedule, optim=optim, train=train)
        problems = problems_of(now)
        if problems:
            raise SteelError(
                "\n    - ".join(["the stage makes no recipe:", *problems]), f"stages: {stage.name}", "mend these keys"
            )
        found.append(now)
    return found


def _said(section: object) -> dict[str, Any]:
    return {name: value for name, value in vars(section).items() if value is not None}


def _steps(recipe: Recipe, merged: list[Recipe]) -> list[int]:
    """Steps of each stage."""
    given = [_given(recipe, stage, one) for stage, one in zip(recipe.stages, merged, strict=True)]
    rest = next(i for i, steps in enumerate(given) if steps is None)
    others = [(one, steps) for one, steps in zip(merged, given, strict=True) if steps is not None]
    train = recipe.train
    if train.steps is not None:
        left = train.steps - sum(steps for _, steps in others)
    else:
        left = steps_of_tokens(
            merged[rest], (train.tokens or 0) - sum(tokens_of_steps(one, steps) for one, steps in others)
        )
    if left < 1:
        total = f"train.steps={train.steps}" if train.steps is not None else f"train.tokens={train.tokens}"
        what = f"the other stages leave nothing of {total} for {recipe.stages[rest].name!r}"
        raise SteelError(what, "stages", "lengthen the run, shorten them, or train without stages: stages=[]")
    return [left if steps is None else steps for steps in given]


def _given(recipe: Recipe, stage: Stage, merged: Recipe) -> int | None:
    """The stage's length in steps; None for the one that takes the rest."""
    tokens = stage.tokens
    if stage.ratio is not None:
        if recipe.train.steps is not None:
            return max(1, round(stage.ratio * recipe.train.steps))
        tokens = math.ceil(stage.ratio * (recipe.train.tokens or 0))
    return stage.steps if tokens is None else steps_of_tokens(merged, tokens)


def steps_of_tokens(recipe: Recipe, tokens: int) -> int:
    """Steps from the first of a run, or of a stage, that reach so many tokens; the last one may go beyond."""
    whole, rest = steps_of(batch_ramp(recipe), 0, max(0, math.ceil(tokens / recipe.data.sequence_length)))
    return whole + (rest > 0)


def tokens_of_steps(recipe: Recipe, steps: int) -> int:
    return samples_of(batch_ramp(recipe), 0, steps) * recipe.data.sequence_length


def _refuse_long_ramp(recipe: Recipe, first: Part) -> None:
    pieces = batch_ramp(first.recipe)[:-1]
    if pieces and pieces[-1][0] * recipe.data.sequence_length > first.tokens:
        what = f"the batch ramp is not over when the first stage ends (step {first.steps:,})"
        raise SteelError(what, "train.batch_ramp, stages", "end the ramp earlier, or lengthen the first stage")


def _with_spans(parts: list[Part], begins: list[int]) -> list[Part]:
    """With the span of each schedule: from the part that gives it (`begins`) to the next that gives one."""
    spanned = []
    for i, part in enumerate(parts):
        first = parts[max(b for b in begins if b <= i)]
        last = parts[min((b for b in begins if b > i), default=len(parts)) - 1]
        steps = first.first_step, last.first_step + last.steps
        tokens = first.first_tokens, last.first_tokens + last.tokens
        span = steps if part.recipe.schedule.warmup_tokens is None else tokens
        schedule = dataclasses.replace(part.recipe.schedule, span=span)
        spanned.append(dataclasses.replace(part, recipe=dataclasses.replace(part.recipe, schedule=schedule)))
    return spanned
