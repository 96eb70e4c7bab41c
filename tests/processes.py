"""What the fault tests ask of other processes: who of a session still lives, and waiting for something to become true."""

import time
from pathlib import Path


def session(leader: int) -> list[int]:
    """The living processes of a session, in order; zombies are left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(folder.name))
    return sorted(found)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
