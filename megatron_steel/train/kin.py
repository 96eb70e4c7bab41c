"""The processes around a rank: the launcher that started it, and its peers on this machine.

DeepSpeed's launcher is two processes, `deepspeed` and `deepspeed.launcher.launch`. A SIGTERM to the first reaches
nobody else, and a SIGKILL of the second leaves the ranks running, so each rank looks for itself. Over ssh the parent of
`launch` is a shell and sshd, whose end means the same. Knows nothing of training.
"""

import contextlib
import os
import signal

import psutil

_NODE_LAUNCHERS = ("deepspeed.launcher.launch", "torch.distributed.run", "torch/distributed/run.py", "torchrun")
_RUNNER = ("deepspeed", "megatron_steel", "sshd")  # any of these in a command line: it may well have started `launch`


class Kin:
    """Taken at a rank's start; a process without a launcher has no kin and loses none. `peers`: other ranks of this machine."""

    def __init__(self, peers: int) -> None:
        self._expected = peers
        self._me = psutil.Process()
        self._launchers: list[psutil.Process] = []
        self._peers: dict[int, psutil.Process] = {}
        self._orphan = False
        parent = _parent(self._me)
        if parent is None or not any(name in _words(parent) for name in _NODE_LAUNCHERS):
            return
        self._launchers.append(parent)
        if _NODE_LAUNCHERS[0] not in _words(parent):
            return
        runner = _parent(parent)
        # `deepspeed` may have died while `launch` was starting: then init is its parent now.
        self._orphan = runner is None or (runner.pid == 1 and not any(name in _words(runner) for name in _RUNNER))
        if runner is not None:
            self._launchers.append(runner)
            above = _parent(runner)
            if _NODE_LAUNCHERS[0] in _words(runner) and above is not None and _words(above).startswith("sshd"):
                self._launchers.append(above)  # `runner` is a shell that holds the remote command

    @property
    def launched(self) -> bool:
        return bool(self._launchers)

    def launcher_lost(self) -> bool:
        """True when a process that started this rank has died."""
        chain = [self._me, *self._launchers]
        return self._orphan or any(
            not _alive(above) or _parent_id(below) != above.pid
            for below, above in zip(chain, self._launchers, strict=False)
        )

    def peer_lost(self) -> bool:
        """True when another rank that this rank's launcher started has ended. Ask regularly: it knows whom it has seen."""
        if self._launchers and len(self._peers) < self._expected:  # the launcher starts them one after another
            with contextlib.suppress(psutil.Error):
                children = {child.pid: child for child in self._launchers[0].children() if child.pid != self._me.pid}
                self._peers = children | self._peers
        return not all(_alive(peer) for peer in self._peers.values())

    def signal_peers(self, *numbers: signal.Signals) -> None:
        for peer in self._peers.values():
            for number in numbers:
                with contextlib.suppress(psutil.Error):
                    peer.send_signal(number)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.Error:
        return None


def _parent_id(process: psutil.Process) -> int | None:
    try:
        return os.getppid() if process.pid == os.getpid() else process.ppid()
    except psutil.Error:
        return None


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
