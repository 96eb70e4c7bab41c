"""Configuration of the GPT-2 without biases that nanoGPT trains; travels with every exported model.

Field names are those of transformers' GPT2Config. Depends on transformers alone (4.57 and 5.x); must not know how,
where or on what the model is trained.
"""

from typing import Any

from transformers import PretrainedConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_nanogpt.NanoGPTConfig",
    "AutoModel": "modeling_nanogpt.NanoGPTModel",
    "AutoModelForCausalLM": "modeling_nanogpt.NanoGPTForCausalLM",
}


class NanoGPTConfig(PretrainedConfig):
    """Sizes of a GPT-2 whose Linear and LayerNorm layers have no bias (nanoGPT, model.py, `bias=False`).

    Args:
        vocab_size: rows of the embedding and, tied, of the head; 50304 is GPT-2's 50257 padded.
        n_positions: rows of the learned position embedding: the longest sequence.
        n_embd: width h; a multiple of `n_head`. The FFN is 4 h wide.
        n_layer: decoder layers.
        n_head: attention heads.
        dropout: of embeddings, attention weights and both residual branches (0 in pretraining).
        layer_norm_epsilon: of every LayerNorm.
        initializer_range: standard deviation of all matrices; of the two residual projections of a layer divided by sqrt(2 n_layer).

    Raises:
        ValueError: sizes that cannot be built.
    """

    model_type = "nanogpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (the Trainer adds a list to it)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "attention_dropout": "dropout",
    }

    def __init__(
        self,
        vocab_size: int = 50304,
        n_positions: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        dropout: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.dropout = dropout
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a whole number above 0")
        if n_embd % n_head:
            raise ValueError(f"n_embd: {n_embd} is not a multiple of n_head {n_head}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is not in [0, 1)")
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


NanoGPTConfig.register_for_auto_class()
