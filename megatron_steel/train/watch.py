"""Asks for a stop and notices trouble: signals, the time budget, steps that were not applied.

A signal only sets a flag; the loop asks `agreed_stop` at a step boundary and lets all ranks agree. Before the first
step there is nothing to save, and the signal ends the rank at once. What the main thread cannot see while it waits for
others is the guard's part (`guard.py`), which reads the marks that are left here. Knows nothing of saving.
"""

import contextlib
import enum
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from megatron_steel import dist
from megatron_steel.errors import Stopped, StoppedEarly, TrainingError
from megatron_steel.signals import stop_signals

_SKIPS_IN_A_ROW = 10


class Phase(enum.Enum):
    STARTING = "before the first step"
    TRAINING = "training"
    SAVING = "saving"
    LEAVING = "leaving"


class Watch:
    """One per process and run.

    Args:
        stop_after_minutes: a time budget counted from here, or None. One that is over before the first step still
            buys that step, so that a job which is started again and again gets on.
    """

    def __init__(self, stop_after_minutes: float | None):
        self._reason: str | None = None
        self._deadline = None if stop_after_minutes is None else time.monotonic() + 60 * stop_after_minutes
        self._skipped_in_a_row = 0
        self._raised = False
        self.skipped_steps = 0
        self.phase = Phase.STARTING
        self.step = 0
        self.progressed_at = time.monotonic()
        self.longest_pause: float | None = None  # seconds between two marks; None before the second step
        self.asked_at: float | None = None

    def listen(self) -> None:
        """Take the signals over, in the main thread."""
        for number in stop_signals():
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason == "SIGINT":
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.ask(signal.Signals(number).name)
        if self.phase is Phase.STARTING and not self._raised:
            self._raised = True
            raise StoppedEarly(f"stopped before the first step on request ({self._reason}): nothing to save")

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason stands. Any thread."""
        self.asked_at = self.asked_at or time.monotonic()
        self._reason = self._reason or reason

    def interrupt(self) -> None:
        """From another thread: let a main thread that has not begun to train end itself."""
        main = threading.main_thread().ident
        if self.phase is Phase.STARTING and main is not None:
            signal.pthread_kill(main, signal.SIGTERM)

    def stop_wanted(self) -> str | None:
        """Why this rank wants to stop at the next step boundary, or None."""
        over = self._deadline is not None and time.monotonic() >= self._deadline and self.phase is not Phase.STARTING
        if self._reason is None and over:
            self.ask("train.stop_after_minutes is over")
        return self._reason

    def agreed_stop(self) -> bool:
        """True on every rank when one of them wants to stop. A collective call."""
        return dist.any_rank(self.stop_wanted() is not None)

    def begin(self, step: int) -> None:
        """The next step trains. Until here a rank that is asked to stop leaves alone, from now on all leave together.

        Ranks meet first, so that none is still preparing while another waits for its answer. A collective call. Raises Stopped.
        """
        dist.barrier()
        self.phase, self.step, self.progressed_at = Phase.TRAINING, step, time.monotonic()
        reasons = dist.gather(self._reason)
        if any(reasons):
            first = next(filter(None, reasons))
            raise Stopped(f"stopped before the first step on request ({first}): nothing to save")

    def progress(self, step: int) -> None:
        """Something was done: a step, or a batch of an evaluation."""
        now = time.monotonic()
        if self.step:  # the first step compiles, allocates and connects: no measure for the others
            self.longest_pause = max(self.longest_pause or 0.0, now - self.progressed_at)
        self.step, self.progressed_at = step, now

    def new_shapes(self) -> None:
        """The next step has other sizes: it compiles and allocates, and how long that takes nobody knows."""
        self.longest_pause, self.progressed_at = None, time.monotonic()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A save takes longer than a step and leaves no marks."""
        self.phase, self.progressed_at = Phase.SAVING, time.monotonic()
        try:
            yield
        finally:  # a periodic save may fail, and training goes on
            self.phase, self.progressed_at = Phase.TRAINING, time.monotonic()

    def leave(self) -> None:
        """The run has ended one way or another; ranks only wait for each other."""
        self.phase, self.progressed_at = Phase.LEAVING, time.monotonic()

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
