"""Configuration of the Steel architecture; travels with every exported model.

Field names are those of the original Steel-LLM, so that its `config.json` can be read once `model_type` is
changed from `qwen2` (which collides with a built-in class) to `steel`. Depends on transformers alone
(4.57 and 5.x); must not know how, where or on what the model is trained.
"""

from typing import Any

from transformers import PretrainedConfig

FFN_TYPES = ("raw", "softmoe_v1", "softmoe_v2", "softmoe_v3", "softmoe_causal")
MLP_TYPES = ("raw", "senet")
CAUSAL_SLOTS = ("prefix", "lagged")
# Fields of the original that select behaviour it never used. They are dropped, because transformers would build
# a sliding-window cache from them.
_UNUSED = ("sliding_window", "use_sliding_window", "max_window_layers")
_AUTO_MAP = {
    "AutoConfig": "configuration_steel.SteelConfig",
    "AutoModel": "modeling_steel.SteelModel",
    "AutoModelForCausalLM": "modeling_steel.SteelForCausalLM",
}


class SteelConfig(PretrainedConfig):
    """Sizes and choices of a Steel model.

    Args:
        vocab_size: rows of the embedding and of the head.
        hidden_size: width h of the residual stream; a multiple of `num_attention_heads`.
        intermediate_size: with `mlp_div_ratio`, the inner width of an MLP: `intermediate_size // mlp_div_ratio`.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads (fewer than query heads: grouped-query attention).
        max_position_embeddings: the longest sequence the model is meant for; nothing is allocated from it.
        FFN_type: `raw` (one MLP per token), `softmoe_v1` (softmax mixture of all experts per token), `softmoe_v2`
            and `softmoe_v3` (soft slots over the whole sequence: every token sees later ones), `softmoe_causal`
            (soft slots over what lies before a token).
        mlp_type: `raw` (SwiGLU) or `senet` (two SwiGLUs, one into and one out of the inner width).
        n_experts: experts of a soft mixture.
        slots_per_expert: slots p that each expert of v2 and v3 reads per sequence, of softmoe_causal per token
            (`prefix`) or per segment (`lagged`).
        causal_slots: of softmoe_causal: `prefix` (slots are running means up to the token itself) or `lagged` (slots
            hold the segment before the token's, beside a shared MLP of `intermediate_size`).
        segment_length: tokens of a segment of `lagged`.
        mlp_div_ratio: divides `intermediate_size`, for dense MLPs too.
        rope_theta: base of the rotary embedding.
        rope_parameters: the same in the form of transformers 5; only `rope_type: default` exists.
        initializer_range: standard deviation of Linear and Embedding weights.

    Raises:
        ValueError: a choice that does not exist, or sizes that cannot be built.
    """

    model_type = "steel"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (the Trainer adds a list to it)

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 1792,
        intermediate_size: int = 1792,
        num_hidden_layers: int = 18,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 32768,
        FFN_type: str = "raw",
        mlp_type: str = "senet",
        n_experts: int = 6,
        slots_per_expert: int = 1,
        causal_slots: str = "prefix",
        segment_length: int = 256,
        mlp_div_ratio: int = 1,
        hidden_act: str = "silu",
        rope_theta: float = 1e6,
        rope_parameters: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        attention_dropout: float = 0.0,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("use_sliding_window"):
            raise ValueError("use_sliding_window: Steel has no sliding-window attention")
        for name in _UNUSED:
            kwargs.pop(name, None)
        rope = dict(rope_parameters or kwargs.pop("rope_scaling", None) or {})
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"rope_parameters: Steel knows rope_type 'default' only, got {rope}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.FFN_type = FFN_type
        self.mlp_type = mlp_type
        self.n_experts = n_experts
        self.slots_per_expert = slots_per_expert
        self.causal_slots = causal_slots
        self.segment_length = segment_length
        self.mlp_div_ratio = mlp_div_ratio
        self.hidden_act = hidden_act
        self.rope_theta = float(rope.get("rope_theta", rope_theta))
        self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta}
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.attention_dropout = attention_dropout
        self.use_cache = use_cache
        self._refuse_impossible_values()
        kwargs.setdefault("auto_map", dict(_AUTO_MAP))
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
    def sees_future(self) -> bool:
        """True where the FFN mixes over the sequence, so that the training loss is not a next-token loss."""
        return self.FFN_type in ("softmoe_v2", "softmoe_v3")

    @property
    def inner_size(self) -> int:
        """Width of one MLP or expert."""
        return self.intermediate_size // self.mlp_div_ratio

    def _refuse_impossible_values(self) -> None:
        choices = {
            "FFN_type": FFN_TYPES, "mlp_type": MLP_TYPES, "causal_slots": CAUSAL_SLOTS, "hidden_act": ("silu",),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "n_experts", "slots_per_expert", "segment_length", "mlp_div_ratio", "intermediate_size",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a whole number")
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"num_attention_heads: a head of {self.hidden_size // self.num_attention_heads} dimensions is odd, "
                "and the rotary embedding turns pairs"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.inner_size < 1:
            raise ValueError(
                f"intermediate_size: {self.intermediate_size} // mlp_div_ratio {self.mlp_div_ratio} leaves no MLP"
            )


SteelConfig.register_for_auto_class()
