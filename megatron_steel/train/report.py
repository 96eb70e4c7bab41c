"""What a rank and its supervisor tell each other, as small files in one folder that all nodes see.

Each rank keeps `rank-00001.json`: who it is, the step it is at, and in the end its exit code and its error. The
supervisor writes `stop` to ask every rank at once, also those that have not started yet: a file has no moment that
can be missed, and it reaches other nodes. Without a supervisor there is no folder and nothing is written.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from megatron_steel import dist

OPTION = "--reports="  # how the supervisor hands the folder to the ranks
_STOP = "stop"
_LONGEST_ERROR = 8000


class Report:
    """This rank's file in `folder`, or nothing where folder is None.

    A report that cannot be written is a warning: it must not end a run.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._file = folder / f"rank-{dist.rank():05d}.json" if folder else None
        self._writing = threading.Lock()
        self._said = _ErrorText()
        self._entry: dict[str, Any] = {
            "rank": dist.rank(), "world_size": dist.world_size(), "host": socket.gethostname(), "pid": os.getpid(),
            "step": 0, "exit_code": None, "ended": None, "error": "", "launcher_lost": False,
        }  # fmt: skip
        if folder:
            dist.log.addHandler(self._said)
            self._write({})

    def beat(self, step: int) -> None:
        """The rank has done `step` steps; written only when that has changed."""
        if step != self._entry["step"]:
            self._write({"step": step})

    def launcher_lost(self) -> None:
        """The stop that follows was nobody's wish."""
        self._write({"launcher_lost": True})

    def end(self, exit_code: int) -> None:
        """The last word; the first one counts."""
        if self._entry["exit_code"] is None:
            self._write({"exit_code": exit_code, "ended": time.time(), "error": self._said.text()})

    def stop_asked(self) -> str | None:
        """Why the supervisor wants this run to stop, or None."""
        if self._folder is None:
            return None
        try:  # a listing is fresh where a network file system would answer a question for one name from its cache
            return (self._folder / _STOP).read_text() if _STOP in os.listdir(self._folder) else None
        except OSError:
            return None

    def _write(self, change: dict[str, Any]) -> None:
        with self._writing:
            self._entry |= change
            if self._file is None:
                return
            try:
                _replace(self._file, json.dumps(self._entry))
            except OSError as error:
                dist.log.warning("rank %d cannot report to its supervisor: %s", dist.rank(), error)


def ask_to_stop(folder: Path, why: str) -> None:
    """Ask every rank that reports into `folder`, also those that start later."""
    _replace(folder / _STOP, why)


def read_all(folder: Path) -> list[dict[str, Any]]:
    """What the ranks have reported so far, in their order."""
    found = [_read(file) for file in sorted(folder.glob("rank-*.json"))]
    return [entry for entry in found if entry is not None]


def _read(file: Path) -> dict[str, Any] | None:
    """One report; on a network file system a file that is being replaced may be gone for a moment."""
    for _ in range(10):
        with contextlib.suppress(OSError, ValueError):
            return json.loads(file.read_text(encoding="utf-8"))
        time.sleep(0.05)
    return None


def _replace(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


class _ErrorText(logging.Handler):
    """Keeps the errors this rank has logged, tracebacks included."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(self.format(record))

    def text(self) -> str:
        return "\n".join(self._texts)[-_LONGEST_ERROR:]
