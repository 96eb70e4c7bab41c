"""Nodes that are this machine under two addresses: an sshd on each, with keys and settings of its own, reached by the real ssh.

With `namespaces` each lives in a network namespace of its own, on a bridge, so that a node's network can be taken away.
With `instead` the second one finds other folders under some paths. Everything lies in one folder and ends with the context.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

SSHD = "/usr/sbin/sshd"
_PRIVATE = Path("/run/sshd")
_SERVER = """Port {port}
ListenAddress {address}
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
"""
_CLIENT = """Host *
  Port {port}
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking no
  LogLevel ERROR
"""


def lacking(namespaces: bool = False) -> str:
    """Why there can be no such nodes here; empty where there can."""
    need = ["ssh", "ssh-keygen", SSHD, *(["ip"] if namespaces else [])]
    missing = [name for name in need if not shutil.which(name)]
    if missing:
        return f"not installed here: {', '.join(missing)} (Debian: openssh-server, iproute2)"
    if namespaces and os.geteuid() != 0:
        return "network namespaces are root's"
    if namespaces:
        made = subprocess.run(["ip", "netns", "add", "steel-try"], capture_output=True, text=True)
        subprocess.run(["ip", "netns", "delete", "steel-try"], capture_output=True)
        return made.stderr.strip()
    return ""


class Nodes:
    """Use as a context. `hosts`: their addresses; `environment`: what the supervisor needs to reach them."""

    def __init__(self, folder: Path, namespaces: bool = False, instead: dict[Path, Path] | None = None):
        self.folder, self._namespaces = Path(folder), namespaces
        binds = [f"mount --bind {other} {path}" for path, other in (instead or {}).items()]
        self._mounts = ["unshare", "--mount", "sh", "-c", " && ".join([*binds, 'exec "$@"']), "sh"] if binds else []
        self.folder.mkdir(parents=True)
        self.hosts = ["10.83.7.2", "10.83.7.3"] if namespaces else ["127.0.0.2", "127.0.0.3"]
        self._servers: list[psutil.Popen] = []
        self._made_private = False

    def __enter__(self) -> "Nodes":
        try:
            return self._set_up()
        except BaseException:
            self.__exit__()
            raise

    def _set_up(self) -> "Nodes":
        folder = self.folder
        with socket.socket() as probe:
            probe.bind((self.hosts[0] if not self._namespaces else "127.0.0.1", 0))
            port = probe.getsockname()[1]
        for name in ("host", "key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        (folder / "client").write_text(_CLIENT.format(port=port, folder=folder))
        (folder / "bin").mkdir()
        (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/client "$@"\n')
        (folder / "bin" / "ssh").chmod(0o755)
        if os.geteuid() == 0 and not _PRIVATE.exists():  # sshd will not start as root without it
            _PRIVATE.mkdir()
            self._made_private = True
        if self._namespaces:
            self._connect()
        for number, address in enumerate(self.hosts):
            config = folder / f"server-{number}"
            config.write_text(_SERVER.format(port=port, address=address, folder=folder))
            inside = ["ip", "netns", "exec", f"steel-{number}"] if self._namespaces else []
            inside += self._mounts if number else []
            self._servers.append(psutil.Popen([*inside, SSHD, "-D", "-e", "-f", str(config)],
                                              stdout=subprocess.DEVNULL, stderr=(folder / f"log-{number}").open("w")))  # fmt: skip
        interface = "steel" if self._namespaces else "lo"
        self.environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": interface}
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{host} slots=1\n" for host in self.hosts))
        for host in self.hosts:
            _until(lambda host=host: self._ssh(host, "true").returncode == 0, f"ssh {host}: {self._log()}")
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            with contextlib.suppress(psutil.Error):
                for process in [*server.children(recursive=True), server]:
                    process.kill()
            server.wait()
        if self._made_private:
            with contextlib.suppress(OSError):
                _PRIVATE.rmdir()
        if self._namespaces:
            for number in range(len(self.hosts)):
                subprocess.run(["ip", "netns", "delete", f"steel-{number}"], capture_output=True)
            subprocess.run(["ip", "link", "delete", "steel-bridge"], capture_output=True)

    def below(self, number: int) -> list[psutil.Process]:
        """All that runs on a node: what its sshd has started."""
        return self._servers[number].children(recursive=True)

    def sessions(self, number: int) -> list[psutil.Process]:
        """The processes of sshd that serve a node's connections."""
        return [p for p in self.below(number) if "sshd" in p.name()]

    def network(self, number: int, state: str) -> None:
        """Take a node's network `down`, while its processes live on; or `up` again."""
        _run("ip", "-n", f"steel-{number}", "link", "set", "steel", state)

    def _connect(self) -> None:
        _run("ip", "link", "add", "steel-bridge", "type", "bridge")
        _run("ip", "address", "add", "10.83.7.1/24", "dev", "steel-bridge")
        _run("ip", "link", "set", "steel-bridge", "up")
        for number, address in enumerate(self.hosts):
            name = f"steel-{number}"
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", f"{name}-out", "type", "veth", "peer", "name", "steel", "netns", name)
            _run("ip", "link", "set", f"{name}-out", "master", "steel-bridge", "up")
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "steel")
            _run("ip", "-n", name, "link", "set", "steel", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")

    def _ssh(self, host: str, command: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, **self.environment}
        return subprocess.run(["ssh", "-o", "ConnectTimeout=5", host, command], env=environment, capture_output=True)

    def _log(self) -> str:
        return json.dumps([(self.folder / f"log-{n}").read_text()[-500:] for n in range(len(self.hosts))])


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _until(condition, what, seconds=30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)
