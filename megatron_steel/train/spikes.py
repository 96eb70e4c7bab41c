"""Loss spikes: when is a loss one, which steps' samples are passed over, and where the run goes back to.

1. `Spikes.seen` scores each step's loss (a mean over all ranks, so every rank judges alike) by
   (loss - median) / (1.4826 MAD) over the last 128 losses that were no spike: the robust z-score of Iglewicz and Hoaglin
   (1993); the window is OLMo-core's for its SkipStep optimizers. Below 32 losses nothing is judged. Three scores in a row above
   `train.spike_score` are a spike, and so is one above ten times it; less is a hard batch, and the run has got over it.
2. While a loss is suspect, no checkpoint is due; so none is taken during a spike, but for a stop on request.
3. PaLM (arXiv 2204.02311, section 5.1) went back about 100 steps and passed over 200 to 500 batches. Here a replay is
   bitwise the same up to the window, so the window is small: of a spike over steps k to m the batches of k - 1 (its
   update may be the cause) to m. Where the loss rises again within 100 steps of there, more: k - 4 to m + 3, then
   k - 16 to m + 15; a fourth time ends the run.
4. The run goes back to the newest whole checkpoint from before that window; the samples are spent (data/segments.py).
   Where there is none, the run goes on with a warning.

What was seen and passed over is part of every checkpoint, so a resumed run judges as the uninterrupted one; a run killed
between going back and its next save does the same again. Losses before a change of data, batch or length are not compared
with those after it, and no roll-back goes behind one. Knows nothing of engines and of how data is read.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.checkpoint import commit
from megatron_steel.data.order import OrderState
from megatron_steel.data.segments import skip
from megatron_steel.errors import SteelError, TrainingError

WINDOW, LEAST, CONFIRM, AT_ONCE, SAME_PLACE = 128, 32, 3, 10, 100
MARGINS = (1, 4, 16)  # batches before the spike that go too (and one less after it), by how often it has spiked here
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_FLOOR = 1e-3  # of the median: losses that hardly differ must not make every wobble a spike


@dataclass
class Spikes:
    """The losses of a run as far as a judgement needs them.

    Args:
        score: above it a loss is suspect.
        since: the step after which losses can be compared.
    """

    score: float
    since: int = 0
    losses: list[float] = field(default_factory=list)
    suspects: list[int] = field(default_factory=list)
    """Steps in a row with a suspect loss, up to the newest."""
    rollbacks: list[dict[str, int]] = field(default_factory=list)
    """What was done: `step` (the spike's first), `attempt` (1, 2 or 3), and the samples [`start`, `stop`) passed over."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `Spikes(score, **tree)` takes them back."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "score"}

    def seen(self, step: int, loss: float) -> bool:
        """Take in a step's mean loss. True when it confirms a spike. A loss that is no number says nothing."""
        if not math.isfinite(loss):
            return False
        z = self._z(loss) if len(self.losses) >= LEAST else 0.0
        if z > self.score:
            self.suspects.append(step)
            return z > AT_ONCE * self.score or len(self.suspects) >= CONFIRM
        self.suspects.clear()
        self.losses = [*self.losses, loss][-WINDOW:]
        return False

    def attempt(self) -> int:
        """Which roll-back at this place the confirmed spike asks for. Raises TrainingError beyond the third."""
        first = self.suspects[0]
        last = self.rollbacks[-1] if self.rollbacks else None
        number = last["attempt"] + 1 if last and abs(first - last["step"]) <= SAME_PLACE else 1
        if number > len(MARGINS):
            raise dist.shared(TrainingError(
                f"the loss has risen again after {len(MARGINS)} roll-backs", f"step {first}",
                "lower optim.lr, or look at the data of these steps (metrics.jsonl names the samples passed over)",
            ))  # fmt: skip
        return number

    def back_to(self, step: int, seen: dict[str, Any] | None, done: dict[str, int]) -> None:
        """Know what was known at `step` (the checkpoint's `to_json`), and what has been done about the spike."""
        if seen is None or step <= self.since:  # what it saw before that cannot be compared with what comes now
            seen = {"since": max(step, self.since)}
        self.losses, self.suspects = list(seen.get("losses", [])), list(seen.get("suspects", []))
        self.since = seen.get("since", step)
        self.rollbacks.append(done)

    def forget(self, step: int) -> None:
        """Compare only what comes after `step`: there was nothing to go back to."""
        self.losses, self.suspects, self.since = [], [], step

    def _z(self, loss: float) -> float:
        median = statistics.median(self.losses)
        deviation = _MAD_TO_DEVIATION * statistics.median([abs(x - median) for x in self.losses])
        return (loss - median) / max(deviation, _FLOOR * abs(median))


@dataclass(frozen=True)
class RollBack:
    """Where to go back to, with which order of data, and what to remember."""

    checkpoint: commit.Checkpoint
    order: OrderState
    done: dict[str, int]


def plan_roll_back(
    spikes: Spikes, folder: Path, order: OrderState, read: Callable[[commit.Checkpoint], OrderState]
) -> RollBack | None:
    """What to do about a confirmed spike, the same on every rank; None when no checkpoint is old enough.

    Args:
        folder: the run's `checkpoints/`.
        order: of the run as it stands, with all it has passed over so far.
        read: the order that a checkpoint holds.
    Raises:
        TrainingError: it has spiked here too often.
    """
    attempt, step = spikes.attempt(), spikes.suspects[0]
    first, last = step - MARGINS[attempt - 1], spikes.suspects[-1] + MARGINS[attempt - 1] - 1
    found = dist.together(lambda: _newest_whole(folder, spikes.since, first), only=dist.is_main())
    checkpoint = dist.gather(found)[0]
    if checkpoint is None:
        return None
    at = dataclasses.replace(order, next_sample=read(checkpoint).next_sample)
    before = at.after_steps(first - 1 - checkpoint.step)
    after = before.after_steps(last - first + 1)
    start, stop = before.next_sample, int(min(after.next_sample, order.segments[-1].end))
    done = {"step": step, "attempt": attempt, "start": start, "stop": stop}
    return RollBack(checkpoint, skip(at, start, stop), done)


def _newest_whole(folder: Path, since: int, before: int) -> commit.Checkpoint | None:
    """The newest checkpoint of a step in [since, before) that verifies."""
    for path in reversed(commit.published(folder)):
        try:
            if since <= commit.read_manifest(path).step < before:
                return commit.verify(path)
        except SteelError as error:
            dist.log.warning("passed over a checkpoint: %s", error)
    return None
