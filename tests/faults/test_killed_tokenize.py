"""Tokenizing that is killed, as a whole or a worker of it: no half output, and the same command finishes the job."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import session, wait_for

from megatron_steel.data.indexed import IndexedDataset
from megatron_steel.data.manifest import verify

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

JOB = """
import sys
from megatron_steel import cli
from megatron_steel.data import tokenize
tokenize._LEAST_UNIT_BYTES = 20_000
if __name__ == "__main__":
    sys.exit(cli.main(["tokenize", sys.argv[1], "--tokenizer", sys.argv[2], "--output", sys.argv[3], "--workers", sys.argv[4]]))
"""
DOCUMENTS = 40_000


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_tokenizer):
    """job(output, workers): the tokenizer as a process of its own session."""
    folder = tmp_path_factory.mktemp("killed")
    rows = (f'{{"text": "{" ".join(f"w{3 + (i * j) % 120}" for j in range(1 + i % 9))}"}}\n' for i in range(DOCUMENTS))
    (folder / "a.jsonl").write_text("".join(rows))
    (folder / "job.py").write_text(JOB)

    def start(output, workers):
        command = [sys.executable, str(folder / "job.py"), str(folder / "a.jsonl"), str(tiny_tokenizer), str(output)]
        return subprocess.Popen([*command, str(workers)], stderr=subprocess.PIPE, text=True, start_new_session=True)

    return start


@pytest.fixture(scope="module")
def straight(job, tmp_path_factory):
    """The bytes of an undisturbed job, and how long it took."""
    output, began = tmp_path_factory.mktemp("straight") / "out", time.monotonic()
    process = job(output, 1)
    assert process.wait(600) == 0, process.stderr.read()
    return content(output), time.monotonic() - began


def content(prefix):
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")]


@pytest.mark.parametrize(("kills", "workers"), [(3, 1), pytest.param(20, 1, marks=pytest.mark.slow),
                                                pytest.param(20, 2, marks=pytest.mark.slow)])  # fmt: skip
def test_kills_at_random_moments(job, straight, tmp_path, kills, workers):
    """The same output killed again and again; each attempt goes on where the last one was, and the last one finishes."""
    (whole, seconds), aim = straight, random.Random(kills + workers)
    finished = 0
    for number in range(kills):
        output = tmp_path / f"out{finished}"
        process = job(output, workers)
        # Half at any time after the start, half at the end, where the parts are joined.
        if number % 2:
            wait_for(lambda p=process, o=output: Path(f"{o}.parts").exists() or p.poll() is not None)
            time.sleep(aim.uniform(0, seconds / 8))
        else:
            wait_for(lambda p=process, o=output: list(Path(f"{o}.parts").glob("training.*")) or p.poll() is not None)
            time.sleep(aim.uniform(0, 0.02))
        kill_session(process)
        if Path(f"{output}.idx").exists():  # then the data set is whole
            assert content(output) == whole
            finished += 1
    output = tmp_path / f"out{finished}"
    last = job(output, workers)
    assert last.wait(600) == 0, last.stderr.read()
    assert content(output) == whole
    assert verify(output).documents == IndexedDataset(output).documents == DOCUMENTS
    assert {p.name for p in tmp_path.glob(f"{output.name}.*")} == {
        f"{output.name}{suffix}" for suffix in (".bin", ".idx", ".manifest.json")
    }


def test_a_killed_worker_is_named_and_its_job_can_be_finished(job, straight, tmp_path):
    process = job(tmp_path / "out", 2)
    wait_for(lambda: list((tmp_path / "out.parts").glob("*.json")) or process.poll() is not None)
    victims = [pid for pid in session(process.pid) if pid != process.pid and is_worker(pid)]
    assert victims, "no worker to kill"
    began = time.monotonic()
    os.kill(victims[-1], signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert time.monotonic() - began < 30
    assert process.returncode not in (0, None)
    assert "a worker process died" in said
    assert not list(tmp_path.glob("out.[bi]*"))
    assert not [pid for pid in session(process.pid) if is_worker(pid)]
    wait_for(lambda: not session(process.pid), 10)  # Python's own resource tracker leaves a moment later
    again = job(tmp_path / "out", 1)
    assert again.wait(600) == 0
    assert content(tmp_path / "out") == straight[0]


def is_worker(pid):
    """The pool's own processes, not Python's resource tracker."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has gone
        return False


def kill_session(process):
    """SIGKILL to the job; its workers leave by themselves."""
    process.kill()
    process.wait()
    process.stderr.close()
    wait_for(lambda: not session(process.pid))
