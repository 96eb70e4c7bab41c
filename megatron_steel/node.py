"""One node's part of a start: DeepSpeed's launcher and its ranks, from the first process to the last.

`Launched` is that part where the supervisor runs. On every node of a host file the supervisor starts this module
(`python -m megatron_steel.node`) through ssh or srun, and tells it what to do in JSON lines on stdin:

1. the first line is the `Order`, or a question that `_answer` answers;
2. then an empty line every few seconds; `stop` has the ranks save and leave, `kill` ends them;
3. silence, or the end of stdin: the supervisor or the way to it is dead. The launcher is killed, so that its ranks
   notice, save if they can, and leave.

It ends when no process of this node's part is left. Knows nothing of hosts, restarts or training.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from megatron_steel.train import report

BEAT_EVERY = 5.0  # seconds
_SILENCE = 60.0  # seconds without a line: the supervisor cannot reach this node any more
LEFT_END_IN = 660.0  # seconds for ranks that save because their launcher has died; they end themselves sooner if stuck
_LOOK_EVERY = 0.2
_PR_SET_PDEATHSIG = 1
Order = dict[str, Any]
"""`words` of DeepSpeed's runner, `environment` to add, `reports` (the folder of this start), `node` (its number)"""


class Launched:
    """`deepspeed` with `words`, in a session of its own, by which all that it starts is known.

    A terminal's Ctrl-C shall reach the supervisor alone, which tells all ranks at once.
    """

    name = ""  # nobody needs to be told which machine it is

    def __init__(self, words: list[str], environment: dict[str, str] | None = None, stdout: int | None = None):
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *words]
        stderr = subprocess.STDOUT if stdout else None
        self.process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=dying_with_parent(),
            stdout=stdout,
            stderr=stderr,
        )

    def poll(self) -> int | None:
        """The launcher's exit code, negative where a signal killed it; None while it runs."""
        return self.process.poll()

    def gone(self) -> bool:
        """True when neither the launcher nor anything it has started lives."""
        return self.poll() is not None and not self.living()

    def living(self) -> list[psutil.Process]:
        """The session's processes, and their children where these have left it."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter(["status"]):
            with contextlib.suppress(psutil.Error, OSError):
                if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == self.process.pid:
                    found |= {process.pid: process, **{c.pid: c for c in process.children(recursive=True)}}
        return list(found.values())

    def tell(self) -> None:
        """Ask the ranks to stop, by a signal: where the disk is full no file can."""
        for process in self._ranks_or_launchers(ranks=True):
            process.send_signal(signal.SIGTERM)

    def abandon(self) -> None:
        """Kill the launcher alone: the ranks notice, save and leave."""
        for process in self._ranks_or_launchers(ranks=False):
            process.kill()

    def end(self) -> set[int]:
        """Kill what lives, and wait. Returns the processes that it was."""
        left = self.living()
        kill(left)
        self.process.wait()
        return {process.pid for process in left}

    def _ranks_or_launchers(self, ranks: bool) -> list[psutil.Process]:
        found = []
        for process in self.living():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                launcher = any(word.startswith("deepspeed.launcher.") for word in words)
                rank = not launcher and any(word.startswith("--local_rank=") for word in words)
                if rank if ranks else launcher:
                    found.append(process)
        return found


def dying_with_parent() -> Any:
    """For `preexec_fn`: SIGTERM when this process has died, however it did."""
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def prepare() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # SLURM tells every process: ranks listen, launchers would die
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # a launcher's ranks notice, save and leave
        if os.getppid() != parent:
            os._exit(70)

    return prepare


def kill(processes: list[psutil.Process]) -> None:
    """Kill processes and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def kill_earlier(reports: Path) -> list[int]:
    """End what earlier starts by the same supervisor have left on this machine. Returns the processes.

    `reports`: the folder of the start to come, `.launch-HOST-PID-NUMBER-...`, which stands in command lines. Another
    supervisor's job in the same run folder is none of ours: the folder's lock refuses one of the two.
    """
    beside, own = f"{report.OPTION}{reports.parent}/{reports.name.rsplit('-', 2)[0]}-", f"{report.OPTION}{reports}"
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or ()
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(w.startswith(beside) and w != own for w in words):
            with contextlib.suppress(psutil.Error):
                found += [process, *process.children(recursive=True)]
    kill(found)
    return [process.pid for process in found]


def free_port() -> str:
    """A port for the rendezvous that nobody listens on now; should it be taken in between, the next start has another."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def killed_file(reports: Path, node: int) -> Path:
    """Where a node's part writes, as a JSON list, which processes it had to end."""
    return reports / f"killed-{node:05d}.json"


def main() -> int:
    """Returns the launcher's exit code, as a shell gives it."""
    line = sys.stdin.buffer.raw.readline()  # type: ignore[union-attr]
    order = json.loads(line or "{}")
    if "words" not in order:
        print(json.dumps(_answer(order)), flush=True)
        return 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # srun passes them on; whoever wants a stop says so on stdin
    return _follow(order)


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    """A free port, whether this node sees the run folder's `reports`, and the address that it knows `first` by."""
    try:
        first = socket.getaddrinfo(question["first"], None)[0][4][0]
    except OSError:
        first = None
    return {"port": free_port(), "sees": question["name"] in _listing(Path(question["folder"])), "first": first}


def _listing(folder: Path) -> list[str]:
    """A folder's names; a network file system may show a new one a little later."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _follow(order: Order) -> int:
    reports = Path(order["reports"])
    earlier = kill_earlier(reports)
    if earlier:
        print(f"{socket.gethostname()}: ended what an earlier start had left: {earlier}", file=sys.stderr, flush=True)
    own = Launched(order["words"], os.environ | order["environment"], subprocess.PIPE)
    pump = threading.Thread(target=_pass_on, args=(own.process.stdout,), daemon=True)
    pump.start()
    _listen(own)
    killed = own.end()
    with contextlib.suppress(OSError):
        killed_file(reports, order["node"]).write_text(json.dumps(sorted(killed)), encoding="utf-8")
    pump.join(2)
    code = own.process.returncode
    return 128 - code if code < 0 else code


def _listen(own: Launched) -> None:
    """Until nothing of this node's part lives, or what lives must be killed."""
    heard, kill_at, lost = time.monotonic(), float("inf"), False
    while not own.gone():
        now = time.monotonic()
        if own.poll() is not None:
            kill_at = min(kill_at, now + LEFT_END_IN)
        if not lost and select.select([0], [], [], _LOOK_EVERY)[0]:
            said = os.read(0, 4096)
            heard, lost = now, not said
            if b"kill" in said or now > kill_at:
                return
            if b"stop" in said:
                own.tell()
        elif lost:
            time.sleep(_LOOK_EVERY)
        if (lost or now - heard > _SILENCE) and own.poll() is None:
            lost = True
            own.abandon()
        if now > kill_at:
            return


def _pass_on(stream: Any) -> None:
    """What launcher and ranks say goes to the supervisor; where it cannot, they still may speak."""
    while piece := os.read(stream.fileno(), 65536):
        with contextlib.suppress(OSError):
            os.write(1, piece)


if __name__ == "__main__":
    sys.exit(main())
