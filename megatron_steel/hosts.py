"""The nodes of a host file: who they are, how to reach them, which of them answer, and a job's part on each.

DeepSpeed's own way to several nodes is pdsh, which neither passes signals on nor ends what it has started. Here each node
runs `deepspeed --no_ssh --node_rank N` under `node.py`, which is reached by ssh, or by srun inside an allocation of
Slurm, where nodes need no ssh between them. Knows nothing of restarts or training.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel import dist, node
from megatron_steel.errors import SteelError, Stopped

_ANSWERS_IN = 12.0  # seconds to reach a node
_STARTS_IN = 90.0  # seconds in which Python starts there, from a slow shared disk too
_SEES_IN = 60.0  # seconds until a network file system shows a new name
_RETURNS_IN = 600.0  # seconds in which a node that is started again is back
_ENDS_IN = 30.0  # seconds in which a node that was told to kill has done so
_REACHED = "megatron-steel: reached"
_PASSED = ("PYTHON", "NCCL", "GLOO", "TORCH", "CUDA_", "HF_", "OMP_", "UCX", "MLFLOW", "LD_LIBRARY_PATH", "PATH")
_OWN = ("CUDA_VISIBLE_DEVICES",)  # each node has its own
_SAME_PATHS = "the project, its environment and the working folder must lie under the same paths on every node"


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


def read_hostfile(path: str, num_gpus: int | None = None) -> list[Host]:
    """The hosts of a file in DeepSpeed's form, `HOSTNAME slots=GPUS` a line; `num_gpus` puts another number of ranks on each.

    Raises SteelError naming the line that cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = f"the host file cannot be read: {getattr(error, 'strerror', None) or error}"
        raise SteelError(what, path, "write one line a node: HOSTNAME slots=GPUS") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"([^\s-]\S*)\s+slots=(\d+)", line)
        if found is None or int(found[2]) < 1:
            raise SteelError(
                f"this is no line of a host file: {line!r}", f"{path}:{number}", "write HOSTNAME slots=GPUS"
            )
        if found[1] in hosts:
            raise SteelError(f"{found[1]} stands there twice", f"{path}:{number}", "one line a node, slots= its GPUs")
        hosts[found[1]] = Host(found[1], num_gpus or int(found[2]))
    if not hosts:
        raise SteelError("the host file names no node", path, "write one line a node: HOSTNAME slots=GPUS")
    return list(hosts.values())


class Cluster:
    """The nodes of one job.

    Args:
        hosts: of `read_hostfile`; the first is where the ranks meet, so that all must know it by this name.
        cuts: whether the recipe's batch can be cut into equal parts for so many ranks.
    """

    def __init__(self, hosts: list[Host], cuts: Callable[[int], bool]):
        self._hosts, self._cuts, self._started = hosts, cuts, False

    def start(self, reports: Path, words: list[str], wanted: Callable[[], bool]) -> "list[Remote]":
        """Start a job's part on every node, or after a node's loss on those that are left.

        Raises SteelError, at the first start, naming every node that does not answer; and where a node cannot do its part.
        """
        hosts, port = self._ready(reports, wanted)
        self._started = True
        file = reports / "hostfile"
        file.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts), encoding="utf-8")
        environment = passed_environment()
        parts = []
        for number, host in enumerate(hosts):
            launcher = ["--hostfile", str(file), "--no_ssh", "--node_rank", str(number),
                        "--master_addr", _address(hosts[0]), "--master_port", port, *words]  # fmt: skip
            order = {"words": launcher, "environment": environment, "reports": str(reports), "node": number}
            parts.append(Remote(host, order))
        return parts

    def _ready(self, reports: Path, wanted: Callable[[], bool]) -> tuple[list[Host], str]:
        """The nodes to start on, and a port that is free on the first.

        A job begins on all. After a node's loss it waits for that node as long as a machine takes to start again, then
        goes on with as many of the others as the batch can be cut for.
        """
        until = time.monotonic() + _RETURNS_IN
        while True:
            answers = _ask_all(self._hosts, reports)
            silent = [h for h in self._hosts if isinstance(answers[h.name], str)]
            there = [h for h in self._hosts if h not in silent]
            if not silent:
                break
            told = "\n    ".join(f"{h.name}: {answers[h.name]}" for h in silent)
            if not self._started:
                what = f"{len(silent)} of {len(self._hosts)} nodes cannot be used:\n    {told}"
                raise SteelError(
                    what,
                    ", ".join(h.name for h in silent),
                    f"mend them, or take them out of the host file; {_SAME_PATHS}",
                )
            while there and not self._cuts(sum(h.slots for h in there)):
                there.pop()
            left = until - time.monotonic()
            if wanted():
                raise Stopped("stopped on request while nodes were lost; the same command goes on from there")
            if there and left < 0:
                break
            then = f"{left:.0f} s more, then without them" if there else "the batch cannot be cut for the others alone"
            dist.log.warning("waiting for %d lost nodes (%s):\n    %s", len(silent), then, told)
            _pause(15.0, wanted)
        if len(there) < len(self._hosts):
            dist.log.warning("going on with %d of %d nodes: %s", len(there), len(self._hosts), [h.name for h in there])
        return there, str(answers[there[0].name]["port"])


class Remote:
    """One node's part, seen from the supervisor: `node.py` at the other end of ssh or srun."""

    def __init__(self, host: Host, order: node.Order):
        self.name, self._reports, self._number = host.name, Path(order["reports"]), order["node"]
        self._process = subprocess.Popen(
            reach(host), stdin=subprocess.PIPE, start_new_session=True, preexec_fn=node.dying_with_parent()
        )
        self._say(json.dumps(order))
        threading.Thread(target=self._beat, name=f"beat {host.name}", daemon=True).start()

    def poll(self) -> int | None:
        """The exit code of the node's launcher, 255 where the way to it is lost; None while it runs."""
        return self._process.poll()

    def gone(self) -> bool:
        """As `poll`: the other end leaves last. Where the way to it is lost it ends its part by itself."""
        return self.poll() is not None

    def tell(self) -> None:
        """Have this node's ranks stop."""
        self._say("stop")

    def end(self) -> set[int]:
        """Kill what lives there. Returns the processes that it was, as far as is known."""
        self._say("kill")
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(_ENDS_IN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        try:
            return set(json.loads(node.killed_file(self._reports, self._number).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return set()

    def _beat(self) -> None:
        while self._say(""):
            time.sleep(node.BEAT_EVERY)

    def _say(self, line: str) -> bool:
        try:
            os.write(self._process.stdin.fileno(), f"{line}\n".encode())  # type: ignore[union-attr]
        except (OSError, ValueError):  # the other end is gone
            return False
        return True


def reach(host: Host, before: str = "") -> list[str]:
    """The local command that runs `node.py` in this folder on a node, after the shell command `before`."""
    remote = f"{before}cd {shlex.quote(os.getcwd())} && exec {shlex.join(_here())} -m megatron_steel.node"
    if os.environ.get("SLURM_JOB_ID"):
        # The whole node's share of the allocation, beside other steps; a shell, for the folder may lack on one of them.
        return ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={host.name}", "--overlap", "--cpu-bind=none", "--mem=0",
                "--unbuffered", "--quiet", "/bin/sh", "-c", remote]  # fmt: skip
    return ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWERS_IN - 2:.0f}",
            "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3", host.name, remote]  # fmt: skip


def passed_environment() -> dict[str, str]:
    """What the nodes shall know of this process's environment, and DeepSpeed's own `.deepspeed_env` (home, then here)."""
    passed = {k: v for k, v in os.environ.items() if k.startswith(_PASSED) and k not in _OWN}
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (Path.home() / name, Path(name)):
        if file.is_file():
            lines = [line.partition("=") for line in file.read_text(encoding="utf-8").splitlines()]
            passed |= {key.strip(): value.strip() for key, equals, value in lines if equals and not key.startswith("#")}
    return passed


def _here() -> list[str]:
    """This interpreter, with the modules that this process finds."""
    path = os.environ.get("PYTHONPATH")
    return ["env", f"PYTHONPATH={path}", sys.executable] if path else [sys.executable]


def _address(host: Host) -> str:
    return host.name.rpartition("@")[2]  # ssh takes user@host


def _ask_all(hosts: list[Host], reports: Path) -> dict[str, Any]:
    """Each node's answer, or in words why it can do no part."""
    question = {"first": _address(hosts[0]), "folder": str(reports.parent), "name": reports.name}
    with ThreadPoolExecutor(len(hosts)) as pool:
        return dict(zip([h.name for h in hosts], pool.map(lambda h: _ask(h, question), hosts), strict=True))


def _ask(host: Host, question: dict[str, Any]) -> dict[str, Any] | str:
    until = time.monotonic() + _SEES_IN
    while True:
        answer = _ask_once(host, question)
        if isinstance(answer, str):
            return answer
        if answer["first"] is None:
            return f"it cannot resolve {question['first']}, where the ranks shall meet: write an address that all nodes know"
        if answer["sees"]:
            return answer
        if time.monotonic() > until:
            return f"it does not see what was written into {question['folder']}: run.dir must lie on a disk that all nodes share"
        time.sleep(2)


def _ask_once(host: Host, question: dict[str, Any]) -> dict[str, Any] | str:
    """One question through ssh or srun. Reaching a node and starting Python there have limits of their own."""
    command = reach(host, f"echo '{_REACHED}'; ")
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   start_new_session=True)  # fmt: skip
    except OSError as error:
        return f"{command[0]} cannot be started here: {error.strerror}"
    reached = threading.Event()
    told: list[str] = []

    def listen() -> None:
        for line in process.stdout or ():
            told.append(line.decode(errors="replace").strip())
            if told[-1] == _REACHED:
                reached.set()
        reached.set()

    complaints: list[bytes] = []
    threads = [threading.Thread(target=listen, daemon=True),
               threading.Thread(target=lambda: complaints.extend(process.stderr or ()), daemon=True)]  # fmt: skip
    for thread in threads:
        thread.start()
    with contextlib.suppress(OSError):
        process.stdin.write(f"{json.dumps(question)}\n".encode())  # type: ignore[union-attr]
        process.stdin.close()  # type: ignore[union-attr]
    try:
        if reached.wait(_ANSWERS_IN):
            process.wait(_STARTS_IN)
    except subprocess.TimeoutExpired:
        pass
    ended = process.poll() is not None
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for thread in threads:
        thread.join(2)
    for line in reversed(told):
        with contextlib.suppress(ValueError):
            return dict(json.loads(line))
    said = [line.decode(errors="replace").strip() for line in complaints if line.strip()]
    if _REACHED in told:
        return f"it answers, but {sys.executable} -m megatron_steel.node fails there: {(said or ['no answer'])[-1]}"
    return f"unreachable: {(said or [f'no answer within {_ANSWERS_IN:.0f} s'])[-1]}"


def _pause(seconds: float, wanted: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while not wanted() and time.monotonic() < until:
        time.sleep(0.2)
