"""A whole run with every choice of kernels a CPU has: the losses of the plain run, and the same figures of health."""

import shutil

import pytest
from conftest import finished, launch_command


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("sharding", ["zero1.json", "zero3.json"])
def test_a_compiled_run_on_two_ranks_is_the_plain_run(sharding, tiny_recipe, launch, metrics, tmp_path):
    """fp32, activation checkpointing, z-loss: losses within 1e-5, FFN shares within 1e-3."""
    common = ["train.precision=fp32", f"deepspeed.config={sharding}", "train.z_loss=1e-3",
              "train.activation_checkpointing=true", "train.log_every_steps=1"]  # fmt: skip
    chosen = ["kernels.compile=true", "kernels.attention=math"]
    launch(2, tiny_recipe, f"run.dir={tmp_path}/plain", "kernels.head=plain", *common)
    done = finished(launch_command(2, tiny_recipe, f"run.dir={tmp_path}/compiled", *chosen, *common), timeout=900)
    said = done.stdout + done.stderr
    assert "kernels: head chunked, attention sdpa (math), compiled layer by layer" in said
    plain, compiled = metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")
    assert list(plain) == list(compiled)
    for step, row in plain.items():
        assert compiled[step]["loss"] == pytest.approx(row["loss"], abs=1e-5)
        assert compiled[step]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
        for figure in ("ffn_share_min", "ffn_share_max"):
            assert compiled[step][figure] == pytest.approx(row[figure], rel=1e-3)
