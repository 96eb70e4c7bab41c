"""One job per run folder. The kernel drops the lock when its holder dies, so a stale one cannot exist."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from megatron_steel.errors import SteelError


def take(folder: Path) -> TextIO:
    """Lock a run folder for this process; keep the returned file open as long as the run lasts.

    The file `run.lock` holds "pid host", to see who trains here. Raises SteelError when somebody else does.
    """
    file = (folder / "run.lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise SteelError(f"another job trains in this folder (process {file.read().strip() or 'unknown'})", folder,
                         "wait for it, stop it, or choose another run.dir") from None  # fmt: skip
    file.truncate(0)
    file.write(f"{os.getpid()} {socket.gethostname()}\n")
    file.flush()
    return file
