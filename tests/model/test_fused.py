"""Liger's kernels beside their plain twins, on a CPU: triton's interpreter runs them, in a process of its own.

Forward and every gradient, for each class they are laid over; the head in odd shapes. On a GPU the compiled kernels are
tested in tests/gpu.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import CLASSES, make

from megatron_steel.model import fused

pytest.importorskip("liger_kernel")
pytestmark = pytest.mark.filterwarnings("ignore")

INTERPRETED = """
import sys
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

plain = interpreter._implicit_cvt

def with_floats(arg):   # compiled kernels get a float as a scalar of fp32; the interpreter hands on Python's
    if isinstance(arg, float):
        return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
    return plain(arg)

interpreter._implicit_cvt = with_floats
import liger_kernel.ops.rms_norm
liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)   # the other one is CUDA's own library
sys.path.insert(0, sys.argv[1])
import torch
"""
PIECES = """
from test_training import batch, grads, make
from megatron_steel.model.kernels import Choice
from megatron_steel.model.training import as_shipped, prepare_for_training

ids, labels = (x[:1, :6] for x in batch())
for name in sys.argv[2:]:
    model = prepare_for_training(make(name))
    results = []
    for choice in (Choice(), Choice(fused="liger")):
        prepare_for_training(as_shipped(model), kernels=choice)
        loss = model(input_ids=ids, labels=labels)
        loss.backward()
        results.append((loss.detach(), grads(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    for key, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], grad, rtol=1e-4, atol=1e-4, msg=lambda m: f"{name} {key}: {m}")
    moved = [key for key, grad in results[0][1].items() if not torch.equal(results[1][1][key], grad)]
    assert moved, f"{name}: bitwise equal, so no kernel ran"
"""
HEAD = """
from megatron_steel.model.head import LigerHead, PlainHead

for tokens, width, words, bias, settings in [
    (7, 12, 33, False, {}), (5, 16, 101, False, {"z_loss": 1e-2}), (3, 8, 50, True, {"logit_scale": 0.25, "z_loss": 1e-2}),
]:
    torch.manual_seed(tokens)
    linear = torch.nn.Linear(width, words, bias=bias)
    hidden, labels = torch.randn(tokens, width, requires_grad=True), torch.randint(0, words, (tokens,))
    labels[1] = -100
    results = []
    for head in (PlainHead(linear, **settings), LigerHead(linear, **settings)):
        loss = head(hidden, labels)
        results.append((loss, *torch.autograd.grad(loss * 0.37, [hidden, *head.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
"""


def interpreted(script, *names):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED + script, str(Path(__file__).parent), *names],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_norm_rope_and_swiglu_equal_torch_s():
    """fp32; loss within 1e-5 of itself, gradients within 1e-4."""
    fusable = [name for name in CLASSES if any(fused.fuse(make(name), "liger").values())]
    assert len(fusable) >= 10
    interpreted(PIECES, *fusable)


@pytest.mark.slow
def test_liger_s_head_equals_whole_logits():
    """fp32 with z-loss, scale, bias and ignored labels (the soft-cap's tanh is CUDA's); loss and gradients within 1e-5."""
    interpreted(HEAD)


def test_what_is_laid_over_a_model_and_taken_off():
    model = make("steel")
    names = list(model.state_dict())
    assert fused.fuse(model, "liger") == {"norm": 5, "rope": 2, "swiglu": 2}
    assert list(model.state_dict()) == names
    fused.put_back(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("name", "norms", "ropes", "gates"),
    [
        ("llama", 5, 2, 2), ("mistral", 5, 2, 2), ("qwen2", 5, 2, 2), ("qwen3", 9, 2, 2), ("smollm3", 5, 2, 2),
        ("granite", 5, 2, 2), ("olmo", 0, 2, 2), ("olmo2", 9, 2, 2), ("gpt2", 0, 0, 0), ("phi", 0, 0, 0),
    ],
)  # fmt: skip
def test_every_class_gets_what_it_has(name, norms, ropes, gates):
    assert fused.fuse(make(name), "liger") == {"norm": norms, "rope": ropes, "swiglu": gates}


def test_only_the_instance_is_changed():
    model, other = make("llama"), make("llama")
    tokens = torch.randint(0, 101, (1, 5))
    before = other(tokens).logits
    fused.fuse(model, "liger")
    assert torch.equal(other(tokens).logits, before)
    assert torch.equal(make("llama")(tokens).logits, before)
