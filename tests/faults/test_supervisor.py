"""`megatron-steel launch`: restarts, truthful exit codes, no orphans; the real launcher throughout."""

import json
import signal
import socket

import pytest
from jobs import ENDLESS, Job, curve, send

SLOW_STEP = "import time; time.sleep(0.3)"
LOOP = "megatron_steel.train.loop"
WHOLE = ("train.steps=30", "train.save_every_steps=8", "train.eval_every_steps=10", "schedule.name=constant")


def _history(run):
    return [json.loads(line) for line in (run / "launches.jsonl").read_text(encoding="utf-8").splitlines()]


def test_stopped_gone_on_failed_and_restarted_is_bitwise_the_undisturbed_run(tiny_recipe, launch, metrics, tmp_path):
    """SIGTERM to the supervisor: 75. The same command again: rank 1 fails once, the job is started again: 0."""
    launch(2, tiny_recipe, f"run.dir={tmp_path}/straight", *WHOLE)
    run = tmp_path / "run"
    with Job(tiny_recipe, run, *WHOLE, supervised=True, fault=(LOOP, "train_step", SLOW_STEP)) as job:
        job.until_step(3)
        send([job.process])
        assert job.end(60) == 75, job.output()[-4000:]
        job.until_gone("SIGTERM to the supervisor", 10)
        assert "every rank saves" in job.output()
    stopped = max(metrics(run))
    assert 3 <= stopped < 24
    assert (run / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()
    fail_once = f"""
import pathlib
mark = pathlib.Path({str(tmp_path / "failed")!r})
if rank == 1 and args[0].step == 27 and not mark.exists():
    mark.touch()
    raise RuntimeError("this rank was told to fail")
"""
    with Job(tiny_recipe, run, *WHOLE, supervised=True, fault=(LOOP, "train_step", fail_once)) as job:
        assert job.end() == 0, job.output()[-6000:]
        text = job.output()
    assert "failed first: RuntimeError: this rank was told to fail" in text
    assert '    |   File "' in text  # its traceback, in the supervisor's one message
    assert "from step-00000024" in text
    assert curve(metrics(run)) == curve(metrics(tmp_path / "straight"))
    assert [(line["exit_code"], line["step"]) for line in _history(run)] == [(75, stopped), (70, 26), (0, 30)]
    assert not list(run.glob(".launch-*"))
    assert not (run / "stacks").exists()


def test_a_killed_launcher_leaves_no_orphan_and_loses_no_step(tiny_recipe, metrics, tmp_path):
    """SIGKILL of `deepspeed` signals nobody: the ranks notice, save and go."""
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS) as job:
        job.until_step(2)
        job.runner().kill()
        job.until_gone("SIGKILL of deepspeed", 30)
        (name,) = job.checkpoints()
        assert int(name.removeprefix("step-")) == max(job.steps())
        assert "the launcher has died" in job.output()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number", "code"),
    [("runner", signal.SIGTERM, -15), ("node_launcher", signal.SIGKILL, 0), ("node_launcher", signal.SIGTERM, 1)],
)
def test_bare_launcher_dies_at_other_places(victim, number, code, tiny_recipe, tmp_path):
    """What `deepspeed` itself returns is its own: 0 for a dead job where its node launcher was killed."""
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS) as job:
        job.until_step(2)
        send([getattr(job, victim)()], number)
        job.until_gone(f"{number.name} to {victim}", 30)
        assert job.end() == code
        assert len(job.checkpoints()) == 1


@pytest.mark.slow
def test_a_killed_supervisor_leaves_no_orphan_and_loses_no_step(tiny_recipe, tmp_path):
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, supervised=True) as job:
        job.until_step(2)
        job.process.kill()
        job.until_gone("SIGKILL of the supervisor", 30)
        assert len(job.checkpoints()) == 1
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, supervised=True) as job:  # takes over what the dead one left
        job.until_step(max(job.steps()) + 1)
        assert len(list((tmp_path / "run").glob(".launch-*"))) == 1
        send([job.process], signal.SIGINT)
        assert job.end(60) == 75


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "node_launcher", "runner"])
def test_whatever_is_killed_the_supervisor_goes_on(victim, tiny_recipe, tmp_path):
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, "train.save_every_steps=2", supervised=True) as job:
        job.until_step(4)
        before = job.ranks()
        (before[1] if victim == "rank" else getattr(job, victim)()).kill()
        took = job.until(lambda: not any(p.is_running() for p in before), "the old ranks end", 30)
        print(f"figure: SIGKILL of {victim}: 0 old ranks after {took:.1f} s")
        job.until_said("starting again in")
        reached = max(job.steps())
        job.until_step(reached + 2)
        send([job.process])
        assert job.end(60) == 75
        expected = {"rank": "was killed without a word; the launcher ended with",
                    "node_launcher": "the launcher ended with exit code 0 while the run went on",
                    "runner": "the launcher ended with SIGKILL (exit code -9) while the run went on"}  # fmt: skip
        assert expected[victim] in job.output()


@pytest.mark.slow
def test_the_same_failure_three_times_at_the_same_step_ends_with_78(tiny_recipe, tmp_path):
    fault = "if rank == 1 and args[0].step == 3: raise ValueError('always at 3, number %d' % __import__('os').getpid())"
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, supervised=True, fault=(LOOP, "train_step", fault)) as job:
        assert job.end(1200) == 78
        text = job.output()
    assert text.count("starting again in") == 2
    assert "the run failed 3 times after step 2: rank 1" in text
    assert "ValueError: always at 3" in text
    assert not job.alive()


@pytest.mark.slow
def test_bad_configuration_and_bad_data_end_at_once(tiny_recipe, tiny_data, tmp_path):
    for name, override, says in (
        ("config", "optim.lrr=1", "did you mean optim.lr?"),
        ("data", f"data.train={tiny_data}/none", "none"),
    ):
        with Job(tiny_recipe, tmp_path / name, override, supervised=True) as job:
            assert job.end() == 78
            assert says in job.output()
            assert "starting again" not in job.output()
            assert not (tmp_path / name).exists()


@pytest.mark.slow
def test_a_stop_between_two_starts(tiny_recipe, tmp_path):
    fault = "raise RuntimeError('no step at all, %d' % __import__('time').time_ns())"
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, supervised=True, fault=(LOOP, "train_step", fault)) as job:
        job.until_said("starting again in 3 s", 800)
        send([job.process])
        assert job.end(60) == 75


@pytest.mark.slow
def test_an_exception_on_one_rank_under_the_bare_launcher(tiny_recipe, tmp_path):
    fault = "if rank == 1 and args[0].step == 3: raise RuntimeError('only here')"
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, fault=(LOOP, "train_step", fault)) as job:
        job.until_said("only here")
        job.until_gone("exception on rank 1", 30)
        assert job.end() == 70
        assert "RuntimeError: only here" in job.output()


@pytest.mark.slow
def test_a_port_in_use_is_named(tiny_recipe, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with Job(tiny_recipe, tmp_path / "run", *ENDLESS, port=taken.getsockname()[1]) as job:
            job.until_said("is in use")
            job.until_gone("port in use", 30)
            assert job.end() == 70
