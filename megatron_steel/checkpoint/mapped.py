"""Pages of mapped files, given back once they have been read.

A file that is read through a mapping stays counted as this process's memory until the kernel wants it back; somebody who
watches a process, or a container that counts so, sees the whole checkpoint. Nothing is lost: the pages are clean, and
reading again brings them from the page cache. Where there is no Linux, nothing is done.
"""

import ctypes
import mmap
from pathlib import Path


def forget(folder: Path) -> None:
    """Let go of the pages of every file of `folder` that this process has mapped and never written to.

    Tensors of `torch.load(mmap=True)` stay as they are. Where one of them was written to, the file's values come back:
    only for those who read.
    """
    advice, maps = getattr(mmap, "MADV_DONTNEED", None), Path("/proc/self/maps")
    if advice is None or not maps.exists():
        return
    libc, inside = ctypes.CDLL(None), f"{folder.resolve()}/"
    for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(inside):
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice))
