"""What the host does between two kernels, on a real device: batches lie pinned, and nothing of ours waits in a step."""

import inspect
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture
def watched():
    """Warnings that torch gives where the host waits for the device."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield lambda: [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        torch.cuda.set_sync_debug_mode("default")


def test_a_number_on_its_way_holds_nobody_up(watched):
    import torch

    from megatron_steel.train.loop import on_its_way

    number = torch.full((), 2.5, dtype=torch.float64, device="cuda")
    arrived = on_its_way(number * 2)
    assert not watched()
    assert arrived() == 5.0
    float(number)  # the test can fail
    assert watched()


def test_batches_lie_in_pinned_memory(tiny_recipe):
    from megatron_steel import preflight
    from megatron_steel.data.loader import Loader
    from megatron_steel.recipe import load_recipe

    recipe = load_recipe(str(tiny_recipe))
    plan = preflight.plan_run(recipe)
    order = preflight.plan_order(recipe, plan.train, 3, None)
    with Loader(preflight.open_dataset(plan.train, order), order, 8, 2, pin=True) as loader:
        assert all(tensor.is_pinned() for batch in loader.step() for tensor in batch.values())


def test_a_step_that_is_not_logged_waits_for_nothing_of_ours(tiny_recipe, tmp_path, watched):
    """DeepSpeed looks at the gradient norm in each step, and waits for it; the loop adds nothing to that but in logging."""
    from megatron_steel import cli
    from megatron_steel.train import loop

    words = ["train.precision=bf16", "deepspeed.config=zero1.json", "data.validation=null", "train.log_every_steps=6"]
    assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={tmp_path}/run", *words]) == 0
    lines, first = inspect.getsourcelines(loop.log_step)
    logging = {f"train/loop.py:{first + n}" for n in range(len(lines))}
    waits = {"/".join(Path(w.filename).parts[-2:]) + f":{w.lineno}" for w in watched()}
    assert not [at for at in waits - logging if at.startswith(("train/loop.py", "data/loader.py", "train/watch.py"))]
