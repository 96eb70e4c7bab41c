"""A thread beside the training thread, which may be waiting for ranks that will never answer.

Twice a second it looks for a stop asked for (a signal, the supervisor, the time budget), for a launcher or a peer that
has died, and for a rank that makes no progress. It asks the main thread to stop at the next step boundary, and ends the
process itself where that boundary cannot be reached any more. Knows nothing of what is trained or saved.
"""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from megatron_steel import dist
from megatron_steel.errors import EXIT_INTERNAL, EXIT_STOPPED
from megatron_steel.signals import SIGNALS
from megatron_steel.train.hang import STACKS_SIGNAL, Stacks
from megatron_steel.train.kin import Kin
from megatron_steel.train.report import Report
from megatron_steel.train.watch import Phase, Watch

_LOOK_EVERY = 0.5  # seconds
_STARTING_ENDS_IN = 3.0  # the main thread leaves by itself unless a library holds it
_SAVE_MAY_REST = 600.0  # seconds in which a save leaves no mark: 30 GB at 50 MB/s


class Guard:
    """Use as a context around a run, in the main thread.

    Args:
        run_folder: where stacks go.
        hang_after_seconds: no progress for so long is a hang; None: never.
    """

    def __init__(self, watch: Watch, report: Report, run_folder: Path, hang_after_seconds: float | None):
        self._watch, self._report, self._run_folder = watch, report, run_folder
        self._hang_after = hang_after_seconds
        self._kin = Kin(dist.ranks_on_node() - 1)
        self._stacks: Stacks | None = None
        self._launcher_lost_at: float | None = None
        self._peer_lost_at: float | None = None
        self._interrupted = False
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)

    def __enter__(self) -> "Guard":
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        # The C part of Python's handler writes here at once, also while the main thread is held by a library.
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._watch.listen()
        self._open = True
        self._thread.start()
        return self

    def begin(self, step: int) -> None:
        """Training starts at `step`: from here on a hang is noticed. A collective call; may raise Stopped."""
        if self._hang_after is not None:
            self._stacks = dist.together(lambda: Stacks(self._run_folder))
        self._watch.begin(step)
        if self._stacks and self._hang_after is not None:
            self._stacks.arm(1.1 * self._hang_after)

    def __exit__(self, *_: object) -> None:
        self._open = False
        os.write(self._wake, b"\0")
        self._thread.join()
        self._report.beat(self._watch.step)
        signal.set_wakeup_fd(-1)
        os.close(self._woken)
        os.close(self._wake)
        if self._stacks:
            self._stacks.close()
        if not self._kin.launched:  # else the process is about to end, and its launcher signals those that end later
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _run(self) -> None:
        while self._open:
            if select.select([self._woken], [], [], _LOOK_EVERY)[0]:
                numbers = os.read(self._woken, 64)
                if any(number in SIGNALS for number in numbers):
                    self._watch.asked_at = self._watch.asked_at or time.monotonic()
            if self._open:
                self._look()

    def _look(self) -> None:
        watch, now = self._watch, time.monotonic()
        self._report.beat(watch.step)
        why = self._report.stop_asked()
        if why:
            watch.ask(why)
        if self._launcher_lost_at is None and watch.phase is not Phase.LEAVING and self._kin.launcher_lost():
            self._launcher_lost_at = now
            self._report.launcher_lost()
            watch.ask("the launcher has died")
        if self._peer_lost_at is None and watch.phase is not Phase.LEAVING and self._kin.peer_lost():
            self._peer_lost_at = now
        if watch.stop_wanted() and not self._interrupted:
            self._interrupted = True
            watch.interrupt()
        self._end_what_cannot_end(now)
        self._end_what_hangs(now)

    def _end_what_cannot_end(self, now: float) -> None:
        """A stop was asked for, or somebody died, and the main thread has not moved since for too long."""
        watch = self._watch
        lost = [at for at in (self._launcher_lost_at, self._peer_lost_at) if at is not None]
        if watch.phase is Phase.STARTING:
            if watch.asked_at is not None and now - watch.asked_at > _STARTING_ENDS_IN:
                self._exit(EXIT_STOPPED, "stopped before the first step on request: nothing to save")
            patience = _STARTING_ENDS_IN + 2
        elif watch.phase is Phase.SAVING:
            # A save of all ranks ends by itself, however large; one whose peer is dead does not.
            patience = 60.0 if self._peer_lost_at is not None else _SAVE_MAY_REST if lost else math.inf
        elif watch.phase is Phase.LEAVING:
            patience = 60.0  # everything is saved; the first rank draws a picture
        elif lost:
            patience = 30.0 if watch.longest_pause is None else max(8.0, 3 * watch.longest_pause)
        else:
            # The first step compiles and connects: how long it may take nobody knows.
            patience = _SAVE_MAY_REST if watch.longest_pause is None else max(20.0, 5 * watch.longest_pause)
        since = min([*lost, *([watch.asked_at] if watch.asked_at is not None else [])], default=None)
        if since is not None and now - max(since, watch.progressed_at) > patience:
            dead = "the launcher" if self._launcher_lost_at else "another rank"
            why = f"{dead} has died" if lost else "a stop was asked for"
            self._exit(EXIT_INTERNAL, f"{why}, and this rank could not reach the end of its step")

    def _end_what_hangs(self, now: float) -> None:
        stacks, watch = self._stacks, self._watch
        if stacks is None or self._hang_after is None or watch.phase is Phase.STARTING:
            return
        limit = self._hang_after if watch.phase is Phase.TRAINING else max(self._hang_after, _SAVE_MAY_REST)
        rested = now - watch.progressed_at
        if rested < limit:
            stacks.arm(max(1.0, 1.1 * limit - rested))  # in case not even this thread can run then
            return
        stacks.disarm()
        why = f"no progress for {rested:.0f} seconds after step {watch.step}, {watch.phase.value}"
        stacks.write(why)
        self._kin.signal_peers(signal.SIGCONT, STACKS_SIGNAL)  # one that is stopped or stuck cannot tell by itself
        time.sleep(1)
        self._exit(EXIT_INTERNAL, f"{why}: see {stacks.path.parent}")

    def _exit(self, code: int, why: str) -> None:
        """End this process now; the main thread cannot."""
        (dist.log.info if code == EXIT_STOPPED else dist.log.error)("rank %d: %s", dist.rank(), why)
        self._report.end(code)
        if self._launcher_lost_at is not None:
            self._kin.signal_peers(signal.SIGKILL)  # nobody is left who would end one that is stopped
        os._exit(code)


def end_now(code: int) -> None:
    """End the process without the interpreter's clean-up, which takes seconds and can hang in a communication library."""
    with contextlib.suppress(OSError):  # nobody may be reading any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
