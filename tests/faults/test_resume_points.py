"""Resumed equals uninterrupted, bitwise, from every step: losses, batches and weights, across the ends of epochs."""

import pytest
from stub_run import BATCH, curve

STEPS = 60
EPOCH = 101  # samples; 60 steps of 4 pass two epoch ends, neither on the edge of a batch


@pytest.fixture(scope="module")
def stub(stub_server):
    stub = stub_server.below("resume_points")
    return stub


@pytest.fixture(scope="module")
def golden(stub):
    """An uninterrupted run that keeps a checkpoint of every step."""
    stub.run(stub.root / "golden", steps=STEPS, save_every=1, keep_last=STEPS)
    rows = curve(stub.root / "golden")
    assert sorted(rows) == list(range(1, STEPS + 1))
    return rows


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_step_but_the_last_is_a_good_place_to_resume(stub, golden, every):
    ends = {EPOCH * epoch // BATCH + near for epoch in (1, 2) for near in (-1, 0, 1)}
    assert ends < set(range(1, STEPS))
    for step in sorted({*range(1, STEPS, every), *ends, STEPS - 1}):
        folder = stub.root / f"every-{every}-from-{step}"
        checkpoint = stub.root / "golden" / "checkpoints" / f"step-{step:08d}"
        stub.run(folder, steps=STEPS, save_every=STEPS, checkpoint=str(checkpoint))
        assert curve(folder) == {s: row for s, row in golden.items() if s > step}, step


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_with_deepspeed_for_a_sample(tiny_recipe, launch_many, metrics, tmp_path, ranks):
    """ZeRO-3 on the CPU, 12 steps with a checkpoint each; resumed after 1, 5, 6 and 11."""
    import shutil

    keys = ("loss", "grad_norm", "lr", "tokens", "samples")
    common = ["train.steps=12", "train.save_every_steps=1", "train.keep_last=12", "train.eval_every_steps=6"]
    straight = tmp_path / "straight"
    launch_many(ranks, tiny_recipe, [*common, f"run.dir={straight}"])
    resumed = [1, 5, 6, 11]
    for step in resumed:
        shutil.copytree(straight, tmp_path / f"from-{step}")
        for later in range(step + 1, 13):
            shutil.rmtree(tmp_path / f"from-{step}" / "checkpoints" / f"step-{later:08d}")
    launch_many(ranks, tiny_recipe, *[[*common, f"run.dir={tmp_path}/from-{step}"] for step in resumed])
    wanted = {s: [row.get(k) for k in keys] for s, row in metrics(straight).items()}
    for step in resumed:
        found = {s: [row.get(k) for k in keys] for s, row in metrics(tmp_path / f"from-{step}").items()}
        assert found == wanted, step
