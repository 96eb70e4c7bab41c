"""One job on two nodes: real ssh, real launchers, and a node that is lost on the way."""

import json
import signal

import pytest
from jobs import Job, curve, send
from nodes import Nodes, lacking

pytestmark = [pytest.mark.multihost, pytest.mark.slow]
LOOP = "megatron_steel.train.loop"
WHOLE = ("train.steps=30", "train.save_every_steps=8", "train.eval_every_steps=10", "schedule.name=constant")
SLOW_STEP = "import time; time.sleep(0.3)"


def _history(run):
    return [json.loads(line) for line in (run / "launches.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def straight(launch, tiny_recipe, tmp_path_factory):
    """The run on one machine that nobody disturbs."""
    run = tmp_path_factory.mktemp("straight") / "run"
    launch(2, tiny_recipe, f"run.dir={run}", *WHOLE)
    return run


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    if reason := lacking():
        pytest.skip(reason)
    with Nodes(tmp_path_factory.mktemp("nodes") / "here") as made:
        yield made


def test_two_nodes_lose_one_stop_and_go_on_bitwise(nodes, straight, tiny_recipe, metrics, tmp_path):
    """The second node loses its ssh session and its rank at once; the job is started again on both; later it is stopped."""
    run = tmp_path / "run"
    with Job(tiny_recipe, run, *WHOLE, nodes=nodes, fault=(LOOP, "train_step", SLOW_STEP)) as job:
        job.until_step(10)
        sessions = nodes.sessions(1)
        assert sessions
        assert {r["host"] for r in (json.loads(f.read_text()) for f in run.glob(".launch-*/rank-*.json"))}
        lost = [p for p in nodes.below(1) if p.pid not in {s.pid for s in sessions}]
        assert any("megatron_steel.pretrain" in p.cmdline() for p in lost)
        send([*sessions, *lost], signal.SIGKILL)
        job.until_said("starting again in")
        job.until_step(20)
        send([job.process])
        assert job.end(90) == 75, job.output()[-4000:]
        job.until_gone("SIGTERM to the supervisor of two nodes", 10)
        assert not nodes.below(0) + nodes.below(1)
    text = job.output()
    assert f"the launcher on {nodes.hosts[1]} ended with" in text
    stopped = max(metrics(run))
    assert 20 <= stopped < 30
    with Job(tiny_recipe, run, *WHOLE, nodes=nodes) as job:
        assert job.end() == 0, job.output()[-4000:]
    assert curve(metrics(run)) == curve(metrics(straight))
    assert [(line["exit_code"], line["step"] >= 8) for line in _history(run)] == [(70, True), (75, True), (0, True)]
    assert not list(run.glob(".launch-*"))
    assert not nodes.below(0) + nodes.below(1)
