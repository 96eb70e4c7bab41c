"""Compiled layers give the losses of plain ones: alone, with what watches them, and under ZeRO 0 to 3.

The default suite compiles with dynamo and autograd alone (`aot_eager`), which shows hooks, breaks and names in seconds;
the slow tests go through inductor and two ranks.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from test_training import CLASSES, make

from megatron_steel.model import parts, regions
from megatron_steel.model.attention import Attention
from megatron_steel.model.build import build_config, build_model, fetched_whole
from megatron_steel.model.kernels import Choice
from megatron_steel.model.training import as_shipped, prepare_for_training
from megatron_steel.recipe import Model
from megatron_steel.train.health import Health

SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"n_experts": 3, "slots_per_expert": 2, "mlp_div_ratio": 2, "segment_length": 5}
LAGGED = SIZES | EXPERTS | {"FFN_type": "softmoe_causal", "causal_slots": "lagged"}


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch._dynamo.reset()


def build(fields=SIZES, kind="steel", checkpointing=False):
    return prepare_for_training(build_model(build_config(Model(kind, fields)), seed=1), checkpointing)


def batch():
    tokens = torch.randint(0, 101, (2, 18), generator=torch.Generator().manual_seed(2))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(**batch())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch._dynamo.config.patch(suppress_errors=False)  # puts back afterwards what is set inside
def test_layers_that_do_not_compile_run_plain_where_nobody_asked_for_it_by_name():
    """A back end that fails: `auto` goes on with the plain losses, a name ends with the error."""

    def fails(graph, inputs):
        raise RuntimeError("no such instruction")

    expected, gradients = loss_and_gradients(build())
    model = build()
    regions.compile_layers(model, backend=fails)
    with pytest.raises(Exception, match="no such instruction"):
        loss_and_gradients(model)
    torch._dynamo.reset()
    model = build()
    regions.compile_layers(model, backend=fails, fall_back=True)
    loss, found = loss_and_gradients(model)
    assert torch.equal(loss, expected)
    assert all(torch.equal(found[name], g) for name, g in gradients.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_is_the_plain_one(checkpointing):
    """fp32; loss within 1e-6 of itself, gradients within 1e-5; all layers share two graphs, forward and backward once."""
    loss, expected = loss_and_gradients(build(checkpointing=checkpointing))
    model = build(checkpointing=checkpointing)
    names = list(model.state_dict())
    torch._dynamo.utils.counters.clear()
    assert regions.compile_layers(model, backend="aot_eager") == 2
    found_loss, found = loss_and_gradients(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    assert fetched_whole(model) == [layer for _, layer in parts.decoder_layers(model)]
    as_shipped(model)
    assert not regions.compiled_layers(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_compiles_without_a_break(name):
    plain, model = prepare_for_training(make(name)), prepare_for_training(make(name))
    regions.compile_layers(model, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    loss, expected = loss_and_gradients(plain)
    found_loss, found = loss_and_gradients(model)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_lagged_mixture_stays_outside_the_graph():
    model = build(LAGGED)
    loss, expected = loss_and_gradients(build(LAGGED))
    regions.compile_layers(model, backend="aot_eager")
    found_loss, found = loss_and_gradients(model)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    as_shipped(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_block_masks_of_all_batches_share_a_graph():
    """FlexAttention in a compiled layer: new documents are new numbers, not a new graph (no backward pass on a CPU)."""
    flex = Choice(attention=Attention("flex_attention"))
    plain, model = (
        build().eval(),
        prepare_for_training(build_model(build_config(Model("steel", SIZES)), 1), False, flex),
    )
    regions.compile_layers(model.eval(), backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for seed in (1, 2, 3):
        documents = (torch.rand(2, 17, generator=torch.Generator().manual_seed(seed)) < 0.3).cumsum(1)
        found = model(input_ids=batch()["input_ids"], document_ids=documents)
        expected = plain(input_ids=batch()["input_ids"], document_ids=documents)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_layers_are_watched_from_outside(monkeypatch):
    """The shares of the FFNs are those of the plain model, and the graph knows nothing of the hooks."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    figures, losses = [], []
    for compiled in (False, True):
        model = build()
        if compiled:
            regions.compile_layers(model, backend="aot_eager")
        health = Health(model, torch.device("cpu"))
        for wanted in (True, False, True):
            with health.watching(wanted):
                losses.append(model(**batch()).item())
        figures.append((health._sums.clone(), health.take()["ffn_share"]))
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-6)
    assert torch.equal(figures[0][0][1], figures[1][0][1])  # counts: two of three passes, each once
    assert figures[1][1] == pytest.approx(figures[0][1], rel=1e-5)


# ---- ZeRO

SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
stage, backend, kind, fields, checkpointing, precision = json.loads(sys.argv[1])
world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
store = torch.distributed.FileStore(os.environ["STORE"], world)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False   # or init_distributed compiles C++
deepspeed.init_distributed("gloo", dist_init_required=False)
from megatron_steel.model import regions
from megatron_steel.model.build import build_config, build_model, decay_groups, fetched_whole, prepare_for_training
from megatron_steel.recipe import Model
from megatron_steel.train.engine import fetch_mixtures_whole

generator = torch.Generator().manual_seed(1)
batches = [torch.randint(0, 101, (2 * world, 18), generator=generator)[rank::world] for _ in range(6)]

def losses(compiled):
    model = prepare_for_training(build_model(build_config(Model(kind, fields)), seed=1), checkpointing)
    if compiled:
        regions.compile_layers(model, backend=backend)
    fetch_mixtures_whole(model)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=decay_groups(model, 0.1),
        config={
            "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "torch_adam": True}},
        },
    )
    layers = regions.compiled_layers(model)
    assert len(layers) == 2 * compiled
    if stage == 3:
        assert all(p.numel() == 0 for layer in layers for p in layer.parameters()), "not cut: proves nothing"
    found = []
    for b in batches:
        loss = engine(input_ids=b[:, :-1], labels=b[:, 1:]) / 34
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
        if stage == 3:
            assert all(p.numel() == 0 for layer in layers for p in layer.parameters()), "weights were not let go"
    engine.eval()
    with torch.no_grad():
        found.append(float(engine(input_ids=batches[0][:, :-1], labels=batches[0][:, 1:])) / 34)
    return found

plain, compiled = losses(False), losses(True)
breaks = dict(torch._dynamo.utils.counters["graph_break"])
print(plain, compiled, breaks)
worst = max(abs(a - b) for a, b in zip(plain, compiled, strict=True))
assert worst < {"fp32": 5e-6, "bf16": 0.05}[precision], worst
assert plain[-1] != plain[0] and not breaks
torch.distributed.barrier()
os._exit(0)   # gloo's threads may outlive the interpreter
"""


def losses_agree(
    tmp_path, ranks, stage, backend="inductor", kind="steel", fields=SIZES, checkpointing=False, precision="fp32"
):
    argument = json.dumps([stage, backend, kind, fields, checkpointing, precision])
    common = os.environ | {"WORLD_SIZE": str(ranks), "STORE": str(tmp_path / "store"), "DS_ACCELERATOR": "cpu"}
    started = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, argument], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, env=common | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(ranks)
    ]  # fmt: skip
    said = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(said)


def test_losses_under_zero_3_are_those_of_plain_layers(tmp_path):
    """fp32 within 5e-6 over six micro-batches, three steps and an evaluation; weights are cut before and after each."""
    losses_agree(tmp_path, 1, 3, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_at_every_stage_are_those_of_plain_layers(tmp_path, ranks, stage):
    losses_agree(tmp_path, ranks, stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields", "checkpointing", "precision"),
    [
        ("llama", SIZES, True, "fp32"),
        ("steel", SIZES, True, "bf16"),
        ("steel", SIZES | EXPERTS | {"FFN_type": "softmoe_v3"}, False, "fp32"),
        ("steel", SIZES | EXPERTS | {"FFN_type": "softmoe_causal", "causal_slots": "prefix"}, False, "fp32"),
    ],
    ids=["llama, checkpointing", "bf16", "v3", "prefix"],
)  # fmt: skip
def test_other_models_under_zero_3(tmp_path, kind, fields, checkpointing, precision):
    losses_agree(tmp_path, 1, 3, "aot_eager", kind, fields, checkpointing, precision)
