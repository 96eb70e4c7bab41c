"""Outputs: one writer at a time, by a kernel lock that no dead process can keep; one file whole or not at all.

Knows nothing of formats.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_steel.errors import SteelError


class Busy(SteelError):  # noqa: N818  (it says what the place is)
    """Another process writes there; what it has written so far is its own."""


@contextlib.contextmanager
def reserved(prefix: str | os.PathLike[str]) -> Iterator[None]:
    """Keep every other process from making `prefix` meanwhile; raises `Busy` where one does already.

    The file PREFIX.lock goes at the end. The kernel drops the lock when its holder dies, so a stale one cannot exist.
    """
    path = Path(f"{os.fspath(prefix)}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile looks again


@contextlib.contextmanager
def published(file: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a name beside `file` to write to; it takes the place of `file` when the block has not failed.

    Raises SteelError where the disk does not take it.
    """
    aside = f"{os.fspath(file)}.partial"
    try:
        yield aside
        os.replace(aside, file)
    except OSError as error:
        raise SteelError(f"cannot write: {error.strerror or error}", file, "mend it, or name another file") from None
    finally:
        Path(aside).unlink(missing_ok=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def locked(path: Path) -> IO[bytes]:
    """Open `path` for this process alone, empty. A file system without locks (some network ones) gives none."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        file = os.fdopen(fd, "rb+", buffering=1 << 20)  # not cut before it is known to be ours
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            remedy = "wait for it or stop it, or choose another output"
            raise Busy("another process is writing this data set", path, remedy) from None
        except OSError:
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                return file
        file.close()  # its holder finished and took it away between the open and the lock
