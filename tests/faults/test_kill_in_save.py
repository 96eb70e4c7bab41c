"""No kill loses a checkpoint: at every operation of a save, at random moments, with two ranks, and in a power cut.

Everything but the engine is the real thing (`stub_run`); the last test does the same with DeepSpeed.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from processes import session, wait_for
from stub_run import curve, starts

from megatron_steel.checkpoint import commit


@pytest.fixture(scope="module")
def stub(stub_server):
    stub = stub_server.below("kill_in_save")
    return stub


def newest(folder):
    found, passed_over = commit.newest_whole(Path(folder) / "checkpoints")
    assert passed_over == []  # what has a final name is whole
    return found.step if found else 0


SAVE = {"steps": 6, "save_every": 2, "keep_last": 1}  # checkpoints 2, 4 and 6; saving 6 deletes 2


@pytest.fixture(scope="module")
def golden(stub):
    stub.run(stub.root / "golden", **{**SAVE, "steps": 8})
    stub.run(stub.root / "again", **{**SAVE, "steps": 8})
    assert curve(stub.root / "golden") == curve(stub.root / "again")
    return curve(stub.root / "golden")


@pytest.fixture(scope="module")
def operations(stub):
    stub.run(stub.root / "count", **SAVE, kill={"step": 6, "how": {}})
    return json.loads((stub.root / "count" / "operations.json").read_text())


def test_a_save_does_what_it_promises_in_this_order(operations):
    first = {what: operations.index(next(o for o in operations if o.startswith(what))) for what in (
        "mkdir .step-00000006.tmp", "write zero_pp", "fsync zero_pp", "open manifest", "fsync manifest",
        "fsync .step-00000006.tmp", "rename .step-00000006.tmp", "fsync checkpoints", "rename step-00000002", "unlink",
    )}  # fmt: skip
    assert list(first.values()) == sorted(first.values())
    assert len(operations) >= 25
    assert not [o for o in operations if "step-00000004" in o]  # the previous one is not touched


# A kill leaves what was done; a power cut also loses half of every file that was not synced, and what was renamed.
@pytest.mark.parametrize(
    ("power", "every"),
    [(None, 1), ("renames", 3), *(pytest.param(power, 1, marks=pytest.mark.slow) for power in ("renames", "files"))],
)
def test_a_kill_at_every_operation_of_a_save(stub, golden, operations, power, every):
    renamed = next(i for i, o in enumerate(operations, 1) if o.startswith("rename .step-00000006.tmp"))
    lasting = renamed if power != "renames" else operations.index("fsync checkpoints") + 1
    for at in range(1, len(operations) + 1, every):
        folder = stub.root / f"kill-{power}-{every}-{at}"
        stub.run(folder, -signal.SIGKILL, **SAVE, kill={"step": 6, "how": {"at": at, "power": power}})
        assert newest(folder) == (6 if at > lasting else 4), operations[at - 1]
        commit.verify(folder / "checkpoints" / "step-00000004")
        stub.run(folder, **{**SAVE, "steps": 8})
        assert curve(folder) == golden
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
        shutil.rmtree(folder)


@pytest.mark.parametrize(("kills", "in_saves"), [(10, 4), pytest.param(50, 20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(stub, kills, in_saves, record_property):
    """Half of the kills aim at a save. Reported: how many hit one, and the work lost in steps."""
    every, ballast = 5, 2_000_000  # 8 MB: a save takes long enough to be hit
    folder, aim = stub.root / f"random-{kills}", random.Random(kills)
    done = hits = had = 0
    lost = []
    folder.mkdir(parents=True)
    saves = folder / "saves.txt"
    saves.touch()
    while done < kills or hits < in_saves:
        assert done < 6 * kills, f"only {hits} of {done} kills hit a save"
        seen = saves.stat().st_size
        pid = stub.start(folder, steps=10**6, save_every=every, ballast=ballast, pace=0.002)
        if aim.random() < 0.6:
            wait_for(lambda seen=seen: saves.stat().st_size > seen + aim.randrange(1, 40))
            time.sleep(aim.uniform(0, 0.06))
        else:
            time.sleep(aim.uniform(0.1, 0.8))
        os.kill(pid, signal.SIGKILL)
        assert stub.wait(pid) == -signal.SIGKILL
        done += 1
        hits += saves.read_text().endswith("begins\n")
        reached = max(curve(folder), default=0) if (folder / "curve-0.jsonl").exists() else 0
        now = newest(folder)
        assert now >= had  # no checkpoint is ever lost
        assert reached - now <= every
        had, lost = now, [*lost, reached - now]
    end = had + 7
    stub.run(folder, steps=end, save_every=every, ballast=ballast)
    stub.run(stub.root / f"straight-{kills}", steps=end, save_every=10**6, ballast=ballast)
    assert curve(folder) == curve(stub.root / f"straight-{kills}")
    report = (
        f"{done} kills, {hits} inside a save, 0 checkpoints lost, at most {max(lost)} steps of work lost, {end} steps"
    )
    record_property("kills", report)
    print(report)
    shutil.rmtree(folder)


def test_a_slow_rank_and_a_rank_that_dies_meanwhile(stub):
    """Rank 0 has written its part and waits for rank 1: nothing names the new checkpoint before rank 1 is done."""
    folder, straight = stub.root / "slow", stub.root / "slow-straight"
    finish(stub, stub.start_ranks(folder, 2, steps=5))
    first, second = stub.start_ranks(folder, 2, steps=10, slow={"1": 2})
    aside = folder / "checkpoints" / ".step-00000010.tmp"
    wait_for(lambda: (aside / "zero_to_fp32.py").exists())  # the last thing that rank 0 writes
    assert not list(aside.glob("engine/zero_pp_rank_1*"))
    os.kill(first, signal.SIGKILL)
    assert stub.wait(first) == -signal.SIGKILL
    assert stub.wait(second) not in (0, 75, 78)
    assert newest(folder) == 5
    finish(stub, stub.start_ranks(folder, 2, steps=12))
    finish(stub, stub.start_ranks(straight, 2, steps=12))
    for rank in (0, 1):
        assert starts(folder, rank) == [0, 5, 5]
        assert curve(folder, rank) == curve(straight, rank)


@pytest.mark.slow
def test_one_of_two_ranks_dies_at_every_operation_of_a_save(stub):
    finish(stub, stub.start_ranks(stub.root / "two", 2, **{**SAVE, "steps": 8}))
    golden = [curve(stub.root / "two", rank) for rank in (0, 1)]
    for victim in (0, 1):
        count = stub.root / f"two-count-{victim}"
        finish(stub, stub.start_ranks(count, 2, **SAVE, kill={"step": 6, "rank": victim, "how": {}}))
        operations = json.loads((count / "operations.json").read_text())
        for at in range(1, len(operations) + 1):
            folder = stub.root / f"two-{victim}-{at}"
            pids = stub.start_ranks(folder, 2, **SAVE, kill={"step": 6, "rank": victim, "how": {"at": at}})
            assert stub.wait(pids[victim]) == -signal.SIGKILL
            os.kill(pids[1 - victim], signal.SIGKILL)  # as the launcher does
            stub.wait(pids[1 - victim])
            assert newest(folder) in (4, 6)
            commit.verify(folder / "checkpoints" / "step-00000004")
            finish(stub, stub.start_ranks(folder, 2, **{**SAVE, "steps": 8}))
            assert [curve(folder, rank) for rank in (0, 1)] == golden
            shutil.rmtree(folder)


def test_a_second_job_is_refused_and_a_dead_ones_lock_is_taken_over(stub):
    folder = stub.root / "locked"
    pid = stub.start(folder, steps=10**6, pace=0.01)
    wait_for(lambda: (folder / "run.lock").exists() and (folder / "run.lock").read_text())
    stub.run(folder, 78, steps=10**6)
    assert f"another job trains in this folder (process {pid} " in (folder / "log.txt").read_text()
    wait_for(lambda: newest(folder))
    os.kill(pid, signal.SIGKILL)
    stub.wait(pid)
    reached = newest(folder)
    stub.run(folder, steps=reached + 1)
    assert starts(folder) == [0, reached]


def test_every_nth_checkpoint_stays(stub):
    folder = stub.root / "nth"
    stub.run(folder, steps=13, save_every=1, keep_last=2, keep_every=4)
    assert [int(p.name[5:]) for p in commit.published(folder / "checkpoints")] == [4, 8, 12, 13]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_in_deepspeeds_own_saves(tiny_recipe, metrics, launch, tmp_path, ranks):
    """The launcher, the ranks and DeepSpeed's files, killed at random moments of a save."""
    import subprocess

    from conftest import launch_command, one_thread

    arguments = (tiny_recipe, "train.steps=16", "train.save_every_steps=2", "train.eval_every_steps=100")
    launch(ranks, *arguments, f"run.dir={tmp_path}/straight")
    run, aim, hits = tmp_path / "run", random.Random(ranks), 0
    checkpoints = run / "checkpoints"
    for _ in range(3):
        before = newest(run)
        process = subprocess.Popen(launch_command(ranks, *arguments, f"run.dir={run}"), env=one_thread(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        wait_for(lambda before=before: newest_name(checkpoints) > before, 200)  # one more than before
        ended = process.poll
        wait_for(lambda ended=ended: list(checkpoints.glob(".step-*.tmp")) or ended() is not None)
        time.sleep(aim.uniform(0, 0.05))
        assert process.poll() is None, "it was done before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda process=process: not session(process.pid))
        hits += bool(list(checkpoints.glob(".step-*.tmp")))
        assert newest(run) > before
    launch(ranks, *arguments, f"run.dir={run}")
    straight, resumed = metrics(tmp_path / "straight"), metrics(run)
    keys = ("loss", "grad_norm", "lr", "tokens", "samples")
    assert {s: [r[k] for k in keys] for s, r in resumed.items()} == {
        s: [r[k] for k in keys] for s, r in straight.items()
    }
    print(f"{hits} of 3 kills hit a save")


def newest_name(checkpoints):
    return max((int(p.name[5:]) for p in commit.published(checkpoints)), default=0)


def finish(stub, pids):
    assert [stub.wait(pid) for pid in pids] == [0] * len(pids)
