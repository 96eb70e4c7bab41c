"""A model in the form in which it is trained: token sums instead of means, and never all logits.

`prepare_for_training` puts a head that returns the loss where the head was (same Parameter, same name), lays the chosen
kernels over the modules, and a forward over the instance that returns the summed loss. All can be taken off again: the
class, the weights and `state_dict` are untouched. Only classes for which a test proves the equal loss take this road;
any other keeps its own forward and pays for whole logits. Knows nothing of ranks, precision or data.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from megatron_steel.errors import SteelError
from megatron_steel.model import fused, regions
from megatron_steel.model.attention import document_inputs
from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.model.head import ChunkedHead, LigerHead, LossHead, PlainHead, plain_loss
from megatron_steel.model.kernels import Choice
from megatron_steel.model.own import own_class
from megatron_steel.model.text_to_text import forward_of, is_text_to_text


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
    "T5ForConditionalGeneration": _plain,  # its scaling is `text_to_text.forward_of`'s
}
# Classes for which a test proves that packed documents are as good as separate ones. (Gemma mixes sliding-window
# layers in, which one mask for all layers would switch off.)
_DOCUMENTS = frozenset(_HEADS) - {"Gemma3ForCausalLM", "T5ForConditionalGeneration"}


def prepare_for_training(
    model: PreTrainedModel,
    activation_checkpointing: bool = False,
    kernels: Choice = Choice(),  # noqa: B008  (frozen)
    z_loss: float = 0.0,
) -> PreTrainedModel:
    """The same object, whose call is now `model(input_ids=, labels=None, document_ids=None)`.

    Args:
        activation_checkpointing: keep only the input of each layer and compute the rest again in the backward pass.
        kernels: how it is computed; the default is the plain road, on every device.
        z_loss: coefficient of log(Z)^2, in the gradient alone (see `LossHead`).

    The call takes int64 [B, T] tensors; `labels` are already shifted, -100 is ignored; `document_ids` number the
    packed documents, which then do not attend to each other and each count their positions from 0. It returns the
    SUM of token losses (fp32 scalar), or without `labels` the logits [B, T, V]. An encoder-decoder's call is that of
    `text_to_text.forward_of`.

    Raises:
        SteelError: the class knows no activation checkpointing; at the call: the class cannot mask documents.
    """
    model.train()  # from_pretrained returns a model in eval mode, without dropout and without checkpointing
    if activation_checkpointing:
        _enable_checkpointing(model, kernels)
    name = type(model).__name__
    known = own_class(model.config) is not None or type(model).__module__.startswith("transformers.models.")
    settings = _HEADS[name](model.config) if known and name in _HEADS else None
    head = None if settings is None else _swap_head(model, kernels, settings | {"z_loss": z_loss})
    if is_text_to_text(model.config):
        assert head is not None, name  # build_config lets no other class in
        model.forward = forward_of(model, head, kernels.attention.kernels)  # type: ignore[method-assign]
        _lay_kernels(model, kernels)
        return model
    # Some classes name a base that they do not have; base_model is then the model itself.
    base = model.base_model if model.base_model is not model else model.get_decoder()
    shipped_forward = model.forward
    _lay_kernels(model, kernels)

    def forward(
        input_ids: torch.Tensor, labels: torch.Tensor | None = None, document_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "use_cache": False}
        if document_ids is not None:  # with no mask at all attention takes its fast causal path
            require_document_mask(model)
            inputs |= document_inputs(document_ids, kernels.attention.implementation)
        with kernels.attention.kernels():
            if labels is not None and head is not None:
                hidden = base(**inputs)[0]
            else:
                logits = shipped_forward(**inputs).logits
        if labels is None:
            return logits
        return plain_loss(logits.flatten(0, 1), labels.flatten(), z_loss) if head is None else head(hidden, labels)

    model.forward = forward  # type: ignore[method-assign]
    return model


def as_shipped(model: PreTrainedModel) -> PreTrainedModel:
    """Take all that was laid over it off again: the call, `generate` and outputs are the class's own."""
    model.__dict__.pop("forward", None)
    regions.put_back(model)
    fused.put_back(model)
    shipped = model.__dict__.pop("_shipped_attention", None)
    if shipped is not None:
        model.set_attn_implementation(shipped)
    return model


def _lay_kernels(model: PreTrainedModel, kernels: Choice) -> None:
    if kernels.attention.implementation is not None:
        model.__dict__["_shipped_attention"] = model.config._attn_implementation
        model.set_attn_implementation(kernels.attention.implementation)
    if kernels.fused != "torch":
        fused.fuse(model, kernels.fused)
    if kernels.compile:
        regions.compile_layers(model, fall_back=kernels.fall_back)


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


def _swap_head(model: PreTrainedModel, kernels: Choice, settings: dict[str, Any]) -> LossHead:
    linear = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is linear)
    parent, _, last = name.rpartition(".")
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"the head {name} of {type(model).__name__} is no nn.Linear")
    head: LossHead
    if kernels.head == "chunked":
        head = ChunkedHead(linear, compiled=kernels.compile, **settings)
    else:
        head = {"liger": LigerHead, "plain": PlainHead}[kernels.head](linear, **settings)
    setattr(model.get_submodule(parent), last, head)
    return head


def _enable_checkpointing(model: PreTrainedModel, kernels: Choice) -> None:
    # transformers 5 renamed the method; the old name warns there and is gone in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if not model.supports_gradient_checkpointing:
        what = f"{type(model).__name__} knows no activation checkpointing"
        raise SteelError(what, "train.activation_checkpointing", "set it to false")
    again: dict[str, Any] = {}
    if kernels.attention.backends and not kernels.compile:  # a graph has its back end in it
        again["context_fn"] = lambda: (kernels.attention.kernels(), kernels.attention.kernels())
    enable({"use_reentrant": False} | again)
