"""The chunked head equals a plain linear layer, fp32 softmax and cross-entropy: value and every gradient."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_steel.model.head import ChunkedHead, PlainHead, _softmax_

# (batch, tokens, hidden, words, chunk): chunks that divide the tokens, that leave a rest, that are larger than all
SHAPES = [(2, 8, 16, 40, 4), (3, 7, 12, 33, 5), (1, 1, 8, 3, 4096), (2, 9, 24, 101, 1)]


def plain_loss(hidden, weight, bias, labels, scale=1.0, cap=None, z_loss=0.0):
    logits = F.linear(hidden, weight, bias).float() * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    if z_loss:
        log_z = torch.logsumexp(logits, dim=-1)[labels != -100]
        return plain_loss(hidden, weight, bias, labels, scale, cap) + z_loss * (log_z**2).sum()
    return F.cross_entropy(logits.reshape(-1, weight.shape[0]), labels.reshape(-1), ignore_index=-100, reduction="sum")


def make(shape, bias=False, dtype=torch.float32, **settings):
    B, T, H, V, chunk = shape
    torch.manual_seed(B * T * V)
    linear = nn.Linear(H, V, bias=bias).to(dtype)
    hidden = torch.randn(B, T, H).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T))
    if T > 1:
        labels[0, 1] = labels[-1, -1] = -100
    return ChunkedHead(linear, chunk_tokens=chunk, **settings), hidden, labels


def gradients(loss, head, hidden, upstream):
    wanted = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return torch.autograd.grad(loss * upstream, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.125, None), (1.0, 3.0), (2.0, 1.5)])
def test_loss_and_gradients_equal_the_plain_loss_in_fp32(shape, bias, scale, cap):
    head, hidden, labels = make(shape, bias, logit_scale=scale, logit_cap=cap)
    upstream = 0.37  # gradients must be scaled by what comes from above
    loss = head(hidden, labels)
    plain = plain_loss(hidden, head.weight, head.bias, labels, scale, cap)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-5)
    for mine, theirs in zip(
        gradients(loss, head, hidden, upstream), gradients(plain, head, hidden, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_class", [ChunkedHead, PlainHead])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (2.0, 1.5)])
def test_the_z_loss_is_in_the_gradients_and_not_in_the_loss(head_class, shape, scale, cap):
    chunked, hidden, labels = make(shape, bias=True)
    chunk = {"chunk_tokens": shape[-1]} if head_class is ChunkedHead else {}
    head = head_class(chunked, logit_scale=scale, logit_cap=cap, z_loss=0.1, **chunk)
    loss = head(hidden, labels)
    plain = plain_loss(hidden, head.weight, head.bias, labels, scale, cap)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-5)
    penalised = plain_loss(hidden, head.weight, head.bias, labels, scale, cap, z_loss=0.1)
    assert penalised > plain + 0.01
    expected = gradients(penalised, head, hidden, 0.37)
    for mine, theirs in zip(gradients(loss, head, hidden, 0.37), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden, labels), plain, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_softmax_is_the_plain_one(dtype, backend):
    """fp32: within 1e-6; bf16: gradients within one rounding, 2^-8 of themselves."""
    settings = {"logit_scale": 2.0, "logit_cap": 3.0, "z_loss": 0.1}
    head, hidden, labels = make(SHAPES[1], bias=True, dtype=dtype, **settings)
    plain = head(hidden, labels)
    expected = gradients(plain, head, hidden, 0.37)
    head.softmax = torch.compile(_softmax_, backend=backend, dynamic=False)
    loss = head(hidden, labels)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2**-7, 1e-3)
    for mine, theirs in zip(gradients(loss, head, hidden, 0.37), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def test_a_chunk_in_blocks_is_the_chunk_at_once(monkeypatch):
    head, hidden, labels = make((2, 64, 16, 50, 128))
    whole = gradients(head(hidden, labels), head, hidden, 1.0)
    monkeypatch.setattr("megatron_steel.model.head.BLOCK_NUMBERS", 50 * 7)
    for mine, theirs in zip(gradients(head(hidden, labels), head, hidden, 1.0), whole, strict=True):
        assert torch.equal(mine, theirs)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


def test_peak_memory_is_one_chunk_of_logits_and_one_block(monkeypatch):
    """bf16: 2 bytes a logit of the chunk, and at most 16 of a block; whole logits take 16 of everything."""
    tokens, words, chunk, block = 512, 4096, 128, 1 << 16
    monkeypatch.setattr("megatron_steel.model.head.BLOCK_NUMBERS", block)
    head, hidden, labels = make((2, tokens // 2, 16, words, chunk), dtype=torch.bfloat16)
    with Peak() as peak:
        head(hidden, labels)
    gradients_bytes = 2 * (head.weight.numel() + hidden.numel())
    assert 2 * chunk * words < peak.most < 2 * chunk * words + 16 * block + 2 * gradients_bytes
    with Peak() as plain:
        PlainHead(head)(hidden, labels)
    assert plain.most > 4 * peak.most


@pytest.mark.parametrize(("chunk", "factor"), [(128, 1.1), (16, 2.5)])
def test_in_bf16_the_error_is_that_of_bf16_itself(chunk, factor):
    """Both ways in bf16 against the same weights in fp32.

    In one chunk the gradients are as good as autograd's; in eight the weight's gradient, which is rounded to bf16
    after every chunk, is less than 2.5 times as far off (sqrt(8) = 2.8 is what independent roundings would give).
    """
    head, hidden, labels = make((4, 32, 64, 300, chunk), bias=True, dtype=torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in (hidden, head.weight, head.bias)]
    truth = plain_loss(*exact, labels)
    truth_grads = torch.autograd.grad(truth, exact)
    loss = head(hidden, labels)
    plain = plain_loss(hidden, head.weight, head.bias, labels)
    assert abs(loss - truth) / truth < 1e-4
    mine, theirs = gradients(loss, head, hidden, 1.0), gradients(plain, head, hidden, 1.0)
    for a, b, t in zip(mine, theirs, truth_grads, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - t).norm() <= factor * (b.float() - t).norm()
        assert (a.float() - t).norm() / t.norm() < 0.01


def test_large_logits_do_not_overflow():
    head, hidden, labels = make(SHAPES[0])
    hidden = (hidden.detach() * 1e4).requires_grad_()
    loss = head(hidden, labels)
    torch.testing.assert_close(loss, plain_loss(hidden, head.weight, None, labels), rtol=1e-6, atol=0)
    assert all(g.isfinite().all() for g in gradients(loss, head, hidden, 1.0))


def test_all_ignored_is_zero_loss_and_zero_gradient():
    head, hidden, labels = make(SHAPES[1])
    loss = head(hidden, torch.full_like(labels, -100))
    assert loss.item() == 0.0
    assert all(g.abs().max() == 0 for g in gradients(loss, head, hidden, 1.0))


def test_without_labels_the_logits_are_those_of_the_linear_layer():
    head, hidden, _ = make(SHAPES[0], bias=True, logit_scale=0.5)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight, head.bias))


def test_without_gradients_the_loss_is_the_same_and_nothing_is_kept():
    head, hidden, labels = make(SHAPES[1])
    with torch.no_grad():
        quiet = head(hidden, labels)
    assert not quiet.requires_grad
    assert torch.equal(quiet, head(hidden, labels).detach())


def test_a_frozen_weight_gets_no_gradient():
    head, hidden, labels = make(SHAPES[1])
    head.weight.requires_grad_(False)
    head(hidden, labels).backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


def test_all_logits_are_never_alive():
    """No chunk computes more than its own rows of logits, all of them in one buffer."""
    head, hidden, labels = make((3, 7, 12, 33, 5))
    seen, softmax = [], head.softmax
    head.softmax = lambda logits, *rest: seen.append((logits.shape, logits.data_ptr())) or softmax(logits, *rest)
    head(hidden, labels).backward()
    assert [tuple(shape) for shape, _ in seen] == [(5, 33)] * 4 + [(1, 33)]
    assert len({place for _, place in seen}) == 1


def test_names_and_objects_of_the_parameters_are_kept():
    linear = nn.Linear(4, 6)
    head = ChunkedHead(linear)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert list(head.state_dict()) == ["weight", "bias"]


def test_tied_weight_gathers_both_gradients():
    embed = nn.Embedding(11, 8)
    linear = nn.Linear(8, 11, bias=False)
    linear.weight = embed.weight
    head = ChunkedHead(linear, chunk_tokens=3)
    ids, labels = torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (2, 5))
    head(embed(ids), labels).backward()
    mine, embed.weight.grad = embed.weight.grad, None
    plain_loss(embed(ids), embed.weight, None, labels).backward()
    torch.testing.assert_close(mine, embed.weight.grad, rtol=1e-5, atol=1e-6)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_fp32():
    head, hidden, labels = make((2, 16, 32, 50, 8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(hidden, labels)
    loss.backward()
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.float32
    torch.testing.assert_close(loss, plain_loss(hidden, head.weight, None, labels), rtol=2e-3, atol=0)


def test_a_second_backward_is_refused():
    head, hidden, labels = make(SHAPES[1])
    loss = head(hidden, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot run twice"):
        loss.backward()
