"""The language-model head: linear and cross-entropy in one, without ever holding all logits.

At 152k words the logits of 16k tokens take 5 GB in bf16 and 10 GB more for an fp32 softmax. Here a few thousand
tokens at a time become logits, loss and gradient in place, and the gradients of hidden states and weight are
finished before `forward` returns; `backward` only scales them. The work lies in the module's own `forward`, so
that ZeRO-3's hooks gather the weight for it. Knows nothing of models, recipes or ranks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

IGNORE = -100
CHUNK_TOKENS = 4096  # 1.2 GB of bf16 logits at 152k words, and GEMMs still large enough for a GPU's full speed


class ChunkedHead(nn.Linear):
    """`nn.Linear` (same parameters, same names) that can also return the loss.

    Args:
        linear: the head to take over; its Parameter objects are kept, so that tied weights stay tied.
        logit_scale: factor on the logits before the loss (Granite: 1 / logits_scaling).
        logit_cap: logits become cap * tanh(logits / cap) before the loss (Gemma), or None.
        chunk_tokens: tokens whose logits exist at one time.
    """

    def __init__(
        self,
        linear: nn.Linear,
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: it would draw a weight only to throw it away
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.logit_scale, self.logit_cap, self.chunk_tokens = logit_scale, logit_cap, chunk_tokens

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
            settings = (self.logit_scale, self.logit_cap, self.chunk_tokens, torch.is_grad_enabled())
            return _SummedLoss.apply(hidden, weight, bias, labels.reshape(-1), *settings)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        scale: float,
        cap: float | None,
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
        for start in range(0, len(labels), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[rows], weight, bias)
            losses[rows], slope = _loss_and_slope(logits, labels[rows], scale, cap, wants_any)
            del logits
            if grad_bias is not None:
                grad_bias += slope.sum(0, dtype=torch.float32)
            if wants_any:
                slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(slope.t(), hidden[rows])
            del slope  # or the next chunk's logits would live beside it
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


def _loss_and_slope(
    logits: torch.Tensor, labels: torch.Tensor, scale: float, cap: float | None, wants_slope: bool
) -> tuple[torch.Tensor, Any]:
    """Losses [t] in fp32, 0 where ignored, and d(sum of losses)/d(logits) [t, V] in fp32 (None unless wanted).

    `logits` [t, V] is used up. One fp32 matrix of its size is alive, two with a cap.
    """
    z = logits.float()  # the same tensor when it is fp32 already
    if scale != 1.0:
        z.mul_(scale)
    bend = None
    if cap is not None:
        z.div_(cap).tanh_()
        bend = 1 - z.square() if wants_slope else None  # derivative of cap * tanh(z / cap)
        z.mul_(cap)
    counted = labels != IGNORE
    index = labels.where(counted, 0)[:, None]
    z.sub_(z.amax(dim=-1, keepdim=True))
    picked = z.gather(1, index).squeeze(1)
    total = z.exp_().sum(dim=-1)
    losses = (total.log() - picked).where(counted, 0.0)
    if not wants_slope:
        return losses, None
    slope = z.mul_((counted / total)[:, None])
    slope.scatter_add_(1, index, -counted[:, None].to(slope.dtype))
    if bend is not None:
        slope.mul_(bend)
    if scale != 1.0:
        slope.mul_(scale)
    return losses, slope
