"""Under ZeRO-3 the head's weight is gathered for its own forward: losses equal a plain loop, tied or not."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("deepspeed")

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False   # or init_distributed compiles C++
deepspeed.init_distributed("gloo", dist_init_required=False)
from megatron_steel.model.build import build_config, build_model, decay_groups, prepare_for_training
from megatron_steel.model.kernels import Choice
from megatron_steel.recipe import Model

SIZES = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
kind, tied, checkpointing, precision = sys.argv[1], sys.argv[2] == "True", sys.argv[3] == "True", sys.argv[4]
kernels = Choice(head=sys.argv[5])
config = build_config(Model(kind, SIZES | {"tie_word_embeddings": tied, "initializer_range": 0.2}))
generator = torch.Generator().manual_seed(1)
batches = [torch.randint(0, 101, (2, 9), generator=generator) for _ in range(8)]

def build():
    return prepare_for_training(build_model(config, seed=1), checkpointing, kernels, z_loss=1e-3)

plain = build()
optimizer = torch.optim.AdamW(decay_groups(plain, 0.1), lr=1e-2, betas=(0.9, 0.95))
expected = []
for first in range(0, 8, 2):
    losses = [plain(input_ids=b[:, :-1], labels=b[:, 1:]) / 16 for b in batches[first : first + 2]]
    sum(losses).div(2).backward()
    optimizer.step()
    optimizer.zero_grad()
    expected += [loss.item() for loss in losses]

sharded = build()
engine, *_ = deepspeed.initialize(
    model=sharded,
    model_parameters=decay_groups(sharded, 0.1),
    config={
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,   # left out it would be 1.0
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "torch_adam": True}},
    },
)
assert sharded.get_output_embeddings().weight.numel() == 0, "the weight was not cut, so this would prove nothing"
assert (sharded.get_output_embeddings().weight is sharded.get_input_embeddings().weight) == tied
found = []
for b in batches:
    loss = engine(input_ids=b[:, :-1], labels=b[:, 1:]) / 16
    engine.backward(loss)
    engine.step()
    found.append(loss.item())
worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
print(found, expected)
assert worst < {"fp32": 2e-6, "bf16": 0.05}[precision], worst
assert expected[-1] != expected[0]
"""


@pytest.mark.parametrize(
    ("kind", "tied", "checkpointing", "precision", "head"),
    [
        ("steel", False, False, "fp32", "chunked"),
        ("llama", True, True, "fp32", "chunked"),
        ("steel", True, False, "bf16", "chunked"),
        pytest.param("llama", True, False, "fp32", "plain", marks=pytest.mark.slow),
    ],
)
def test_losses_equal_a_plain_loop(tmp_path, kind, tied, checkpointing, precision, head):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(tied), str(checkpointing), precision, head],
        cwd=tmp_path, env=os.environ | {"LOCAL_RANK": "0"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
