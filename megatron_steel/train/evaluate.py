"""Between two steps: text from the prompts and the loss over held-out samples, without gradients.

A stop that is asked for meanwhile ends it early, on all ranks alike. Knows nothing of how a step is made.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_steel import dist
from megatron_steel.train.engine import to_device
from megatron_steel.train.monitor import METRICS, SAMPLES, read_metrics

if TYPE_CHECKING:
    from megatron_steel.train.loop import Job


def evaluate(job: "Job", written: frozenset[str] = frozenset()) -> bool:
    """Text from the prompts, then the validation loss; not what has been `written` for this step before.

    False where a stop was asked for in between and the rest is left out: `fit` makes good for it at the resume.
    """
    if job.prompts and SAMPLES not in written:
        with job.clock.part("samples"):
            texts = job.prompts.write(job.engine, lambda: _goes_on(job))
        if texts is None:
            return False
        job.monitor.samples(job.step, job.tokens, job.prompts.texts, texts)
    return not job.validation or METRICS in written or validate(job) is not None


def validate(job: "Job") -> float | None:
    """Mean loss per token over the validation samples; logged under `validation_loss`, and where there are several
    data sets, of each alone under `validation_loss/NAME`.

    None when a stop was asked for in between: a long evaluation does not hold it up.
    """
    import torch

    engine, going_on = job.engine, True
    sums = torch.zeros(len(job.validation), 2, dtype=torch.float64, device=engine.device)
    engine.eval()
    with torch.no_grad(), job.clock.part("validation"):
        for of_set, batches in zip(sums, job.validation.values(), strict=True):
            for batch in batches() if going_on else ():
                of_set[0] += engine(**to_device(batch, engine.device))
                of_set[1] += (batch["labels"] != -100).sum()
                going_on = _goes_on(job)
                if not going_on:
                    break
    engine.train()
    if not going_on:
        return None
    torch.distributed.all_reduce(sums)
    total, tokens = sums.sum(dim=0).tolist()
    by_set = {f"validation_loss/{name}": float(s / n) for name, (s, n) in zip(job.validation, sums, strict=True)}
    row = {"tokens": job.tokens, "validation_loss": total / tokens, **(by_set if len(by_set) > 1 else {})}
    job.monitor.scalars(job.step, row)
    dist.log.info(
        "step %6d/%d | validation loss %.4f over %d tokens", job.step, job.run_steps, total / tokens, int(tokens)
    )
    return total / tokens


def written_at(folder: Path, step: int) -> frozenset[str]:
    """Which files of the run hold their part of the evaluation at `step`; the same on all ranks. A collective call."""

    def written(file: str, key: str) -> bool:
        return any(r["step"] == step and key in r for r in read_metrics(folder / file))

    found = {file for file, key in ((METRICS, "validation_loss"), (SAMPLES, "prompt"))
             if dist.is_main() and written(file, key)}  # fmt: skip
    return dist.gather(frozenset(found))[0]


def is_evaluated(folder: Path, step: int, validates: bool, writes: bool) -> bool:
    """Whether nothing is missing of the evaluation at `step` of a run with validation data, or with prompts."""
    wanted = {file for file, needed in ((METRICS, validates), (SAMPLES, writes)) if needed}
    return wanted <= written_at(folder, step)


def _goes_on(job: "Job") -> bool:
    """Leave a mark that something was done; False on all ranks when one was asked to stop. A collective call."""
    job.watch.progress(job.step)
    return not job.watch.agreed_stop()
