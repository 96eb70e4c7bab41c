"""Asks for a stop and notices trouble: signals, the time budget, steps that were not applied.

A signal only sets a flag; the loop asks `stop_wanted` at a step boundary and lets all ranks agree. Knows
nothing of saving.
"""

import signal
import time
from types import FrameType

from megatron_steel import dist
from megatron_steel.errors import TrainingError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SKIPS_IN_A_ROW = 10


class Watch:
    """One per process and run.

    Args:
        stop_after_minutes: a time budget counted from here, or None.
    """

    def __init__(self, stop_after_minutes: float | None):
        self._reason: str | None = None
        self._deadline = None if stop_after_minutes is None else time.monotonic() + 60 * stop_after_minutes
        self._skipped_in_a_row = 0
        self.skipped_steps = 0
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason == "SIGINT":
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self._reason = signal.Signals(number).name

    def stop_wanted(self) -> str | None:
        """Why this rank wants to stop at the next step boundary, or None."""
        if self._reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = "train.stop_after_minutes is over"
        return self._reason

    def agreed_stop(self) -> bool:
        """True on every rank when one of them wants to stop. A collective call."""
        return dist.any_rank(self.stop_wanted() is not None)

    def step_done(self, step: int, applied: bool) -> None:
        """Count a step whose loss or gradients were not finite, so that the weights were left alone.

        Raises TrainingError, on all ranks alike, after ten in a row: the numbers will not come back by themselves.
        """
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        if applied:
            return
        self.skipped_steps += 1
        if dist.is_main():
            dist.log.warning(
                "step %d: the loss or the gradients are not finite, the weights were left as they are", step
            )
        if self._skipped_in_a_row >= _SKIPS_IN_A_ROW:
            raise dist.shared(TrainingError(
                f"the loss or the gradients of {_SKIPS_IN_A_ROW} steps in a row are not finite", f"step {step}",
                "resume from an older checkpoint with a lower optim.lr, or look at the data of these steps",
            ))  # fmt: skip
