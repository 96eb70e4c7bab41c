"""Encoder-decoders: which are known, which class of transformers they are, and their forward pass in training.

A prompt goes into the encoder, its response comes out of the decoder, which reads it one place to the right (T5's own
shift). The head gives the summed loss, as for causal models. Knows nothing of ranks, precision or data.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from megatron_steel.errors import SteelError

TEXT_TO_TEXT = ("t5",)
"""The `model_type`s for which tests prove loss and export (tests/model/test_text_to_text.py)."""


def is_text_to_text(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' entry for models of this configuration."""
    return AutoModelForSeq2SeqLM if is_text_to_text(config) else AutoModelForCausalLM


def known_type(name: str) -> bool:
    """Whether `model.type` names an encoder-decoder that is known. Raises SteelError for one that is not."""
    if name in TEXT_TO_TEXT:
        return True
    if name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and name in CONFIG_MAPPING:
        what = f"{name!r} is an encoder-decoder, and of those only {', '.join(TEXT_TO_TEXT)} is proven to train and to export"
        raise SteelError(what, "model.type", f"use {TEXT_TO_TEXT[0]}, or a causal model")
    return False


def complete(config: PretrainedConfig, where: object) -> PretrainedConfig:
    """The same object with the token that a response begins from: T5 takes padding. Raises SteelError for an unknown class.

    Args:
        where: named in the error.
    """
    if not is_text_to_text(config):
        return config
    if config.model_type not in TEXT_TO_TEXT:
        known_type(str(config.model_type))
        what = f"model_type {config.model_type!r} is an encoder-decoder, and of those only {', '.join(TEXT_TO_TEXT)} is known"
        raise SteelError(what, where, f"use {TEXT_TO_TEXT[0]}, or a causal model")
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    if config.decoder_start_token_id is None:
        raise SteelError("a response begins from no token", "model.config.decoder_start_token_id", "set it, as to 0")
    return config


def require_plain(model: PreTrainedModel, compiled: bool, document_mask: bool) -> None:
    """Raise SteelError for what a causal model has and an encoder-decoder has not."""
    if document_mask:
        what = f"{type(model).__name__} trains on pairs, one in a row: there are no packed documents to keep apart"
        raise SteelError(what, "data.document_mask", "set data.document_mask=false")
    if compiled:
        what = (
            f"{type(model).__name__} is not compiled: pairs come in many lengths, each of which would be compiled anew"
        )
        raise SteelError(what, "kernels.compile=true", "use kernels.compile=auto")


def forward_of(model: Any, head: nn.Module, kernels: Callable[[], Any]) -> Callable[..., torch.Tensor]:
    """The call of a model in training.

    Args:
        head: returns the summed loss of hidden states and labels (`head.LossHead`), and lies where the model's head was.
        kernels: the context that attention runs in.

    Returns a function of int64 tensors: `input_ids` [B, S], `attention_mask` [B, S] (1 where a prompt is), `labels` [B, T],
    not shifted, -100 is ignored. It returns the SUM of token losses (fp32 scalar).
    """
    # T5 with tied embeddings, whose rows are about 1 each: Mesh TensorFlow's scaling of the decoder's output.
    scale = model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with kernels():
            prompt = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
            hidden = model.get_decoder()(
                input_ids=model._shift_right(labels),
                encoder_hidden_states=prompt,
                encoder_attention_mask=attention_mask,
                use_cache=False,
            )[0]
            return head(hidden * scale if scale != 1.0 else hidden, labels)

    return forward
