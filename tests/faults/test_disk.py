"""Full, broken and read-only disks: older checkpoints stay, nothing partial is left, and the run does what it says.

Rule: an I/O error is tried again twice; a periodic save that still fails costs a loud message, and training goes on to
the next one; the third failure in a row, or that of the last save, ends the run with exit code 78.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from processes import wait_for
from stub_run import curve, starts

from megatron_steel.checkpoint import commit

SAVE = {"steps": 12, "save_every": 2}


@pytest.fixture(scope="module")
def stub(stub_server):
    stub = stub_server.below("disk")
    stub.run(stub.root / "golden", **SAVE)
    return stub


def said(folder):
    log = folder / "log.txt"
    return log.read_text() if log.exists() else ""


def steps(folder):
    found = [commit.verify(path).step for path in commit.published(folder / "checkpoints")]
    assert not list((folder / "checkpoints").glob(".*"))  # nothing partial, visible or not
    return found


@pytest.fixture(scope="module")
def operations(stub):
    """Those of the save at step 6 up to its publication; deleting an old one comes after."""
    stub.run(stub.root / "count", **SAVE, kill={"step": 6, "how": {}})
    found = json.loads((stub.root / "count" / "operations.json").read_text())
    return found[: found.index("fsync checkpoints") + 1]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_an_io_error_is_tried_again(stub, operations, every):
    """The n-th operation of a save fails once: the save succeeds at the second try, a second later."""
    pids = {}
    for at in range(1, len(operations) + 1, every):
        folder = stub.root / f"eio-{at}"
        pids[at] = stub.start(folder, **SAVE, kill={"step": 6, "how": {"at": at, "fails": errno.EIO}})
        if len(pids) % 4 == 0:  # not all at once
            stub.wait(pids[at])
            pids[at] = None
    for at, pid in pids.items():
        folder = stub.root / f"eio-{at}"
        assert pid is None or stub.wait(pid) == 0, said(folder)
        assert said(folder).count("trying again") == 1, operations[at - 1]
        assert "Input/output error" in said(folder)
        assert steps(folder) == [10, 12]
        assert curve(folder) == curve(stub.root / "golden")


def test_a_disk_that_stays_broken_costs_this_save_and_not_the_run(stub):
    folder = stub.root / "broken"
    stub.run(folder, **SAVE, kill={"step": 6, "how": {"at": 3, "fails": errno.EIO, "times": 10**9}})
    assert said(folder).count("trying again") == 2
    assert said(folder).count("NOT SAVED at step 6") == 1
    assert steps(folder) == [10, 12]
    assert curve(folder) == curve(stub.root / "golden")


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_what_another_try_cannot_mend_is_not_tried_again(stub, number):
    folder = stub.root / f"hopeless-{number}"
    stub.run(folder, 78, steps=6, save_every=2, kill={"step": 6, "how": {"at": 4, "fails": number}})
    assert "trying again" not in said(folder)
    assert os.strerror(number) in said(folder)
    assert "older checkpoints are untouched" in said(folder)
    assert steps(folder) == [2, 4]


@pytest.mark.parametrize(("number", "tries"), [(errno.ENOSPC, 0), (errno.EIO, 1)])
def test_one_rank_that_cannot_write_keeps_no_other_waiting(stub, number, tries):
    """Rank 1 fails before the barrier that ends the engine's save; both give this save up, or try again, together."""
    folder, how = stub.root / f"rank-{number}", {"at": 2, "fails": number}
    pids = stub.start_ranks(folder, 2, steps=8, save_every=2, kill={"step": 6, "rank": 1, "how": how})
    assert [stub.wait(pid) for pid in pids] == [0, 0]
    assert said(folder).count("trying again") == tries
    assert said(folder).count("NOT SAVED at step 6") == 1 - tries
    assert steps(folder) == ([6, 8] if tries else [4, 8])


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(stub, operations):
    folder = stub.root / "undeletable"
    at = len(operations) + 1
    stub.run(folder, steps=6, save_every=2, kill={"step": 6, "how": {"at": at, "fails": errno.EIO, "times": 10**9}})
    assert "an old checkpoint could not be deleted" in said(folder)
    assert steps(folder) == [2, 4, 6]


def test_a_run_ends_only_when_the_old_checkpoints_are_deleted(tiny_recipe, tmp_path):
    """Deleting lasts longer than what comes behind the last save."""
    from conftest import finished
    from jobs import INJECT

    fault = {"module": "megatron_steel.checkpoint.commit", "function": "delete", "code": "import time; time.sleep(6)"}
    paths = os.pathsep.join(filter(None, [str(INJECT), os.environ.get("PYTHONPATH")]))
    words = [f"run.dir={tmp_path}/run", "train.steps=3", "train.save_every_steps=1", "train.keep_last=2"]
    command = [sys.executable, "-m", "megatron_steel.pretrain", str(tiny_recipe), *words]
    finished(["env", f"FAULT={json.dumps(fault)}", f"PYTHONPATH={paths}", *command])
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000002", "step-00000003"]


def test_files_that_may_not_grow_that_far(stub):
    """RLIMIT_FSIZE stands for a quota. Three failures in a row end the run; the checkpoints before stay."""
    folder = stub.root / "limit"
    stub.run(folder, steps=4, save_every=2, ballast=50_000)
    stub.run(folder, 78, steps=100, save_every=2, ballast=50_000, largest_file=100_000)
    assert [said(folder).count(f"NOT SAVED at step {step}") for step in (6, 8, 10, 12)] == [1, 1, 0, 0]
    assert "error: the checkpoint could not be written: File too large" in said(folder)
    assert steps(folder) == [2, 4]
    stub.run(folder, steps=12, save_every=2, ballast=50_000)
    assert starts(folder) == [0, 4, 4]
    assert steps(folder) == [10, 12]


@contextlib.contextmanager
def small_disk(folder, size):
    """A tmpfs of `size` bytes."""
    folder.mkdir(parents=True)
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_foretold_and_survived(stub):
    """Room for two checkpoints and a half: the third cannot be written until somebody makes room."""
    folder = stub.root / "full"
    with small_disk(folder, 2_600_000):
        filler = folder / "filler"
        filler.write_bytes(bytes(500_000))
        pid = stub.start(folder, steps=12, save_every=2, ballast=200_000, pace=0.15)
        wait_for(lambda: "NOT SAVED at step 6" in said(folder))
        assert steps(folder) == [2, 4]  # before it is written anywhere
        filler.unlink()
        assert stub.wait(pid) == 0, said(folder)
        assert steps(folder) == [10, 12]
        text = said(folder)
        assert text.index("the disk is nearly full: a checkpoint takes 0.00 GiB (8") < text.index("NOT SAVED at step 6")
        needs, free = (int(n.replace(",", "")) for n in re.search(
            r"it needs \S+ GiB \(([\d,]+) bytes\), \S+ GiB \(([\d,]+) bytes\) are free", text).groups())  # fmt: skip
        assert 800_000 < needs < 1_000_000
        assert free < needs
        assert curve(folder) == curve_of_straight(stub, ballast=200_000)


def test_a_disk_that_fills_up_in_the_middle_of_a_write(stub):
    """The estimate was too low (there is no checkpoint yet): the write itself fails, and what it left is cleared."""
    folder = stub.root / "first"
    with small_disk(folder, 600_000):
        stub.run(folder, 78, steps=12, save_every=2, ballast=200_000)
        assert "No space left on device" in said(folder)
        assert steps(folder) == []
        assert shutil.disk_usage(folder).free > 500_000


def test_a_disk_that_turns_read_only(stub):
    folder = stub.root / "readonly"
    with small_disk(folder, 50_000_000):
        disk = folder / "checkpoints"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50000000", "none", disk], check=True)
        try:
            stub.run(folder, steps=4, save_every=2)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            stub.run(folder, 78, steps=20, save_every=2)
            assert "Read-only file system" in said(folder)
            assert said(folder).count("NOT SAVED") == 2
            assert steps(folder) == [2, 4]
        finally:
            subprocess.run(["umount", "-l", disk], check=True)


def curve_of_straight(stub, **job):
    stub.run(stub.root / "straight", steps=12, save_every=12, **job)
    return curve(stub.root / "straight")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "limit"), [("zero3.json", 40_000), ("zero0.json", 40_000)])
def test_deepspeed_on_two_ranks(tiny_recipe, launch, metrics, tmp_path, stage, limit):
    """Both ranks, or one alone, cannot write: nobody waits for the other for ever, and all leave with 78."""
    import resource

    from conftest import finished, launch_command

    run = tmp_path / "run"
    arguments = (tiny_recipe, f"run.dir={run}", f"deepspeed.config={stage}", "train.save_every_steps=2")
    launch(2, *arguments, "train.steps=2", "schedule.name=constant")
    sizes = {p.name: p.stat().st_size for p in (run / "checkpoints/step-00000002/engine").iterdir()}
    large = sorted(name for name, size in sizes.items() if size > limit)
    assert len(large) == (2 if stage == "zero3.json" else 1), sizes  # without sharding one file, by rank 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        # A rank that waited for the other would wait 30 minutes: `finished` gives up long before.
        done = finished(launch_command(2, *arguments, "train.steps=20", "schedule.name=constant"), 78)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (done.stdout + done.stderr).count("NOT SAVED at step") == 2
    assert steps(run) == [2]
    launch(2, *arguments, "train.steps=4", "schedule.name=constant")
    assert steps(run) == [2, 4]
