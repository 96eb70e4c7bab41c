"""Experts as one product against the loop over experts; the mixtures under ZeRO-3; what the causal ones cost."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from mixtures import SIZES, SLOTS, tiny
from torch.utils.flop_counter import FlopCounterMode

from megatron_steel.model.build import fetched_whole
from megatron_steel.model.configuration_steel import FFN_TYPES, MLP_TYPES
from megatron_steel.model.experts_steel import SteelSoftMoEV1, SteelSoftMoEV2, run_experts
from megatron_steel.model.flops import flops_per_token
from megatron_steel.model.memory import activation_bytes_per_sample
from megatron_steel.model.training import prepare_for_training

# ---- experts as one product


def loop(mixture, x):
    """The published forms, one expert after the other."""
    if isinstance(mixture, SteelSoftMoEV1):
        weights = torch.softmax(mixture.gating(x), dim=-1)
        return sum(expert(x) * weights[..., i : i + 1] for i, expert in enumerate(mixture.experts))
    if isinstance(mixture, SteelSoftMoEV2):
        logits = x @ mixture.score
        dispatch, combine = logits.softmax(-1), logits.softmax(1)
    else:
        x = F.normalize(x, dim=2)
        logits = torch.einsum("bth,hnp->btnp", x, mixture.scale * F.normalize(mixture.phi, dim=0)).flatten(2)
        dispatch, combine = logits.softmax(1), logits.softmax(-1)
    pieces = (dispatch.transpose(1, 2) @ x).split(2, dim=1)
    return combine @ torch.cat([expert(piece) for expert, piece in zip(mixture.experts, pieces, strict=True)], dim=1)


@pytest.mark.parametrize("ffn", ["softmoe_v1", "softmoe_v2", "softmoe_v3"])
@pytest.mark.parametrize("mlp_type", MLP_TYPES)
def test_stacked_experts_equal_the_loop(ffn, mlp_type):
    """Outputs and gradients within 1e-5 of the largest."""
    mixture = tiny(FFN_type=ffn, mlp_type=mlp_type).model.layers[0].mlp
    results = []
    for form in (mixture, lambda x: loop(mixture, x)):
        torch.manual_seed(3)
        x = torch.randn(2, 13, 64, requires_grad=True)
        y = form(x)
        (y * torch.randn(y.shape)).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in mixture.parameters())])
        mixture.zero_grad()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("mlp_type", MLP_TYPES)
def test_stacked_products_pass_gradcheck(mlp_type):
    experts = (
        tiny(FFN_type="softmoe_v1", mlp_type=mlp_type, hidden_size=8, intermediate_size=6).model.layers[0].mlp.experts
    )
    experts.double()
    names = [name for name, _ in experts.named_parameters()]
    for shape in ((5, 8), (3, 2, 8)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

        def run(x, *weights):
            return torch.func.functional_call(
                _Runner(experts), dict(zip([f"experts.{n}" for n in names], weights, strict=True)), (x,)
            )

        assert torch.autograd.gradcheck(run, (x, *experts.parameters()))


class _Runner(torch.nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return run_experts(self.experts, x)


def test_mixtures_are_fetched_whole():
    for ffn in FFN_TYPES:
        model = tiny(FFN_type=ffn)
        expected = [] if ffn == "raw" else [layer.mlp for layer in model.model.layers]
        assert fetched_whole(model) == expected


# ---- what it costs


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("tokens", [48, 256])
def test_hw_is_what_torch_multiplies(slots, tokens):
    """torch's own counter over forward and backward; within 1% (the sum over chunks has no gradient to its first row)."""
    model = tiny(slots, attn_implementation="eager", hidden_size=128, segment_length=32).train()
    ids = torch.randint(0, 97, (2, tokens))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    expected = flops_per_token(model.config, tokens).hw * ids.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activation_estimate_is_within_a_quarter_of_what_autograd_keeps(slots, precision):
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "mlp_div_ratio": 4,
        "mlp_type": "senet",
        "segment_length": 64,
    }
    model = prepare_for_training(tiny(slots, **sizes)).train().to(precision)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, 97, (2, 256))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    real = sum(size for size, _ in kept.values()) / 2
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[precision]
    assert activation_bytes_per_sample(model.config, 256, name) == pytest.approx(real, rel=0.25)


# ---- ZeRO-3

ZERO3 = """
import json, sys, torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False   # or init_distributed compiles C++
deepspeed.init_distributed("gloo", dist_init_required=False)
from deepspeed.utils import set_z3_leaf_module
from megatron_steel.model import mixture_steel
from megatron_steel.model.build import build_config, build_model, decay_groups, fetched_whole, prepare_for_training
from megatron_steel.recipe import Model

mixture_steel.BLOCK, mixture_steel.CHUNK = int(sys.argv[3]), 4
config = build_config(Model("steel", json.loads(sys.argv[1])))
generator = torch.Generator().manual_seed(1)
batches = [torch.randint(0, 97, (2, 20), generator=generator) for _ in range(4)]
build = lambda: prepare_for_training(build_model(config, seed=1), sys.argv[2] == "True")
plain, expected, found = build(), [], []
optimizer = torch.optim.AdamW(decay_groups(plain, 0.1), lr=1e-2, betas=(0.9, 0.95))
for b in batches:
    loss = plain(input_ids=b[:, :-1], labels=b[:, 1:]) / 38
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    expected.append(loss.item())
sharded = build()
for module in fetched_whole(sharded):
    set_z3_leaf_module(module, True)
engine, *_ = deepspeed.initialize(
    model=sharded, model_parameters=decay_groups(sharded, 0.1),
    config={
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "torch_adam": True}},
    },
)
assert all(p.numel() == 0 for module in fetched_whole(sharded) for p in module.parameters()), "not cut: proves nothing"
for b in batches:
    loss = engine(input_ids=b[:, :-1], labels=b[:, 1:]) / 38
    engine.backward(loss)
    engine.step()
    found.append(loss.item())
print(found, expected)
assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 5e-6
assert expected[-1] != expected[0]
"""


@pytest.mark.parametrize(
    ("changes", "checkpointing", "block"),
    [
        ({"causal_slots": "prefix"}, True, 8), ({"causal_slots": "lagged"}, False, 8),
        pytest.param({"FFN_type": "softmoe_v1"}, True, 64, marks=pytest.mark.slow),
    ],
    ids=["prefix", "lagged", "v1"],
)  # fmt: skip
def test_losses_under_zero_3_equal_a_plain_loop(tmp_path, changes, checkpointing, block):
    pytest.importorskip("deepspeed")
    done = subprocess.run(
        [sys.executable, "-c", ZERO3, json.dumps(SIZES | changes), str(checkpointing), str(block)],
        cwd=tmp_path, env=os.environ | {"LOCAL_RANK": "0"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
