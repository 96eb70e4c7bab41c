"""Every kernel that `kernels` can name beside its plain twin, on a real GPU; what is not installed is skipped and named.

Tolerances: errors are Frobenius norms over those of an fp32 twin. In bf16 one rounding is 2^-9 = 0.002.
"""

import pytest
import torch
from torch import nn

from megatron_steel.errors import SteelError
from megatron_steel.model import regions
from megatron_steel.model.attention import Attention
from megatron_steel.model.build import build_config, build_model
from megatron_steel.model.head import ChunkedHead, LigerHead, PlainHead
from megatron_steel.model.kernels import Choice, apex_problem, choose
from megatron_steel.model.training import as_shipped, prepare_for_training
from megatron_steel.recipe import Kernels, Model

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
T = 300  # blocks of 128 with a rest
SIZES = {
    "vocab_size": 1001, "hidden_size": 224, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.05,
}  # fmt: skip  # a head is 56 wide
KINDS = ["steel", "llama", "qwen2", "qwen3", "mistral", "smollm3", "olmo", "olmo2", "granite"]


@pytest.fixture(autouse=True)
def _exact_products():
    torch.set_float32_matmul_precision("highest")
    yield
    torch._dynamo.reset()


def model_of(kind="steel", dtype=torch.bfloat16):
    fields = SIZES | (
        {"pad_token_id": 0} if kind == "smollm3" else {"sliding_window": None} if kind == "mistral" else {}
    )
    return build_model(build_config(Model(kind, fields)), seed=3).to(CUDA, dtype)


def batch(documents=False):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 1001, (2, T + 1), generator=generator)
    inputs = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].clone()}
    inputs["labels"][0, 3:9] = -100
    if documents:
        inputs["document_ids"] = (torch.rand(2, T, generator=generator) < 0.02).cumsum(1)
    return {name: tensor.to(CUDA) for name, tensor in inputs.items()}


def loss_and_gradients(model, inputs, checkpointing=False, kernels=Choice()):  # noqa: B008
    prepare_for_training(model, checkpointing, kernels)
    model.zero_grad()
    loss = model(**inputs)
    loss.backward()
    found = {name: p.grad.float().clone() for name, p in model.named_parameters()}
    as_shipped(model)
    return loss.item(), found


def agrees(kernels, kind="steel", documents=False, checkpointing=False, factor=1.5):
    """bf16 with a kernel is no further from fp32 than bf16 without, times `factor`."""
    inputs = batch(documents)
    exact_loss, exact = loss_and_gradients(model_of(kind, torch.float32), inputs)
    plain_loss, plain = loss_and_gradients(model_of(kind), inputs)
    loss, found = loss_and_gradients(model_of(kind), inputs, checkpointing, kernels)
    assert abs(loss - exact_loss) <= max(2e-3 * exact_loss, factor * abs(plain_loss - exact_loss))
    for name, truth in exact.items():
        off, off_plain = (found[name] - truth).norm(), (plain[name] - truth).norm()
        assert off <= factor * off_plain + 2e-3 * truth.norm(), name


def by_name(documents=False, kind="steel", **kernels):
    try:
        return choose(Kernels(**kernels), model_of(kind), CUDA, "bf16", documents)
    except SteelError as problem:
        pytest.skip(str(problem).splitlines()[0])


@pytest.mark.parametrize(
    "name", ["cudnn", "flash", "efficient", "math", "flash_attention_2", "flash_attention_3", "flex"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_with_heads_of_56(name, checkpointing):
    agrees(by_name(attention=name, compile=False, fused="torch"), checkpointing=checkpointing)


@pytest.mark.parametrize("name", ["flex", "flash_attention_2", "flash_attention_3", "auto"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["steel", "llama"])
def test_packed_documents(name, compiled, kind):
    chosen = by_name(True, kind, attention=name, compile=compiled)
    assert chosen.attention.implementation != "sdpa", "a dense mask"
    agrees(chosen, kind, documents=True)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "math"])
def test_a_dense_mask_is_refused(name):
    with pytest.raises(SteelError, match="only by a dense mask"):
        choose(Kernels(attention=name), model_of(), CUDA, "bf16", True)


def test_auto_takes_something_that_runs():
    chosen = choose(Kernels(), model_of(), CUDA, "bf16", False)
    assert chosen.attention.implementation in ("sdpa", "flash_attention_3")
    agrees(chosen)
    agrees(choose(Kernels(compile=False), model_of(), CUDA, "bf16", False))


def test_the_order_of_back_ends_is_kept():
    """The profiler names the kernel that ran."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    query = torch.randn(2, 4, 256, 56, device=CUDA, dtype=torch.bfloat16)
    order = ("cudnn", "flash", "efficient", "math") if hopper else ("flash", "cudnn", "efficient", "math")
    with Attention("sdpa", order).kernels(), torch.profiler.profile() as profile:
        nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    wanted = "cudnn" if hopper else "flash"
    assert any(f"{wanted}_attention" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("kind", KINDS)
def test_liger_s_norm_rope_and_swiglu(kind):
    agrees(by_name(kind=kind, fused="liger", compile=False), kind)


def test_apex_s_norm():
    if apex_problem(CUDA):
        pytest.skip(apex_problem(CUDA))
    agrees(by_name(fused="apex", compile=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers(kind, checkpointing):
    agrees(by_name(kind=kind, compile=True), kind, checkpointing=checkpointing)


def test_all_layers_share_one_graph():
    model = prepare_for_training(model_of(), kernels=Choice(compile=True))
    torch._dynamo.utils.counters.clear()
    model(**batch()).backward()
    assert len(regions.compiled_layers(model)) == 2
    # one for the layers, one for the softmax of the head's only chunk
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


SETTINGS = [{}, {"z_loss": 1e-2}, {"logit_cap": 3.0}, {"logit_scale": 0.25, "logit_cap": 5.0, "z_loss": 1e-3}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5001, 1792, 64_001), (77, 56, 1001), (1, 8, 3)])
@pytest.mark.parametrize("way", ["blocks", "compiled", "liger"])
def test_every_head_equals_whole_logits_in_fp32(way, shape, dtype, settings):
    tokens, width, words = shape
    torch.manual_seed(1)
    linear = nn.Linear(width, words, bias=False, device=CUDA, dtype=dtype)
    hidden = torch.randn(tokens, width, device=CUDA, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, words, (tokens,), device=CUDA)
    if tokens > 1:
        labels[1] = -100
    if way == "liger":
        pytest.importorskip("liger_kernel")
        head = LigerHead(linear, **settings)
    else:
        head = ChunkedHead(linear, chunk_tokens=2048, compiled=way == "compiled", **settings)
    loss = head(hidden, labels)
    found = torch.autograd.grad(loss * 0.37, [hidden, head.weight])
    twin = PlainHead(linear.float(), **settings)
    exact = hidden.detach().float().requires_grad_()
    truth = twin(exact, labels)
    tolerance = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-3, 1e-2)}[dtype]
    assert abs(loss - truth) <= tolerance[0] * abs(truth) + 1e-5
    for mine, theirs in zip(found, torch.autograd.grad(truth * 0.37, [exact, twin.weight]), strict=True):
        assert (mine.float() - theirs).norm() <= tolerance[1] * theirs.norm() + 1e-6


def test_all_logits_never_live_at_once():
    """16k tokens of 152k words in bf16: whole logits take 5 GB, and 10 GB in fp32."""
    linear = nn.Linear(256, 151_936, bias=False, device=CUDA, dtype=torch.bfloat16)
    hidden = torch.randn(16_384, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 151_936, (16_384,), device=CUDA)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ChunkedHead(linear)(hidden, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 2e9  # 1.24 GB a chunk, a block of 128 MB, the gradients
