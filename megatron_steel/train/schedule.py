"""The learning rate as a pure function of where a run stands, so that a schedule has no state to save.

Where a run stands is counted in steps, or in tokens where the warm-up is given in tokens (then a batch that grows does
not stretch it). Knows nothing of optimizers.
"""

import math

from megatron_steel.recipe import Schedule


def learning_rate(
    schedule: Schedule, peak: float, step: int, steps: int, tokens: int = 0, total_tokens: int = 0
) -> float:
    """Learning rate of optimizer step `step` (1-based) of `steps`; it is 0 < lr <= `peak`, or 0 at a floor of 0.

    Args:
        tokens: trained on with this step; `total_tokens`: with the last. Asked for only with `schedule.warmup_tokens`.

    Linear warm-up from `initial_lr_ratio * peak` to the peak, then
    - `constant`: the peak;
    - `linear`, `cosine` (arXiv 1608.03983): down to `min_lr_ratio * peak`, reached at `horizon_ratio` times the run's length;
    - `wsd` (MiniCPM, arXiv 2404.06395, section 4): the peak, and over the last `decay_ratio` of the run down to the floor,
      as `decay_shape` says: `linear`; `sqrt`, which is 1 - sqrt(x) (arXiv 2405.18392, section 3); `exponential`, floor^x.
      MiniCPM's 0.5^((s - S) / T) over a decay of D steps is the last with a `min_lr_ratio` of 0.5^(D / T);
    - `one_cycle` (arXiv 1708.07120, as `torch.optim.lr_scheduler.OneCycleLR` does it): up and down by half a cosine each.
      OneCycleLR's pct_start is `warmup_ratio`, 1 / div_factor is `initial_lr_ratio`, and
      1 / (div_factor * final_div_factor) is `min_lr_ratio`.

    All of it counts from the first end of `schedule.span` to its second, where there is one; before it the warm-up has
    not begun, behind it the rate stays as it ended.
    """
    in_tokens = schedule.warmup_tokens is not None
    begin, until = schedule.span or (0, total_tokens if in_tokens else steps)
    at, end = float((tokens if in_tokens else step) - begin), float(until - begin)
    if schedule.span:
        at = min(max(0.0, at), end)
    if schedule.warmup_tokens is not None:
        warmup = float(schedule.warmup_tokens)
    else:
        warmup = schedule.warmup_steps if schedule.warmup_ratio is None else schedule.warmup_ratio * end
    first, floor = schedule.initial_lr_ratio, schedule.min_lr_ratio
    if schedule.name == "one_cycle":
        if at <= warmup:
            return peak * _between(first, 1.0, (at - 1) / max(1.0, warmup - 1))
        return peak * _between(1.0, floor, (at - warmup) / (end - warmup))
    if at < warmup:
        return peak * (first + (1 - first) * at / warmup)
    if schedule.name == "constant":
        return peak
    if schedule.name == "wsd":
        return peak * _wsd_share(schedule, at, end)
    progress = min(1.0, (at - warmup) / max(1.0, schedule.horizon_ratio * end - warmup))
    return peak * (_between(1.0, floor, progress) if schedule.name == "cosine" else 1 - (1 - floor) * progress)


def warmup_is_cut(schedule: Schedule, steps: int) -> bool:
    """Whether a run of `steps` ends, or a `wsd` decays, before its warm-up in steps has reached the peak."""
    begin, until = schedule.span or (0, steps)
    if schedule.warmup_tokens is not None or schedule.warmup_ratio is not None:
        return False
    flat_until = (1 - schedule.decay_ratio if schedule.name == "wsd" else 1.0) * (until - begin)
    return schedule.warmup_steps > flat_until


def _wsd_share(schedule: Schedule, at: float, end: float) -> float:
    span = max(1, round(schedule.decay_ratio * end))
    progress = min(1.0, max(0.0, (at - (end - span)) / span))
    floor = schedule.min_lr_ratio
    if schedule.decay_shape == "exponential":
        return floor**progress
    return floor + (1 - floor) * (1 - (math.sqrt(progress) if schedule.decay_shape == "sqrt" else progress))


def _between(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
