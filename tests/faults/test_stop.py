"""A stop on request: whoever is asked and whenever, all ranks save the same step and leave with 75."""

import signal
import time

import pytest
from jobs import ENDLESS, Job, send

pytestmark = pytest.mark.slow
LIMIT = 60  # seconds; the promise is 30 on a machine that is not shared


def _stopped_together(job, name):
    begin = time.monotonic()
    code = job.end(LIMIT)
    print(f"figure: {name}: ended after {time.monotonic() - begin:.1f} s")
    job.until_gone(name, 10)
    (checkpoint,) = job.checkpoints()
    assert int(checkpoint.removeprefix("step-")) == max(job.steps())
    return code


@pytest.mark.parametrize(
    ("target", "number"),
    [("first", signal.SIGTERM), ("last", signal.SIGUSR1), ("all", signal.SIGINT), ("all", signal.SIGHUP)],
)
def test_a_signal_to_ranks(target, number, tiny_recipe, tmp_path):
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS) as job:
        job.until_step(2)
        ranks = job.ranks()
        assert len(ranks) == 2
        send({"first": ranks[:1], "last": ranks[1:], "all": ranks}[target], number)
        assert _stopped_together(job, f"{number.name} to {target}") == 75
        assert f"on request ({number.name})" in job.output()


@pytest.mark.parametrize("last", [False, True])
def test_in_an_evaluation(last, tiny_recipe, metrics, tmp_path):
    """It is left at a batch, and made good for at the resume; where it is the last one, that is all the resume does."""
    fault = ("megatron_steel.train.evaluate", "to_device", "import time; time.sleep(2)")
    long = ("train.steps=2" if last else ENDLESS[0], ENDLESS[1], ENDLESS[3])
    long = (*long, "train.eval_every_steps=2", "train.eval_samples=200")
    with Job(tiny_recipe, tmp_path / "run", *long, fault=fault) as job:
        job.until_step(2)
        send(job.ranks()[1:])
        assert _stopped_together(job, "SIGTERM in an evaluation") == 75
        assert ("that is made at the next start" in job.output()) == last
    assert max(metrics(tmp_path / "run")) == 2
    assert "validation_loss" not in metrics(tmp_path / "run")[2]
    again = long if last else (*long, "train.steps=3")
    with Job(tiny_recipe, tmp_path / "run", *again) as job:
        assert job.end() == 0, job.output()[-4000:]
    found = metrics(tmp_path / "run")
    assert max(found) == (2 if last else 3)
    with Job(tiny_recipe, tmp_path / "other", *again) as job:
        assert job.end() == 0, job.output()[-4000:]
    assert found[2]["validation_loss"] == metrics(tmp_path / "other")[2]["validation_loss"]
    with Job(tiny_recipe, tmp_path / "run", *again) as job:
        assert job.end() == 0, job.output()[-4000:]
        assert "nothing to do" in job.output()


def test_while_one_rank_scans_and_the_other_waits(tiny_recipe, tmp_path):
    """The waiting rank's main thread is inside a collective call, where no Python handler runs."""
    slow = "import time; rank == 0 and (print('scanning now', flush=True), time.sleep(600))"
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, fault=("megatron_steel.data.manifest", "trust", slow)) as job:
        job.until_said("scanning now")
        send(job.ranks()[1:])
        assert job.end(LIMIT) == 75
        job.until_gone("SIGTERM to a waiting rank", 10)
        assert "nothing to save" in job.output()
        assert not (tmp_path / "run").exists()


def test_supervised_while_a_rank_scans(tiny_recipe, tmp_path):
    slow = "import time; rank == 0 and (print('scanning now', flush=True), time.sleep(600))"
    fault = ("megatron_steel.data.manifest", "trust", slow)
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, supervised=True, fault=fault) as job:
        job.until_said("scanning now")
        send([job.process], signal.SIGUSR1)
        assert job.end(LIMIT) == 75
        job.until_gone("SIGUSR1 to the supervisor in a scan", 10)


def test_in_a_save(tiny_recipe, tmp_path):
    """The save is finished, and no further step is done."""
    slow = "import time; print('saving now', flush=True); time.sleep(4)"
    fault = ("megatron_steel.train.state", "save", slow)
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, "train.save_every_steps=3", fault=fault) as job:
        job.until_said("saving now")
        send(job.ranks()[:1])
        assert _stopped_together(job, "SIGTERM in a save") == 75
        assert max(job.steps()) == 3


def test_while_the_model_is_built(tiny_recipe, tmp_path):
    slow = "import time; print('building now', flush=True); time.sleep(600)"
    fault = ("megatron_steel.train.engine", "start_engine", slow)
    with Job(tiny_recipe, tmp_path / "run", *ENDLESS, fault=fault) as job:
        job.until_said("building now")
        send(job.ranks()[:1])
        assert job.end(LIMIT) == 75
        job.until_gone("SIGTERM while building", 10)
