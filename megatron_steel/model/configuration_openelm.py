"""Configuration of OpenELM, whose layers grow wider with depth; travels with every exported model.

Field names are those of the published `config.json`. Depends on transformers alone (4.57 and 5.x); must not know how,
where or on what the model is trained.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_openelm.OpenELMConfig",
    "AutoModel": "modeling_openelm.OpenELMModel",
    "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
}


def divisible(value: float, divisor: int) -> int:
    """The nearest multiple of `divisor`, at least one, and one more where rounding took over a tenth (corenet's rule)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def spread(ends: Sequence[float], layers: int) -> list[float]:
    """Multipliers of all layers, evenly from the first to the last, rounded to two decimals as the original rounds them."""
    first, last = ends
    step = (last - first) / max(1, layers - 1)
    return [round((first + step * i) * 100) / 100 for i in range(layers)]


class OpenELMConfig(PretrainedConfig):
    """Sizes of an OpenELM model (corenet, general_gpt.py; arXiv:2404.14619, section 2.1).

    Args:
        vocab_size: rows of the embedding and, tied, of the head.
        max_context_length: the longest sequence the model is meant for; nothing is allocated from it.
        num_transformer_layers: decoder layers L.
        model_dim: width D of the residual stream.
        head_dim: dimensions of a head, even.
        num_gqa_groups: query heads that share one key/value head.
        qkv_multipliers: query width of the first and of the last layer as shares of D; between them evenly.
        ffn_multipliers: inner FFN width of the first and of the last layer as multiples of D.
        ffn_dim_divisor: FFN widths are multiples of it; query widths of `head_dim * num_gqa_groups`.
        normalize_qk_projections: RMSNorm of each query and key head, one weight of `head_dim` for all heads of a layer.
        rope_freq_constant: base of the rotary embedding.
        rms_norm_eps: of every RMSNorm.

    Attributes:
        num_query_heads, num_kv_heads, ffn_dims: of each layer, computed.

    Raises:
        ValueError: sizes that cannot be built.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (the Trainer adds a list to it)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        max_context_length: int = 2048,
        num_transformer_layers: int = 16,
        model_dim: int = 1280,
        head_dim: int = 64,
        num_gqa_groups: int = 4,
        qkv_multipliers: Sequence[float] = (0.5, 1.0),
        ffn_multipliers: Sequence[float] = (0.5, 4.0),
        ffn_dim_divisor: int = 256,
        normalize_qk_projections: bool = True,
        rope_freq_constant: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.max_context_length = max_context_length
        self.num_transformer_layers = num_transformer_layers
        self.model_dim = model_dim
        self.head_dim = head_dim
        self.num_gqa_groups = num_gqa_groups
        self.qkv_multipliers = list(qkv_multipliers)
        self.ffn_multipliers = list(ffn_multipliers)
        self.ffn_dim_divisor = ffn_dim_divisor
        self.normalize_qk_projections = normalize_qk_projections
        self.rope_freq_constant = rope_freq_constant
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self._refuse_impossible_values()
        kwargs.setdefault("auto_map", dict(_AUTO_MAP))
        for computed in ("num_query_heads", "num_kv_heads", "ffn_dims"):
            kwargs.pop(computed, None)
        shared: dict[str, Any] = {
            "tie_word_embeddings": tie_word_embeddings,
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
        }
        super().__init__(**shared, **kwargs)
        for name, value in shared.items():  # not every transformers keeps what the class does not declare
            setattr(self, name, value)

    @property
    def num_query_heads(self) -> list[int]:
        unit = self.head_dim * self.num_gqa_groups
        shares = spread(self.qkv_multipliers, self.num_transformer_layers)
        return [divisible(self.model_dim * share, unit) // self.head_dim for share in shares]

    @property
    def num_kv_heads(self) -> list[int]:
        return [heads // self.num_gqa_groups for heads in self.num_query_heads]

    @property
    def ffn_dims(self) -> list[int]:
        shares = spread(self.ffn_multipliers, self.num_transformer_layers)
        return [divisible(self.model_dim * share, self.ffn_dim_divisor) for share in shares]

    def _refuse_impossible_values(self) -> None:
        for name in (
            "vocab_size", "max_context_length", "num_transformer_layers", "model_dim", "head_dim", "num_gqa_groups",
            "ffn_dim_divisor",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a whole number above 0")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd, and the rotary embedding turns pairs")
        for name in ("qkv_multipliers", "ffn_multipliers"):
            ends = getattr(self, name)
            if len(ends) != 2 or not all(isinstance(end, (int, float)) and end > 0 for end in ends):
                raise ValueError(f"{name}: {ends!r} are not two numbers above 0, of the first layer and of the last")


OpenELMConfig.register_for_auto_class()
