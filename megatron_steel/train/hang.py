"""Stacks of a rank that makes no progress, into `RUN/stacks/rank-00001.txt`.

Three roads, because a hung process may be unable to take the first: a thread of Python writes them; SIGUSR2 makes the
interpreter's C code write them, also while the main thread is stuck inside a library; and a timer in C fires where
something holds the interpreter's lock. Knows nothing of why there was no progress.
"""

import contextlib
import faulthandler
import os
import signal
import time
from pathlib import Path

from megatron_steel import dist

FOLDER = "stacks"
STACKS_SIGNAL = signal.SIGUSR2


class Stacks:
    """Opens this rank's file; it is deleted at `close` when nothing was written."""

    def __init__(self, run_folder: Path):
        folder = run_folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{dist.rank():05d}.txt"
        self._file = self.path.open("a", encoding="utf-8")
        faulthandler.register(STACKS_SIGNAL, self._file, all_threads=True)

    def write(self, why: str) -> None:
        """Append the stacks of all threads of this process."""
        self._file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} rank {dist.rank()}, process {os.getpid()}: {why}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)

    def arm(self, seconds: float) -> None:
        """Unless armed again within `seconds`, C code writes the stacks and ends the process with exit code 1."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        self.disarm()
        faulthandler.unregister(STACKS_SIGNAL)
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # a peer may still ask; the default would kill
        with contextlib.suppress(OSError):
            self._file.close()
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.path.parent.rmdir()  # fails, as it should, where other ranks' stacks lie
