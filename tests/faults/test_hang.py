"""A job that makes no progress writes its stacks and ends with 70; nothing but the rendezvous listens."""

import signal
import time

import psutil
import pytest
from jobs import ENDLESS, Job, send

pytestmark = pytest.mark.slow
LIMIT = 20  # train.hang_after_seconds here: far above a step on a crowded machine


def _stacks(run, rank):
    return (run / "stacks" / f"rank-{rank:05d}.txt").read_text(encoding="utf-8")


def test_a_stopped_rank(tiny_recipe, tmp_path):
    run = tmp_path / "run"
    with Job(tiny_recipe, run, *ENDLESS, f"train.hang_after_seconds={LIMIT}") as job:
        job.until_step(2)
        send(job.ranks()[1:], signal.SIGSTOP)
        begin = time.monotonic()
        job.until_said("no progress for", 2 * LIMIT)
        took = time.monotonic() - begin
        print(f"figure: SIGSTOP of rank 1: noticed after {took:.1f} s of {LIMIT}")
        assert took <= 1.2 * LIMIT + 2  # and two looks at the log
        assert job.end(60) == 70
        job.until_gone("hang", 30)
    assert "train_step" in _stacks(run, 0)
    assert "Current thread" in _stacks(run, 1) or "Thread 0x" in _stacks(run, 1)


def test_a_sleeping_rank_is_named_by_its_stack_and_the_supervisor_starts_again(tiny_recipe, tmp_path):
    run = tmp_path / "run"
    sleep = f"""
import pathlib, time
mark = pathlib.Path({str(tmp_path / "slept")!r})
if rank == 1 and args[0].step == 4 and not mark.exists():
    mark.touch()
    time.sleep(3600)
"""
    words = (*ENDLESS, "train.save_every_steps=2", f"train.hang_after_seconds={LIMIT}")
    with Job(
        tiny_recipe, run, *words, supervised=True, fault=("megatron_steel.train.loop", "train_step", sleep)
    ) as job:
        job.until_said("starting again in")
        job.until_step(5)
        assert "no progress for" in job.output()
        assert "sitecustomize" in _stacks(run, 1)  # where it sleeps
        send([job.process])
        assert job.end(60) == 75


def test_only_the_rendezvous_listens(tiny_recipe, tmp_path):
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, supervised=True) as job:
        job.until_step(2)
        listening = {
            p.pid: [c.laddr for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN] for p in job.alive()
        }
        print(f"figure: listening: {listening}")
        ranks = [p.pid for p in job.ranks()]
        port = int(next(w for w in job.node_launcher().cmdline() if w.startswith("--master_port=")).split("=")[1])
        open_to_all = {(pid, a.port) for pid, found in listening.items() for a in found if a.ip in ("::", "0.0.0.0")}
        assert open_to_all == {(ranks[0], port)}
        assert all(not found for pid, found in listening.items() if pid not in ranks)  # gloo: one address of the host
        send([job.process])
        assert job.end(60) == 75
