"""What a model asks of a machine: operations and bytes for each token, sizes of its parameters.

Everything is counted from the configuration on the meta device (`model.flops`, `model.memory`): no data, no weights.
"""

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_steel.errors import SteelError
from megatron_steel.recipe import Model

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Work:
    """A model at one sequence length. Operations are for forward and backward, per token.

    Of an encoder-decoder: per token of a response of that length, whose prompt is as long.
    """

    sequence_length: int
    layers: int
    vocab_size: int
    sizes: tuple[int, ...]
    """Elements of each parameter; a tied one once."""
    largest_layer: int
    """Most elements that one module holds itself (DeepSpeed's `largest_layer_params`)."""
    gemm: float
    """Matrix products of the layers."""
    head: float
    """Matrix products of the language-model head."""
    attention: float
    """Attention; under a causal mask half of it."""
    hw: float
    """All of it in the hw convention (attention without a causal mask), for MFU."""
    six_n: float
    kept_bytes: float
    """Activations that a layer stack leaves for its backward pass, without checkpointing; also the measure of the
    memory traffic of everything that is no matrix product."""

    @property
    def parameters(self) -> int:
        return sum(self.sizes)


def work_of(config: "PretrainedConfig", sequence_length: int, precision: str = "bf16") -> Work:
    """Raises SteelError for a model whose operations nobody can count (sparse mixtures, convolutions)."""
    import torch

    from megatron_steel.model.build import construct
    from megatron_steel.model.flops import flops_per_full_pair, flops_per_token
    from megatron_steel.model.memory import activation_bytes_per_sample
    from megatron_steel.model.text_to_text import is_text_to_text

    pairs = is_text_to_text(config)
    flops = (flops_per_full_pair if pairs else flops_per_token)(config, sequence_length)
    if flops is None:
        what = f"the operations of a {config.model_type} model cannot be counted from its classes"
        raise SteelError(what, "model.type", "plan with a dense model of the same size")
    with torch.device("meta"):
        model = construct(config, torch.float32)
    model.tie_weights()
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    text = config.get_text_config()
    return Work(
        sequence_length=sequence_length,
        layers=text.num_hidden_layers + (config.num_decoder_layers if pairs else 0),
        vocab_size=text.vocab_size,
        sizes=tuple(p.numel() for p in model.parameters()),
        largest_layer=max(own),
        gemm=flops.hw - flops.attention - flops.head,
        head=flops.head,
        attention=flops.attention - (flops.hw - flops.causal),
        hw=flops.hw,
        six_n=flops.six_n,
        kept_bytes=activation_bytes_per_sample(config, sequence_length, precision) / sequence_length,
    )


def work_of_model(model: Model, sequence_length: int) -> Work:
    """The same from a recipe's section; counted once for each model and length."""
    return _counted(json.dumps([model.type, model.config]), sequence_length)


@functools.cache
def _counted(key: str, sequence_length: int) -> Work:
    from megatron_steel.model.build import build_config

    kind, config = json.loads(key)
    return work_of(build_config(Model(type=kind, config=config)), sequence_length)
