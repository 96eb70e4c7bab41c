"""Which values of a recipe cannot be, each said in one line with its key.

Shapes and unknown keys are pydantic's to find (recipe.py). Knows nothing of models or data.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_steel.recipe import Prefix, Recipe, Stage


def problems_of(recipe: "Recipe") -> list[str]:
    """One line for each; none where all can be."""
    t, o, s, d = recipe.train, recipe.optim, recipe.schedule, recipe.data
    positive = {
        "data.sequence_length": d.sequence_length, "optim.lr": o.lr, "optim.eps": o.eps,
        "train.global_batch_size": t.global_batch_size, "train.micro_batch_size": t.micro_batch_size,
        "train.steps": t.steps, "train.tokens": t.tokens, "train.epochs": t.epochs,
        "train.log_every_steps": t.log_every_steps, "train.eval_every_steps": t.eval_every_steps,
        "train.eval_samples": t.eval_samples, "train.sample_tokens": t.sample_tokens,
        "train.save_every_steps": t.save_every_steps,
        "train.keep_last": t.keep_last, "train.keep_every_steps": t.keep_every_steps,
        "train.stop_after_minutes": t.stop_after_minutes, "train.spike_score": t.spike_score,
        "optim.muon_lr": o.muon_lr, **{f"optim.lr_ratio.{k}": v for k, v in o.lr_ratio.items()},
        **{f"model.init_std.{k}": v for k, v in recipe.model.init_std.items()},
        "train.hang_after_seconds": t.hang_after_seconds, "schedule.horizon_ratio": s.horizon_ratio,
    }  # fmt: skip
    problems = [
        f"{key}: {value} must be above 0 and finite"
        for key, value in positive.items()
        if value is not None and not 0 < value < math.inf
    ]
    shares = {"schedule.decay_ratio": s.decay_ratio, "schedule.min_lr_ratio": s.min_lr_ratio,
              "schedule.initial_lr_ratio": s.initial_lr_ratio, "schedule.warmup_ratio": s.warmup_ratio or 0.0}  # fmt: skip
    problems += [f"{key}: {value} is not between 0 and 1" for key, value in shares.items() if not 0 <= value <= 1]
    not_below = {"train.z_loss": t.z_loss, "optim.weight_decay": o.weight_decay, "optim.clip_grad_norm": o.clip_grad_norm,
                 "schedule.warmup_steps": s.warmup_steps, "schedule.warmup_tokens": s.warmup_tokens or 0}  # fmt: skip
    problems += [f"{key}: {value} must not be below 0" for key, value in not_below.items() if not 0 <= value < math.inf]
    if not 0 <= o.muon_momentum < 1:
        problems.append(f"optim.muon_momentum: {o.muon_momentum} is not in [0, 1)")
    if o.muon_lr is not None and o.name != "muon":
        problems.append(f"optim.muon_lr: optim.name is {o.name}, not muon")
    if recipe.model.init_std and recipe.model.init_from:
        problems.append("model.init_std: the weights come from model.init_from and are not drawn")
    if s.name == "wsd" and s.decay_shape == "exponential" and not s.min_lr_ratio:
        problems.append("schedule.min_lr_ratio: an exponential decay never comes to 0: set where it ends")
    if s.name == "one_cycle" and s.warmup_tokens is not None:
        problems.append("schedule.warmup_tokens: one_cycle is counted in steps: use schedule.warmup_ratio")
    if not all(0 <= beta < 1 for beta in o.betas):
        problems.append(f"optim.betas: {list(o.betas)} are not both in [0, 1)")
    for i, stage in enumerate(t.batch_ramp):
        ends = [end for end in (stage.until_tokens, stage.until_steps) if end is not None]
        if stage.global_batch_size < 1 or len(ends) != 1 or ends[0] < 1:
            what = "needs a global_batch_size and either until_tokens or until_steps, all above 0"
            problems.append(f"train.batch_ramp.{i}: {what}")
    if t.keep_every_steps and t.keep_every_steps % t.save_every_steps:
        what = f"{t.keep_every_steps} is no multiple of train.save_every_steps ({t.save_every_steps})"
        problems.append(f"train.keep_every_steps: {what}")
    for key, prefixes in (("data.train", d.train), ("data.validation", d.validation)):
        if isinstance(prefixes, list):
            problems += _weights_problems(key, prefixes)
    if s.span is not None and not 0 <= s.span[0] < s.span[1]:
        problems.append(f"schedule.span: {list(s.span)} is no [after, until]")
    return problems + _stages_problems(recipe)


def _weights_problems(key: str, prefixes: "list[Prefix]") -> list[str]:
    if not prefixes:
        return [f"{key}: the list is empty"]
    weights = [p.weight for p in prefixes if p.weight is not None]
    if weights and len(weights) != len(prefixes):
        return [f"{key}: give every prefix a weight, or none"]
    return [f"{key}: weight {w} must be above 0" for w in weights if not w > 0]


def _stages_problems(recipe: "Recipe") -> list[str]:
    """Of the stages' own fields; what they make of the recipe is judged stage by stage (stages.py)."""
    stages, problems = recipe.stages, []
    if not stages:
        return []
    if recipe.train.epochs is not None:
        problems.append("train.epochs: with stages the run's length is train.steps or train.tokens")
    if recipe.schedule.span or any(s.schedule and s.schedule.span for s in stages):
        problems.append("schedule.span: the stages decide it")
    names = [s.name for s in stages]
    problems += [f"stages: the name {name!r} comes twice" for name in sorted({n for n in names if names.count(n) > 1})]
    rests = [s.name for s in stages if not _lengths(s)]
    if len(rests) != 1:
        which = f"these have none: {', '.join(rests)}" if rests else "here all have one"
        problems.append(f"stages: exactly one has no steps, tokens or ratio and takes the rest of the run; {which}")
    for i, stage in enumerate(stages):
        given = _lengths(stage)
        if len(given) > 1:
            problems.append(f"stages.{i}: {', '.join(given)} set: give one of them")
        problems += [
            f"stages.{i}.{key}: {n} must be above 0 and finite" for key, n in given.items() if not 0 < n < math.inf
        ]
        if stage.ratio is not None and stage.ratio >= 1:
            problems.append(f"stages.{i}.ratio: {stage.ratio} is not below 1")
    return problems


def _lengths(stage: "Stage") -> dict[str, float]:
    given = {"steps": stage.steps, "tokens": stage.tokens, "ratio": stage.ratio}
    return {key: value for key, value in given.items() if value is not None}
