"""The language-model head: linear and cross-entropy in one, in three ways that give the same loss and gradients.

- `ChunkedHead`: a few thousand tokens at a time become logits, loss and gradient in one buffer. At 152k words the
  logits of 16k tokens take 5 GB in bf16 and 10 GB more for an fp32 softmax; here 1.2 GB are alive. The gradients of
  hidden states and weight are finished before `forward` returns; `backward` only scales them.
- `LigerHead`: Liger's fused linear cross-entropy. Its chunks are as small as the vocabulary is large (256 of 16k
  tokens for 152k words and a width of 1792), its kernel makes one pass.
- `PlainHead`: whole logits and autograd, the twin that the others are tested against.

The work lies in the module's own `forward`, so that ZeRO-3's hooks gather the weight for it. Knows nothing of models,
recipes or ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

IGNORE = -100
CHUNK_TOKENS = 4096  # 1.2 GB of bf16 logits at 152k words, and GEMMs still large enough for a GPU's full speed
BLOCK_NUMBERS = 1 << 25  # logits whose softmax is computed at one time: 128 MB in fp32


class LossHead(nn.Linear):
    """`nn.Linear` (same parameters, same names) that can also return the loss.

    Args:
        linear: the head to take over; its Parameter objects are kept, so that tied weights stay tied.
        logit_scale: factor on the logits before the loss (Granite: 1 / logits_scaling).
        logit_cap: logits become cap * tanh(logits / cap) before the loss (Gemma), or None.
        z_loss: coefficient of log(Z)^2, Z the sum of exponentials of a token's logits (PaLM, arXiv 2204.02311, section
            5). Its gradient is added; the loss that is returned stays the cross-entropy.
    """

    def __init__(
        self, linear: nn.Linear, logit_scale: float = 1.0, logit_cap: float | None = None, z_loss: float = 0.0
    ):
        nn.Module.__init__(self)  # not nn.Linear's: it would draw a weight only to throw it away
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.logit_scale, self.logit_cap, self.z_loss = logit_scale, logit_cap, z_loss

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Logits, or the summed loss.

        Args:
            input: hidden states [..., h].
            labels: [...], the word that each position predicts (already shifted); -100 is ignored.

        Returns:
            With `labels` the sum of cross-entropies, a scalar in fp32; without, the plain linear logits [..., V]
            (scale and cap are then left to the model's own forward).
        """
        if labels is None:
            return F.linear(input, self.weight, self.bias)
        hidden = input.reshape(-1, input.shape[-1])
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summed_loss(hidden, weight, bias, labels.reshape(-1))

    def summed_loss(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """hidden [t, h], weight [V, h], bias [V], labels [t] -> fp32 scalar."""
        raise NotImplementedError


class PlainHead(LossHead):
    """All logits at once, in fp32 for the loss."""

    def summed_loss(self, hidden, weight, bias, labels):  # type: ignore[no-untyped-def]
        logits = F.linear(hidden, weight, bias).float() * self.logit_scale
        if self.logit_cap is not None:
            logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
        return plain_loss(logits, labels, self.z_loss)


class LigerHead(LossHead):
    """Liger's kernel, with the weight's gradient added up in fp32 over its many chunks."""

    def summed_loss(self, hidden, weight, bias, labels):  # type: ignore[no-untyped-def]
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        if self.logit_scale != 1.0:
            hidden, bias = hidden * self.logit_scale, None if bias is None else bias * self.logit_scale
        fused = LigerFusedLinearCrossEntropyLoss(
            ignore_index=IGNORE, reduction="sum", softcap=self.logit_cap, lse_square_scale=self.z_loss,
            return_z_loss=self.z_loss != 0.0, accum_dtype=torch.float32,
        )  # fmt: skip
        out = fused(weight, hidden, labels, bias)
        return out.loss - out.z_loss.detach().float() if self.z_loss else out


class ChunkedHead(LossHead):
    """See the module's head.

    Args:
        chunk_tokens: tokens whose logits exist at one time.
        compiled: let inductor fuse the softmax of a chunk into two passes; else it goes block by block in place.
    """

    def __init__(self, linear: nn.Linear, *, chunk_tokens: int = CHUNK_TOKENS, compiled: bool = False, **settings: Any):
        super().__init__(linear, **settings)
        self.chunk_tokens = chunk_tokens
        self.softmax: Callable[..., Any] = torch.compile(_softmax_, dynamic=False) if compiled else _softmax_in_blocks_

    def summed_loss(self, hidden, weight, bias, labels):  # type: ignore[no-untyped-def]
        settings = self.logit_scale, self.logit_cap, self.z_loss
        return _SummedLoss.apply(
            hidden, weight, bias, labels, self.softmax, settings, self.chunk_tokens, torch.is_grad_enabled()
        )


def plain_loss(logits: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0) -> torch.Tensor:
    """Sum of cross-entropies over labels that are not -100, from whole logits [t, V]; the gradient holds the z-loss."""
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    if z_loss:
        log_z = torch.logsumexp(logits.float(), dim=-1)
        z = z_loss * log_z.square().where(labels != IGNORE, 0.0).sum()
        loss = loss + (z - z.detach())
    return loss


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        softmax: Callable[..., Any],
        settings: tuple[float, float | None, float],
        chunk_tokens: int,
        training: bool,
    ) -> torch.Tensor:
        # `needs_input_grad` does not know of torch.no_grad, hence `training`.
        wants_hidden, wants_weight, wants_bias = (training and wanted for wanted in ctx.needs_input_grad[:3])
        wants_any = wants_hidden or wants_weight or wants_bias
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=hidden.device) if wants_bias else None
        buffer = hidden.new_empty(min(chunk_tokens, len(labels)), weight.shape[0])
        for start in range(0, len(labels), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = buffer[: len(labels[rows])]
            if bias is None:
                torch.mm(hidden[rows], weight.t(), out=logits)
            else:
                torch.addmm(bias, hidden[rows], weight.t(), out=logits)
            counted = labels[rows] != IGNORE
            index = labels[rows].where(counted, 0)[:, None]
            losses[rows], at_label = softmax(logits, index, counted, *settings, wants_any)
            if not wants_any:
                continue
            slope = logits.scatter_(1, index, at_label[:, None].to(logits.dtype))
            if grad_bias is not None:
                grad_bias += slope.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(slope.t(), hidden[rows])
        ctx.gradients = (grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(weight.dtype))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("ChunkedHead keeps its gradients for one backward pass; it cannot run twice")
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a second copy of the weight's gradient would be the largest tensor of the step.
        scaled = [g if g is None else g.mul_(grad_outputs[0]) for g in gradients]
        return (*scaled, None, None, None, None, None)


def _softmax_(
    logits: torch.Tensor,
    index: torch.Tensor,
    counted: torch.Tensor,
    scale: float,
    cap: float | None,
    z_loss: float,
    wants_slope: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a chunk; its logits become the slope of their sum (but for the label's own place).

    Args:
        logits: [t, V], used up: with `wants_slope` they hold p dL/d(log Z) afterwards, rounded once.
        index: int64 [t, 1], the labels, 0 where ignored.
        counted: bool [t], not ignored.

    Returns:
        losses: fp32 [t], 0 where ignored.
        at_label: fp32 [t], the slope at the label, to be written there.
    """
    z = logits.float()  # the same tensor when it is fp32 already
    if scale != 1.0:
        z.mul_(scale)
    bend = None
    if cap is not None:
        z.div_(cap).tanh_()
        bend = 1 - z.square() if wants_slope else None  # derivative of cap * tanh(z / cap)
        z.mul_(cap)
    top = z.amax(dim=-1)
    own = z.gather(1, index).squeeze(1) - top
    total = z.sub_(top[:, None]).exp_().sum(dim=-1)
    losses = (total.log() - own).where(counted, 0.0)
    if not wants_slope:
        return losses, losses
    pull = (1 + 2 * z_loss * (total.log() + top)).where(counted, 0.0)  # of the loss by log Z
    at_label = pull * own.exp() / total - counted.float()
    z.mul_((pull / total)[:, None])
    if bend is not None:
        z.mul_(bend)
        at_label = at_label * bend.gather(1, index).squeeze(1)
    if scale != 1.0:
        z.mul_(scale)
        at_label = at_label * scale
    if z.dtype != logits.dtype:
        logits.copy_(z)
    return losses, at_label


def _softmax_in_blocks_(
    logits: torch.Tensor, index: torch.Tensor, counted: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_softmax_` over rows that fit into a block, so that fp32 numbers of a chunk are never all alive."""
    rows = max(1, BLOCK_NUMBERS // logits.shape[1])
    pieces = [
        _softmax_(*cut, *settings) for cut in zip(*(x.split(rows) for x in (logits, index, counted)), strict=True)
    ]
    losses, at_label = zip(*pieces, strict=True)
    return torch.cat(losses), torch.cat(at_label)
