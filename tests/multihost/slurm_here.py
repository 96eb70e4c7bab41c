"""A Slurm of two nodes on this machine: its real daemons, with settings, keys and state in one folder.

The first in the order of names is called as the machine is, since there the ranks meet.
"""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

_CONFIG = """ClusterName=here
SlurmctldHost={machine}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=30
NodeName={machine} NodeHostname={machine} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={machine}-b NodeHostname={machine} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes={machine},{machine}-b Default=YES MaxTime=60 State=UP
"""
_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")


def lacking() -> str:
    """Why there can be no Slurm here; empty where there can."""
    missing = [name for name in _NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        return f"not installed here: {', '.join(missing)} (Debian: slurmctld, slurmd, slurm-client, munge)"
    return "" if os.geteuid() == 0 else "slurmd starts as root alone"


class Slurm:
    """Use as a context. `environment`: what its commands need."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
        self._daemons: list[psutil.Popen] = []

    def __enter__(self) -> "Slurm":
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        (folder / "slurm.conf").write_text(_CONFIG.format(machine=socket.gethostname(), folder=folder, ports=ports))
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log",
                 "seed-file": "munge.seed"}  # fmt: skip
        words = [f"--{name}={folder}/{file}" for name, file in files.items()]
        try:
            self._start("munged", "--foreground", "--force", *words)
            self._until(lambda: (folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D", "-c")
            for name in (socket.gethostname(), f"{socket.gethostname()}-b"):
                self._start("slurmd", "-D", "-N", name)
            self._until(lambda: self("sinfo", "-h", "-o", "%D %t") == "2 idle", "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            for process in [*daemon.children(recursive=True), daemon]:
                process.kill()
            daemon.wait()

    def __call__(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=self.folder)
        return done.stdout.strip() if done.returncode == 0 else f"{done.returncode}: {done.stderr}"

    def state(self, job: str) -> dict[str, str]:
        """All that `scontrol show job` says."""
        words = self("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _start(self, program: str, *words: str) -> None:
        path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
        self._daemons.append(psutil.Popen([path, *words], env=self.environment, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=(self.folder / f"{program}.err").open("a")))  # fmt: skip

    def _until(self, condition, what, seconds=30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            errors = "".join(file.read_text()[-800:] for file in self.folder.glob("*.err"))
            assert time.monotonic() < end, f"{what}: {errors}"
            time.sleep(0.3)
