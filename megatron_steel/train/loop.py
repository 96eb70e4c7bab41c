"""Pretrain and validate, top to bottom.

1. `fit` walks the steps: fetch the global batch, `train_step`, log, validate, save, ask for a stop; where the loss
   spikes, it goes back.
2. `train_step` sums token losses over micro-batches and ranks and divides by the tokens of the whole batch, so
   that the loss is a mean over tokens and not a mean of means. A loss that is no number, on any rank, changes nothing.
   The ranks talk once a step, when the optimizer's work is on its way to the device; the loss is fetched only where it
   is logged or watched.
3. Between steps `evaluate` (train/evaluate.py) lets the model write and takes its loss over held-out samples.

Knows nothing of how data is ordered, how a model is built or how a checkpoint is committed.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_steel import dist
from megatron_steel.data.loader import counted
from megatron_steel.errors import Stopped, TrainingError
from megatron_steel.recipe import Recipe
from megatron_steel.train.engine import apply_step, set_accumulation, to_device
from megatron_steel.train.evaluate import evaluate, written_at
from megatron_steel.train.garbage import Garbage
from megatron_steel.train.health import Health, by_layer, extremes
from megatron_steel.train.monitor import Monitor, progress_line
from megatron_steel.train.samples import Prompts
from megatron_steel.train.schedule import learning_rate
from megatron_steel.train.spikes import Spikes
from megatron_steel.train.watch import Watch

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

Batch = dict[str, "torch.Tensor"]


@dataclass
class Job:
    """Everything the loop is handed; `pretrain` builds it.

    `next_batches()` gives this rank's micro-batches of the next step, `labels_ahead()` how many labels count in them (0: not
    known beforehand); `validation[name]()` yields its micro-batches of a held-out data set, equally many on every rank.
    `save(step, tokens, must)` commits a checkpoint; without `must` it may
    fail, returns False and leaves it to the next. `roll_back()` goes back to before the spike that `spikes` has confirmed and returns
    (step, tokens) there, or None where it cannot.
    """

    engine: "DeepSpeedEngine"
    recipe: Recipe
    monitor: Monitor
    watch: Watch
    next_batches: Callable[[], list[Batch]]
    validation: dict[str, Callable[[], Iterator[Batch]]]
    prompts: Prompts | None
    save: Callable[[int, int, bool], bool]
    position: Callable[[], dict[str, float]]
    out_of_memory: Callable[[], str]
    steps: int
    total_tokens: int
    step: int = 0
    tokens: int = 0
    labels_ahead: Callable[[], int] = lambda: 0
    run_steps: int = 0
    """Of the whole run, of which `steps` may end a stage."""
    tokens_ahead: int = 0
    """Of the next global batch, as the ranks have told each other; 0: they must still."""
    flops_per_token: float = 0.0
    peak_flops: float | None = None
    spikes: Spikes | None = None
    roll_back: Callable[[], tuple[int, int] | None] = lambda: None
    clock: "Clock" = field(default_factory=lambda: Clock())
    health: Health = field(init=False)

    def __post_init__(self) -> None:
        self.run_steps = self.run_steps or self.steps
        self.health = Health(self.engine.module, self.engine.device)


@dataclass(frozen=True)
class StepResult:
    """Of one global batch.

    `loss` is the mean per token, None where nobody asked for it; `loss_sum` this rank's part of its sum, still on the
    device. `grad_norm` is there where DeepSpeed does not keep it. `stop`: a rank wants to stop.
    """

    loss: float | None
    loss_sum: "torch.Tensor"
    tokens: int
    lr: float
    grad_norm: float | None
    stop: bool


class Clock:
    """Seconds per part of a step, summed since the last `take`."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - begin

    def take(self, steps: int) -> dict[str, float]:
        """Mean seconds per step of each part and of the whole, and start over."""
        now = time.perf_counter()
        means = {f"seconds_{name}": total / steps for name, total in self._parts.items()}
        means["seconds_step"] = (now - self._since) / steps
        self._parts, self._since = {}, now
        return means


def fit(job: Job) -> None:
    """Train from `job.step` to `job.steps`. Raises Stopped after the save that a stop request asked for."""
    train = job.recipe.train
    logged_at, save_due = (job.step, job.tokens), False
    job.clock.take(1)
    if job.step and (job.step % train.eval_every_steps == 0 or job.step == job.steps):
        whole = evaluate(job, written_at(job.monitor.folder, job.step))
        if not whole and job.step == job.steps:
            raise stopped(job)
    with Garbage() as garbage:
        while job.step < job.steps:
            job.step += 1
            done = train_step(job)
            job.tokens += done.tokens
            job.watch.progress(job.step)
            if job.spikes and done.loss is not None and job.spikes.seen(job.step, done.loss):
                there = job.roll_back()
                if there:
                    job.step, job.tokens = there
                    logged_at, job.tokens_ahead = there, 0  # what was read ahead is dropped
                    job.clock.take(1)
                    continue
            last, stop = job.step == job.steps, done.stop
            if is_logged(job):
                log_step(job, done, job.step - logged_at[0], job.tokens - logged_at[1])
                logged_at = job.step, job.tokens
            whole, evaluated = (
                True,
                bool(job.validation or job.prompts) and (job.step % train.eval_every_steps == 0 or last),
            )
            if evaluated:
                whole = evaluate(job)
                stop = job.watch.agreed_stop()  # asked for meanwhile, too
            save_due = save_due or job.step % train.save_every_steps == 0
            saved = False
            if stop or last or (save_due and not (job.spikes and job.spikes.suspects)):
                save_due = False
                with job.clock.part("save"):
                    saved = job.save(job.step, job.tokens, bool(stop or last))
                stop = stop or (saved and job.watch.agreed_stop())  # leave without another step
            if stop and not (last and whole):
                raise stopped(job)
            garbage.after_step(evaluated or saved)


def stopped(job: Job) -> Stopped:
    """What a run ends with that was asked to stop. A collective call."""
    reason = next(r for r in dist.gather(job.watch.stop_wanted()) if r)
    rest = "" if job.step < job.run_steps else ", before its last evaluation was over: that is made at the next start"
    return Stopped(f"stopped at step {job.step} of {job.run_steps} on request ({reason}){rest}")


def train_step(job: Job) -> StepResult:
    """One optimizer step over this rank's micro-batches of the next global batch."""
    import torch

    engine, recipe = job.engine, job.recipe
    with job.clock.part("data"):
        micro_batches = job.next_batches()
    set_accumulation(engine, len(micro_batches))
    tokens = job.tokens_ahead or int(dist.sum_over_ranks([counted(micro_batches)])[0])
    # Dropout is the same after a resume; the generator takes 63 bits.
    torch.manual_seed(((recipe.run.seed * 1_000_003 + job.step) * 8191 + dist.rank()) % 2**63)
    seen = job.tokens + tokens
    lr = learning_rate(recipe.schedule, recipe.optim.lr, job.step, job.steps, seen, job.total_tokens)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    # DeepSpeed divides by ranks and micro-batches; multiplying first leaves sum / tokens.
    scale = dist.world_size() * len(micro_batches) / max(1, tokens)
    norm, fetched = None, None
    try:
        for number, batch in enumerate(micro_batches, start=1):
            engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            with job.clock.part("forward"), job.health.watching(is_logged(job)):
                loss = engine(**to_device(batch, engine.device))
            loss_sum += loss.detach()
            with job.clock.part("backward"):
                # Plus 0, or plus NaN where the loss is no number: then so is every gradient, and none is applied.
                engine.backward(loss * (scale + 0.0 * loss.detach()))
                if is_logged(job) and engine.is_gradient_accumulation_boundary():
                    job.health.read_gradients()
            if number == len(micro_batches) and (job.spikes or is_logged(job)):
                fetched = on_its_way(loss_sum)
            with job.clock.part("optimizer"):
                norm = apply_step(engine, recipe.optim.clip_grad_norm)
        mine = fetched() if fetched else math.nan
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"out of memory in step {job.step}: {str(error).splitlines()[0]}",
                            f"train.micro_batch_size={recipe.train.micro_batch_size}", job.out_of_memory()) from error  # fmt: skip
    total, stop = tell_each_other(job, mine, engine.was_step_applied() and (norm is None or math.isfinite(norm)))
    return StepResult(total / max(1, tokens) if fetched else None, loss_sum, tokens, lr, norm, stop)


def tell_each_other(job: Job, loss_sum: float, applied: bool) -> tuple[float, bool]:
    """The one exchange of a step: (the sum of the ranks' losses, whether one of them wants to stop).

    It also counts the tokens of the next step, and asks whether all have applied this one. A collective call.
    """
    with job.clock.part("data"):
        ahead = job.labels_ahead()
    mine = [loss_sum, float(applied), float(job.watch.stop_wanted() is not None), float(ahead)]
    total, applied_on, stop, tokens_ahead = dist.sum_over_ranks(mine)
    if 0 < applied_on < dist.world_size():  # the norm that decides it is the same number everywhere
        what = f"{int(applied_on)} of {dist.world_size()} ranks have applied the step, the others have left it out"
        raise dist.shared(TrainingError(what, f"step {job.step}", "start again: one of the machines may be faulty"))
    job.watch.step_done(job.step, applied)
    job.tokens_ahead = int(tokens_ahead)
    return total, stop > 0


def on_its_way(number: "torch.Tensor") -> Callable[[], float]:
    """Start to copy a number to the host. What is returned waits for it alone, not for what the device is given next."""
    import torch

    host = number.to("cpu", non_blocking=True)
    if number.device.type != "cuda":
        return lambda: float(host)
    event = torch.cuda.Event()
    event.record()

    def arrived() -> float:
        event.synchronize()
        return float(host)

    return arrived


def log_step(job: Job, done: StepResult, steps: int, tokens: int) -> None:
    """Send out the numbers of the last step, and the mean times of the last `steps` steps, which took `tokens`."""
    import torch

    if job.engine.device.type == "cuda":
        torch.cuda.synchronize()  # only here: the parts are host times, their sum is true at the logging step
    parts = job.clock.take(steps)
    aside = sum(parts.get(f"seconds_{name}", 0.0) for name in ("validation", "samples", "save"))
    seconds_training = parts["seconds_step"] - aside
    tokens_per_second = tokens / steps / seconds_training
    norm = done.grad_norm if done.grad_norm is not None else float(job.engine.get_global_grad_norm())
    health = job.health.take()
    row = {
        "tokens": job.tokens,
        "loss": done.loss,
        "lr": done.lr,
        "grad_norm": norm,
        "tokens_per_second": tokens_per_second,
        **parts,
        **job.position(),
        "memory_gib": memory_gib(job.engine.device),
        "skipped_steps": job.watch.skipped_steps,
        **extremes(health),
    }
    if job.engine.fp16_enabled():
        row["loss_scale"] = float(job.engine.optimizer.cur_scale)
    if job.peak_flops:
        row["share_of_peak"] = tokens_per_second * job.flops_per_token / (job.peak_flops * dist.world_size())
    job.monitor.scalars(job.step, row, by_layer(health))
    dist.log.info("%s", progress_line(job.step, job.run_steps, row, (job.run_steps - job.step) * seconds_training))


def is_logged(job: Job) -> bool:
    return job.step % job.recipe.train.log_every_steps == 0 or job.step == job.steps


def memory_gib(device: "torch.device") -> float:
    """Peak memory of this rank since its start: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
