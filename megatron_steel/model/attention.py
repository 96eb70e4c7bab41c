"""Which kernel computes attention on this device, and what it is told of documents that lie in one sample.

1. `choose_attention` takes the kernel that a name means here, or says why it cannot run.
2. `Attention.kernels()` is laid around a forward pass (and around what activation checkpointing computes again).
3. `document_inputs` turns document numbers into what that kernel reads: a block mask for FlexAttention, lengths for
   FlashAttention, and a dense mask only where neither is at hand, which on a GPU costs the fast kernels.

Knows nothing of layers, heads, recipes or ranks.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from megatron_steel.errors import SteelError

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_FLASH = ("flash_attention_2", "flash_attention_3")
_HOPPER = (9, 0)
_BLOCK = 128  # tokens of a block of FlexAttention's masks


@dataclass(frozen=True)
class Attention:
    """A kernel in transformers' name; for `sdpa` the back ends torch may take, in that order (none: torch's own order)."""

    implementation: str | None = None
    """`sdpa`, `flex_attention`, `flash_attention_2`, `flash_attention_3`; None: what the model came with."""
    backends: tuple[str, ...] = ()
    dense: bool = False
    """Documents are told by a mask [T, T] on a GPU: slow, and only where nothing else runs."""

    def kernels(self) -> contextlib.AbstractContextManager[None]:
        """Only these back ends, in this order, inside."""
        if not self.backends:
            return contextlib.nullcontext()
        return sdpa_kernel([_SDPA[name] for name in self.backends], set_priority=True)

    def __str__(self) -> str:
        name = self.implementation or "the class's own"
        name += f" ({', '.join(self.backends)})" if self.backends else ""
        return name + (" with a dense mask, as no kernel for packed documents runs here" if self.dense else "")


def choose_attention(
    name: str, model: PreTrainedModel, device: torch.device, documents: bool, dtype: torch.dtype
) -> Attention:
    """The attention that `kernels.attention` means on this device.

    `auto` never fails. On a CPU it is torch's own. On a GPU: FlashAttention 3 where it is installed and the GPU is a
    Hopper; else torch's kernels, cuDNN first on Hopper (transformers PR 48163: 1.7 to 2.3 times its FlashAttention-2
    there, slower before), FlashAttention-2 first elsewhere. For documents: FlashAttention where installed, else
    FlexAttention.

    Args:
        model: may lie on the meta device.
        documents: packed documents are kept apart.
        dtype: of queries and keys.

    Raises:
        SteelError: the kernel asked for cannot run here.
    """
    if name == "auto":
        return _fastest(model, device, documents, dtype)
    problem = _problem(name, model, device, documents, dtype)
    if problem:
        raise SteelError(f"attention by {name} cannot run here: {problem[0]}", f"kernels.attention={name}", problem[1])
    return _named(name)


def _named(name: str) -> Attention:
    if name in _SDPA:
        return Attention("sdpa", (name,))
    return Attention("flex_attention" if name == "flex" else name)


def _fastest(model: PreTrainedModel, device: torch.device, documents: bool, dtype: torch.dtype) -> Attention:
    if device.type != "cuda" or not model._supports_sdpa:
        return Attention()
    if getattr(
        model.config, "is_encoder_decoder", False
    ):  # see `_problem`; the gradient of the bias adds up in any order
        return Attention("sdpa", ("math",) if torch.are_deterministic_algorithms_enabled() else ("efficient", "math"))
    hopper = torch.cuda.get_device_capability(device) == _HOPPER
    if torch.are_deterministic_algorithms_enabled():  # the other backward passes add up in any order
        order = ["flex"] if documents else []
        backends: tuple[str, ...] = ("flash", "math")
    else:
        order = ["flash_attention_3"] if hopper else []
        order += ["flash_attention_2", "flex"] if documents else []
        backends = ("cudnn", "flash", "efficient", "math") if hopper else ("flash", "cudnn", "efficient", "math")
    for name in order:
        if _problem(name, model, device, documents, dtype) is None:
            return _named(name)
    return Attention("sdpa", backends, dense=documents)


def _problem(
    name: str, model: PreTrainedModel, device: torch.device, documents: bool, dtype: torch.dtype
) -> tuple[str, str] | None:
    """What is missing, and how to get it; None where the kernel runs."""
    auto = "use kernels.attention=auto"
    if getattr(model.config, "is_encoder_decoder", False) and name not in ("efficient", "math"):
        return "relative positions are a bias on the scores, learned, which it does not take", auto
    cuda = device.type == "cuda"
    if not cuda and name not in ("flash", "math"):
        return f"it needs a CUDA device, and this is {device.type}", auto
    if name in _SDPA:
        if cuda and documents:
            return "it knows documents only by a dense mask", "use kernels.attention=flex, flash_attention_2 or auto"
        return _why_not(lambda: _try_sdpa(name, model, device, dtype), f"{auto}, or another train.precision")
    if name == "flex":
        return _flex_problem(model)
    if not model._supports_flash_attn:
        return f"{type(model).__name__} does not know it", auto
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not in {dtype}".replace("torch.", ""), "set train.precision=bf16"
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        return "flash-attn is not installed", "pip install flash-attn --no-build-isolation (needs nvcc), or " + auto
    if name == "flash_attention_3" and not is_flash_attn_3_available():
        build = "build it from the folder hopper/ of github.com/Dao-AILab/flash-attention, or "
        return "FlashAttention 3 is not installed (the PyPI package flash-attn does not hold it)", build + auto
    return _why_not(lambda: _try_flash(name, model, device, dtype), auto)


def _flex_problem(model: PreTrainedModel) -> tuple[str, str] | None:
    from torch.utils._triton import has_triton

    if not model._supports_flex_attn:
        return f"{type(model).__name__} does not know it", "use kernels.attention=auto"
    if attention_dropout(model.config) > 0:
        return "it has no dropout", "set the model's attention dropout to 0, or kernels.attention=auto"
    if not has_triton():
        return "it is compiled by triton, which does not work here", "pip install triton, and a C compiler (gcc)"
    return None


def attention_dropout(config: Any) -> float:
    text = config.get_text_config()
    return float(getattr(text, "attention_dropout", None) or getattr(text, "attn_pdrop", None) or 0.0)


def _why_not(attempt: Callable[[], None], remedy: str) -> tuple[str, str] | None:
    """Run a kernel once on a few numbers: only that shows that it takes this head size, and that its build fits."""
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            attempt()
        except Exception as error:  # whatever a foreign kernel raises
            lines = [str(w.message).splitlines()[0] for w in said] or str(error).splitlines() or [type(error).__name__]
            return lines[-1], remedy
    return None


def _few_numbers(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, kv: bool = False
) -> tuple[int, torch.Tensor]:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    shape = (1, kv_heads if kv else heads, _BLOCK, size)
    return heads // kv_heads, torch.zeros(shape, device=device, dtype=dtype, requires_grad=True)


def _try_sdpa(name: str, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    (groups, query), (_, key) = (_few_numbers(model, device, dtype, kv) for kv in (False, True))
    with _named(name).kernels():
        out = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=groups > 1)
        out.sum().backward()


def _try_flash(name: str, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    import importlib

    module = importlib.import_module(
        {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[name]
    )
    (_, query), (_, key) = (_few_numbers(model, device, dtype, kv) for kv in (False, True))
    out = module.flash_attn_func(query.transpose(1, 2), key.transpose(1, 2), key.transpose(1, 2), causal=True)
    (out[0] if isinstance(out, tuple) else out).sum().backward()


# ---- documents


def document_inputs(document_ids: torch.Tensor, implementation: str | None = None) -> dict[str, Any]:
    """What a transformers model takes in place of document numbers [B, T].

    Args:
        implementation: the attention that will read it, in transformers' name.

    Returns:
        position_ids: int64 [B, T], from 0 in every document; and one of
        attention_mask: a BlockMask for `flex_attention`; else boolean [B, 1, T, T], True where a token may attend: same
            document, not later.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, for FlashAttention: int32 [documents + 1], where
            each document begins among all B T tokens, and T.
    """
    T = document_ids.shape[1]
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    place = torch.arange(T, device=document_ids.device).expand_as(document_ids)
    inputs: dict[str, Any] = {"position_ids": place - place.where(begins, 0).cummax(dim=1).values}
    if implementation in _FLASH:
        starts = begins.flatten().nonzero().flatten()
        ends = F.pad(starts, (0, 1), value=begins.numel()).int()
        return inputs | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": T, "max_length_k": T}
    if implementation == "flex_attention":
        return inputs | {"attention_mask": document_blocks(begins)}
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=document_ids.device).tril()
    return inputs | {"attention_mask": same & causal}


def document_blocks(begins: torch.Tensor) -> Any:
    """FlexAttention's BlockMask from where documents begin, boolean [B, T].

    torch's `create_block_mask` evaluates all T x T pairs first; of runs of tokens the first and the last document of
    each block say the same.
    """
    from torch.nn.attention.flex_attention import BlockMask

    B, T = begins.shape
    n = -(-T // _BLOCK)
    run = begins.cumsum(1)  # never falls
    filled = F.pad(run, (0, n * _BLOCK - T), value=T + 1).view(B, n, _BLOCK)
    first, last = filled[..., 0], filled[..., -1]
    queries, keys = torch.arange(n, device=run.device)[:, None], torch.arange(n, device=run.device)
    some = (keys <= queries) & (last[:, None, :] >= first[:, :, None])
    every = (keys < queries) & (first[:, None, :] == last[:, :, None])

    def listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many key blocks each query block reads, and their numbers, those first."""
        numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[:, None], numbers.int()[:, None]

    def allow(b: Any, h: Any, q: Any, kv: Any) -> torch.Tensor:
        return (q >= kv) & (run[b, q] == run[b, kv])

    return BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=_BLOCK, mask_mod=allow, seq_lengths=(T, T)
    )
