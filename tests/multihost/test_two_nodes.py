"""One job on two nodes: real ssh, real launchers, and a node that is lost on the way."""

import json
import os
import shutil
import signal
import time

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


@pytest.fixture(autouse=True)
def _here():
    if reason := lacking():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with Nodes(tmp_path_factory.mktemp("nodes") / "here") as made:
        yield made


def test_two_nodes_lose_one_stop_and_go_on_bitwise(nodes, straight, tiny_recipe, metrics, tmp_path):
    """The second node loses its ssh session and its rank at once; the job is started again on both; later it is stopped."""
    run = tmp_path / "run"
    with Job(tiny_recipe, run, *WHOLE, nodes=nodes, fault=(LOOP, "train_step", SLOW_STEP)) as job:
        job.until_step(10)
        sessions = nodes.sessions(1)
        assert sessions
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


# In the supervisor: a lost node is given up after 20 seconds. In a rank: a slow step.
IMPATIENT = """
import sys, time
if "launch" in sys.argv:
    import megatron_steel.hosts
    megatron_steel.hosts._RETURNS_IN = 20.0
elif any(word.startswith("--reports=") for word in sys.argv):
    from megatron_steel.train import loop
    step = loop.train_step
    loop.train_step = lambda *words: (time.sleep(0.3), step(*words))[1]
"""


@pytest.mark.parametrize("returns", [True, False])
def test_a_node_that_is_cut_off(returns, straight, tiny_recipe, metrics, tmp_path):
    """It ends its part by itself. Back in time it takes part again, bitwise; else the job goes on without it."""
    if reason := lacking(namespaces=True):
        pytest.skip(reason)
    run = tmp_path / "run"
    fault = ("megatron_steel.dist", "set_up_logging", IMPATIENT)
    with Nodes(tmp_path / "nodes", namespaces=True) as nodes:
        with Job(tiny_recipe, run, *WHOLE, nodes=nodes, fault=fault) as job:
            job.until_step(10)
            there = [p for p in nodes.below(1) if "megatron_steel.pretrain" in p.cmdline()]
            nodes.network(1, "down")
            begin = time.monotonic()
            job.until(lambda: not any(p.is_running() for p in there), "the node that was cut off ends its part", 240)
            print(f"figure: cut off: 0 processes there after {time.monotonic() - begin:.1f} s")
            if returns:
                job.until_said("waiting for 1 lost nodes")
                nodes.network(1, "up")
            assert job.end(600) == 0, job.output()[-4000:]
            print(f"figure: cut off, returns={returns}: complete after {time.monotonic() - begin:.1f} s")
        assert not nodes.below(0)
    assert ("going on with 1 of 2 nodes" in job.output()) is not returns
    there, here = curve(metrics(run)), curve(metrics(straight))
    if returns:
        assert there == here
    else:
        assert [row[2:5] for row in there.values()] == [row[2:5] for row in here.values()]  # the same batches
        assert max(abs(there[step][0] - here[step][0]) for step in here) < 1e-6


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts are root's")
def test_other_data_on_one_node_is_named_before_anything_is_built(tiny_recipe, tiny_data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    (other / "train.manifest.json").unlink(missing_ok=True)
    content = bytearray((other / "train.bin").read_bytes())
    content[100] ^= 1
    (other / "train.bin").write_bytes(content)
    with (
        Nodes(tmp_path / "nodes", instead={tiny_data: other}) as two,
        Job(tiny_recipe, tmp_path / "run", *WHOLE, nodes=two) as job,
    ):
        assert job.end() == 78
    told = job.output()
    assert "the nodes are not equal" in told
    assert f"data.train, {tiny_data}/train: digest" in told
    assert "(rank 0)\n" in told
    assert "(rank 1)\n" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts are root's")
def test_a_run_folder_that_is_not_shared_is_named_before_anything_starts(tiny_recipe, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    fault = ("megatron_steel.dist", "set_up_logging", "import megatron_steel.hosts as h; h._SEES_IN = 3.0")
    with (
        Nodes(tmp_path / "nodes", instead={tmp_path / "runs": tmp_path / "elsewhere"}) as two,
        Job(tiny_recipe, tmp_path / "runs" / "run", *WHOLE, nodes=two, fault=fault) as job,
    ):
        assert job.end(120) == 78
    assert "127.0.0.3: it does not see what was written into" in job.output()
    assert "run.dir must lie on a disk that all nodes share" in job.output()
