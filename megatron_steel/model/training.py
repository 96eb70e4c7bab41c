"""A model in the form in which it is trained: token sums instead of means, and never all logits.

`prepare_for_training` puts a `ChunkedHead` where the head was (same Parameter, same name) and lays a forward over the
instance that returns the summed loss. Both can be taken off again: the class, the weights and `state_dict` are
untouched. Only classes for which a test proves the equal loss take this road; any other keeps its own forward and
pays for whole logits. Knows nothing of ranks, precision or data.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from megatron_steel.errors import SteelError
from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.model.head import IGNORE, ChunkedHead
from megatron_steel.model.own import own_class


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    return {}


def _scaled(config: PretrainedConfig) -> dict[str, Any]:
    return {"logit_scale": 1 / config.logits_scaling}


def _capped(config: PretrainedConfig) -> dict[str, Any]:
    return {"logit_cap": config.final_logit_softcapping}


# Classes whose logits are head(base model's last hidden state), and what they do to them afterwards.
# tests/model/test_training.py proves each line against the class's own forward.
_HEADS: dict[str, Callable[[PretrainedConfig], dict[str, Any]]] = {
    "SteelForCausalLM": _plain,
    "NanoGPTForCausalLM": _plain,
    "OpenELMForCausalLM": _plain,
    "LlamaForCausalLM": _plain,
    "MistralForCausalLM": _plain,
    "Qwen2ForCausalLM": _plain,
    "Qwen3ForCausalLM": _plain,
    "SmolLM3ForCausalLM": _plain,
    "OlmoForCausalLM": _plain,
    "Olmo2ForCausalLM": _plain,
    "GPTNeoXForCausalLM": _plain,
    "PhiForCausalLM": _plain,
    "GPT2LMHeadModel": _plain,
    "GraniteForCausalLM": _scaled,
    "Gemma3ForCausalLM": _capped,
}
# Classes for which a test proves that packed documents are as good as separate ones. (Gemma mixes sliding-window
# layers in, which one mask for all layers would switch off.)
_DOCUMENTS = frozenset(_HEADS) - {"Gemma3ForCausalLM"}


def prepare_for_training(model: PreTrainedModel, activation_checkpointing: bool = False) -> PreTrainedModel:
    """The same object, whose call is now `model(input_ids=, labels=None, document_ids=None)`.

    Args:
        activation_checkpointing: keep only the input of each layer and compute the rest again in the backward pass.

    The call takes int64 [B, T] tensors; `labels` are already shifted, -100 is ignored; `document_ids` number the
    packed documents, which then do not attend to each other and each count their positions from 0. It returns the
    SUM of token losses (fp32 scalar), or without `labels` the logits [B, T, V].

    Raises:
        SteelError: the class knows no activation checkpointing; at the call: the class cannot mask documents.
    """
    model.train()  # from_pretrained returns a model in eval mode, without dropout and without checkpointing
    if activation_checkpointing:
        _enable_checkpointing(model)
    name = type(model).__name__
    known = own_class(model.config) is not None or type(model).__module__.startswith("transformers.models.")
    head = _swap_head(model, _HEADS[name](model.config)) if known and name in _HEADS else None
    # Some classes name a base that they do not have; base_model is then the model itself.
    base = model.base_model if model.base_model is not model else model.get_decoder()
    shipped_forward = model.forward

    def forward(
        input_ids: torch.Tensor, labels: torch.Tensor | None = None, document_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "use_cache": False}
        if document_ids is not None:  # with no mask at all attention takes its fast causal path
            require_document_mask(model)
            inputs |= document_inputs(document_ids)
        if labels is not None and head is not None:
            return head(base(**inputs)[0], labels)
        logits = shipped_forward(**inputs).logits
        if labels is None:
            return logits
        return F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )  # fmt: skip

    model.forward = forward  # type: ignore[method-assign]
    return model


def as_shipped(model: PreTrainedModel) -> PreTrainedModel:
    """Take the training forward off again: the call, `generate` and outputs are the class's own."""
    model.__dict__.pop("forward", None)
    return model


def require_document_mask(model: PreTrainedModel) -> None:
    """Raise SteelError where documents that lie in one sample cannot be kept apart."""
    if isinstance(model.config, SteelConfig) and model.config.sees_future:
        raise SteelError(
            f"FFN_type {model.config.FFN_type} mixes all tokens of a sample, also across documents",
            "data.document_mask",
            "set data.document_mask=false, or a causal FFN_type (raw, softmoe_v1, softmoe_causal)",
        )
    if type(model).__name__ not in _DOCUMENTS:
        what = f"{type(model).__name__} is not proven to keep packed documents apart"
        raise SteelError(what, "data.document_mask", "set data.document_mask=false")


def document_inputs(document_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a transformers model takes in place of document numbers [B, T].

    Returns:
        attention_mask: boolean [B, 1, T, T], True where a token may attend: same document, not later.
        position_ids: int64 [B, T], from 0 in every document.
    """
    T = document_ids.shape[1]
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=document_ids.device).tril()
    place = torch.arange(T, device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    start = place.where(begins, 0).cummax(dim=1).values
    return {"attention_mask": same & causal, "position_ids": place - start}


def _swap_head(model: PreTrainedModel, settings: dict[str, Any]) -> ChunkedHead:
    linear = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is linear)
    parent, _, last = name.rpartition(".")
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"the head {name} of {type(model).__name__} is no nn.Linear")
    head = ChunkedHead(linear, **settings)
    setattr(model.get_submodule(parent), last, head)
    return head


def _enable_checkpointing(model: PreTrainedModel) -> None:
    # transformers 5 renamed the method; the old name warns there and is gone in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if not model.supports_gradient_checkpointing:
        what = f"{type(model).__name__} knows no activation checkpointing"
        raise SteelError(what, "train.activation_checkpointing", "set it to false")
    enable({"use_reentrant": False})
