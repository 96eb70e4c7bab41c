"""Muon, Adafactor and learning-rate ratios in whole runs: equal to plain torch, resumed bitwise, refused where ZeRO spoils them."""

import shutil

import pytest
import torch
from plain_loop import MUON, MUON_NOISE, decayed, muon_and_adamw, plain_loop
from torch import nn
from transformers.optimization import Adafactor

from megatron_steel import cli
from megatron_steel.checkpoint.commit import name_of
from megatron_steel.errors import SteelError
from megatron_steel.recipe import Optim, load_recipe
from megatron_steel.train import engine, optimizer
from megatron_steel.train.elastic import Place

STEPS = 6
ADAFACTOR = ["optim.name=adafactor", "optim.lr=0.5", "deepspeed.config=zero0.json"]
NOISE = {"muon": MUON_NOISE, "adafactor": 2e-6}


@pytest.fixture
def train(tiny_recipe, metrics, tmp_path):
    """train(name, *overrides): a run in this process; returns its metrics."""

    def run(name: str, *overrides: str, expect: int = 0) -> dict[int, dict]:
        assert cli.main(["pretrain", str(tiny_recipe), f"run.dir={tmp_path / name}", *overrides]) == expect
        return metrics(tmp_path / name) if (tmp_path / name).exists() else {}

    return run


def _losses(rows):
    return [rows[step]["loss"] for step in sorted(rows)]


def _cut(source, target, step=3):
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / name_of(STEPS))
    assert [p.name for p in (target / "checkpoints").iterdir()] == [name_of(step)]


def _adafactor(model):
    return [(torch.optim.Adafactor(decayed(list(model.parameters())), lr=0.0, eps=(1e-18, 1e-3)), 0.5)]


PLAIN = {"muon": (MUON, muon_and_adamw), "adafactor": (ADAFACTOR, _adafactor)}


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_one_step_class_is_torch_s_two(adjust):
    """Over 20 steps, bitwise, on whole matrices (tall, wide, square) and the rest."""
    weights = []
    for ours in (True, False):
        generator = torch.Generator().manual_seed(3)
        new = [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((9, 4), (4, 9), (5, 5), (7,))]
        if ours:
            groups = [{"params": new[:3], "weight_decay": 0.1, "muon": True}, {"params": new[3:], "weight_decay": 0.0}]
            optim = Optim(lr=1.0, name="muon", muon_momentum=0.9, muon_adjust_lr_fn=adjust)
            one = optimizer.build("torch", groups, optim, "cpu", offload=False)
            one.lay_out([Place(str(i), p, 0, 0, p.numel()) for i, p in enumerate(new)],
                        {str(i): p.shape for i, p in enumerate(new)})  # fmt: skip
            both = [one]
        else:
            both = [torch.optim.Muon(new[:3], weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust),
                    torch.optim.AdamW(new[3:], betas=(0.9, 0.95), weight_decay=0.0, fused=True)]  # fmt: skip
        for step in range(20):
            for p in new:
                p.grad = torch.randn(p.shape, generator=generator)
            for each in both:
                for group in each.param_groups:
                    group["lr"] = 0.02 / (step + 1)
                each.step()
        weights.append(new)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_adafactor_is_the_paper_s_also_where_gradients_are_small(size):
    """Over 20 steps against transformers' Adafactor with an outer learning rate (its eps1 is the paper's, 1e-30)."""
    weights = []
    for ours in (True, False):
        generator = torch.Generator().manual_seed(3)
        new = [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((9, 4), (5, 5), (7,))]
        if ours:
            optim = Optim(lr=1.0, name="adafactor")
            one = optimizer.build("torch", [{"params": new, "weight_decay": 0.0}], optim, "cpu", offload=False)
        else:
            one = Adafactor(new, lr=1.0, scale_parameter=True, relative_step=False)
        for step in range(20):
            for p in new:
                p.grad = size * torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator)
            one.param_groups[0]["lr"] = 0.1 / (step + 1)
            one.step()
        weights.append(new)
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_one_rank_equals_plain_torch_and_resumes_bitwise(name, train, tiny_recipe, tmp_path):
    words, optimizers_of = PLAIN[name]
    plain, _ = plain_loop(load_recipe(str(tiny_recipe), words), STEPS, optimizers_of)
    assert plain[0] - plain[-1] > 0.3
    file = "zero1.json" if name == "muon" else "zero0.json"
    rows = train("straight", *words, f"deepspeed.config={file}")
    difference = max(abs(a - b) for a, b in zip(_losses(rows), plain, strict=True))
    print(f"{name} on one rank with {file}: {difference:.1e}")
    assert difference <= NOISE[name]
    _cut(tmp_path / "straight", tmp_path / "cut")
    assert _losses(train("cut", *words, f"deepspeed.config={file}")) == _losses(rows)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("file", ["zero0.json", "zero1.json", "zero2.json"])
def test_muon_resumes_bitwise_at_every_stage_that_it_knows(file, precision, train, tmp_path):
    words = [*MUON, f"deepspeed.config={file}", f"train.precision={precision}"]
    rows = train("straight", *words)
    assert _losses(rows)[0] - _losses(rows)[-1] > 0.3
    _cut(tmp_path / "straight", tmp_path / "cut")
    assert _losses(train("cut", *words)) == _losses(rows)


@pytest.fixture(scope="module")
def two_ranks(tiny_recipe, launch_many, tmp_path_factory):
    """Runs of two ranks, by name, and one that has been cut at step 3 and gone on."""
    folder = tmp_path_factory.mktemp("two")
    kinds = {"muon-zero1": [*MUON, "deepspeed.config=zero1.json"], "muon-zero2": [*MUON, "deepspeed.config=zero2.json"],
             "adafactor-zero0": ADAFACTOR}  # fmt: skip
    launch_many(2, tiny_recipe, *([f"run.dir={folder}/{name}", *words] for name, words in kinds.items()))
    return folder, kinds


@pytest.mark.slow
def test_two_ranks_equal_plain_torch(two_ranks, tiny_recipe, metrics):
    folder, kinds = two_ranks
    plain = {
        name: plain_loop(load_recipe(str(tiny_recipe), words), STEPS, make) for name, (words, make) in PLAIN.items()
    }
    for name in kinds:
        optim = name.split("-")[0]
        losses, norms = plain[optim]
        rows = metrics(folder / name)
        difference = max(abs(a - b) for a, b in zip(_losses(rows), losses, strict=True))
        print(f"{name} on two ranks: {difference:.1e}")
        assert difference <= NOISE[optim]
        assert rows[1]["grad_norm"] == pytest.approx(norms[0], rel=1e-5)  # of the gradient, not of Muon's step


@pytest.mark.slow
def test_two_ranks_go_on_as_one(two_ranks, train, metrics, tmp_path):
    """The cut pieces of momentum come together; a loss differs by no more than between one and two ranks."""
    folder, kinds = two_ranks
    for name, words in kinds.items():
        _cut(folder / name, tmp_path / name)
        here = [*words, "deepspeed.config=zero0.json", "train.micro_batch_size=4"]
        difference = max(
            abs(a - b) for a, b in zip(_losses(train(name, *here)), _losses(metrics(folder / name)), strict=True)
        )
        print(f"{name}, from step 3 on one rank: {difference:.1e}")
        assert difference <= NOISE[name.split("-")[0]]


@pytest.mark.slow
def test_two_ranks_export(two_ranks, tmp_path):
    """The export's logits are those of the weights in the checkpoint."""
    folder, kinds = two_ranks
    for name in kinds:
        assert cli.main(["export", str(folder / name), str(tmp_path / name), "--dtype", "float32", "--verify"]) == 0


@pytest.mark.parametrize(
    ("name", "file", "remedy"),
    [
        ("muon", "zero3.json", "zero0.json or zero1.json or zero2.json"),
        ("muon", "zero3_offload.json", "zero0.json or zero1.json or zero2.json"),
        ("adafactor", "zero1.json", "use deepspeed.config=zero0.json"),
    ],
)
def test_sharding_that_would_learn_silently_wrong_is_refused(name, file, remedy, tiny_recipe):
    recipe = load_recipe(str(tiny_recipe), [f"optim.name={name}"])
    with pytest.raises(SteelError, match="whole matrices") as caught:
        engine.engine_config(recipe, engine.read_config(file), 2)
    assert remedy in caught.value.remedy


def test_what_cannot_go_on_is_refused(train, tmp_path, capsys):
    train("run", *ADAFACTOR, "train.steps=3")
    train("run", "deepspeed.config=zero0.json", expect=78)
    assert "optim.name was adafactor and is now adamw" in capsys.readouterr().err
    train("run", *ADAFACTOR, "train.precision=bf16", expect=78)
    assert "Adafactor's factored state goes on only in the precision and the groups" in capsys.readouterr().err


RATIOS = ("optim.lr_ratio={'*_proj.weight': 0.25, '*norm*': 2.0}", "model.init_std={'*_proj.weight': 0.05}")


def test_a_learning_rate_ratio_is_a_learning_rate_also_after_a_resume(train, tmp_path):
    """Ratio 0.25 for all at four times the rate: the same numbers; ratios of some matrices only: others, resumed bitwise."""
    three = ("train.steps=3", "data.validation=null")
    half = train("half", "optim.lr=0.04", "optim.lr_ratio={'*': 0.25}", *three)
    assert _losses(half) == _losses(train("plain", "optim.lr=0.01", *three))
    train("wrong", "optim.lr_ratio={'*_prj.weight': 0.5}", expect=78)
    assert not (tmp_path / "wrong").exists()  # found before anything is made
    straight = train("straight", *RATIOS)
    _cut(tmp_path / "straight", tmp_path / "cut")
    assert _losses(train("cut", *RATIOS)) == _losses(straight)


@pytest.mark.slow
def test_a_learning_rate_ratio_goes_on_at_another_stage(train, tmp_path):
    straight, words = train("straight", *RATIOS), RATIOS
    assert _losses(straight) != _losses(train("plain"))
    _cut(tmp_path / "straight", tmp_path / "elastic")
    other = train("elastic", *words, "deepspeed.config=zero1.json")
    assert _losses(other) == pytest.approx(_losses(straight), abs=1e-6)


def test_other_learning_rate_ratios_go_on_from_the_same_moments(train, tmp_path):
    """At stage 0 each parameter lies where it lay, but in another group, which DeepSpeed's own loading refuses."""
    train("run", "deepspeed.config=zero0.json")
    losses = {}
    for file in ("zero0.json", "zero1.json"):
        _cut(tmp_path / "run", tmp_path / file)
        losses[file] = _losses(train(file, f"deepspeed.config={file}", "optim.lr_ratio={'*embed*': 0.5}"))
    assert losses["zero0.json"] == pytest.approx(losses["zero1.json"], abs=1e-6)
