"""fp16 with a dynamic loss scale: what DeepSpeed is told, where it is refused, and what overflows do to a run.

DeepSpeed declines fp16 on CPUs without fast instructions for it; torch computes it all the same, so the runs here
let it pass and are otherwise real.
"""

import shutil

import pytest

from megatron_steel import cli
from megatron_steel.checkpoint.commit import name_of
from megatron_steel.errors import SteelError
from megatron_steel.recipe import load_recipe
from megatron_steel.train import engine as engines

FP16 = ["train.precision=fp16", "deepspeed.config=zero1.json"]
FP16_NOISE = 5e-3  # loss, against fp32 over six steps


@pytest.fixture
def train(tiny_recipe, metrics, tmp_path):
    """train(name, *overrides): a run in this process; returns its metrics."""

    def run(name: str, *overrides: str, expect: int = 0) -> dict[int, dict]:
        assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={tmp_path / name}", *overrides]) == expect
        return metrics(tmp_path / name) if (tmp_path / name).exists() else {}

    return run


@pytest.fixture
def half_on_cpu(monkeypatch):
    """half_on_cpu(scale): fp16 passes on this CPU; a scale given is the loss scale that runs begin with."""
    import deepspeed.accelerator

    monkeypatch.setattr(deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(engines, "refuse_precision", lambda precision, device: None)
    start = engines.start_engine

    def begin_with(scale: float) -> None:
        def started(*arguments):
            engine = start(*arguments)
            engine.optimizer.cur_scale = scale
            return engine

        monkeypatch.setattr(engines, "start_engine", started)

    return begin_with


def _losses(rows):
    return [rows[step]["loss"] for step in sorted(rows)]


@pytest.mark.parametrize(("precision", "clip"), [("fp32", 1.0), ("bf16", 1.0), ("fp16", 1.0)])
def test_deepspeed_is_told_one_precision(precision, clip):
    config = engines.engine_config(
        load_recipe("tiny", [f"train.precision={precision}"]), engines.read_config("zero1.json"), 2
    )
    assert {key for key in ("bf16", "fp16") if key in config} == {precision} - {"fp32"}
    assert config.get(precision, {"enabled": True}) == {"enabled": True}
    assert config["gradient_clipping"] == clip
    assert ("data_types" in config) == (precision != "fp32")


def test_where_fp16_cannot_train_it_is_refused(train, capsys):
    train("cpu", *FP16, expect=78)
    assert "fp16 with a loss scale needs a GPU" in capsys.readouterr().err
    with pytest.raises(SteelError, match="adds up gradients in fp16") as caught:
        engines.engine_config(load_recipe("tiny", ["train.precision=fp16"]), engines.read_config("zero0.json"), 1)
    assert "zero1.json" in caught.value.remedy


@pytest.mark.parametrize("file", ["zero1.json", pytest.param("zero3.json", marks=pytest.mark.slow)])
def test_fp16_trains_as_fp32_does_and_resumes_bitwise(file, train, half_on_cpu, tmp_path):
    half_on_cpu(2.0**10)
    words = [*FP16, f"deepspeed.config={file}"]
    straight = train("straight", *words)
    plain = train("plain", f"deepspeed.config={file}")  # a ZeRO-3 engine changes torch.nn.functional.linear for good
    difference = max(abs(a - b) for a, b in zip(_losses(straight), _losses(plain), strict=True))
    print(f"fp16 with {file} against fp32: {difference:.1e}")
    assert 0 < difference <= FP16_NOISE
    for figure in ("grad_norm", "expert_gradient_min", "expert_gradient_max"):  # the scale is taken out again
        assert straight[1][figure] == pytest.approx(plain[1][figure], rel=1e-2)
    assert {row["loss_scale"] for row in straight.values()} == {2.0**10}
    assert "loss_scale" not in plain[1]
    half_on_cpu(2.0**16)  # a resumed run takes the checkpoint's scale, not the one it began with
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / name_of(6))
    cut = train("cut", *words)
    assert _losses(cut) == _losses(straight)
    assert [row["loss_scale"] for row in cut.values()] == [row["loss_scale"] for row in straight.values()]


def test_an_overflow_costs_a_step_and_halves_the_scale_also_across_a_change_of_stage(train, half_on_cpu, tmp_path):
    half_on_cpu(2.0**24)
    rows = train("run", *FP16, "train.steps=9", "schedule.name=constant")
    skipped = [rows[step]["skipped_steps"] for step in sorted(rows)]
    scales = [rows[step]["loss_scale"] for step in sorted(rows)]
    print(skipped, scales)
    assert skipped[0] == 1  # 2^24 times any gradient is beyond fp16
    assert rows[1]["grad_norm"] is None  # it was no number
    assert rows[1]["loss"] == pytest.approx(rows[2]["loss"], abs=0.2)  # the loss itself is a number
    assert skipped[-1] == skipped[-2] < 9  # it has found its scale
    assert scales[-1] == 2.0 ** (24 - (skipped[-1] - 1))  # DeepSpeed's hysteresis lets the first one pass
    half_on_cpu(2.0**16)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / name_of(9))
    other = train("other", *FP16, "deepspeed.config=zero2.json", "train.steps=9", "schedule.name=constant")
    assert other[7]["loss_scale"] in (scales[5], scales[5] / 2)  # not the 2^16 that it began with
    assert other[7]["skipped_steps"] in (skipped[5], skipped[5] + 1)


@pytest.mark.gpu
def test_fp16_on_a_gpu_trains_as_fp32_does(train):
    rows, plain = train("half", *FP16, "train.steps=30"), train("plain", "train.precision=fp32", "train.steps=30")
    assert rows[30]["loss_scale"] >= 1
    assert rows[30]["skipped_steps"] < 10
    assert rows[30]["loss"] == pytest.approx(plain[30]["loss"], abs=0.1)
