"""OpenELM: layers that grow wider with depth. The file that is trained is the file that is shipped.

Pre-RMSNorm decoder with rotary positions, grouped-query attention with a norm of each query and key head, SwiGLU and tied
embeddings; every layer has its own number of heads and its own FFN width (layer-wise scaling). Parameter names and formulas
are corenet's (general_gpt.py; arXiv:2404.14619). Imports nothing but torch, transformers (4.57 and 5.x) and its
configuration; knows no ranks, precision or optimizer.

Shapes: B batch, T tokens, S keys (past + T), D model width, N query heads and K key/value heads of the layer, d head, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_openelm import OpenELMConfig

_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
# transformers 5.24 calls a model's keys and values `cache`; before they were `past_key_values`. Both are taken.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def eager_attention_forward(
    module: nn.Module, query, key, value, attention_mask=None, scaling=1.0, dropout=0.0, **kwargs
):
    """Plain attention, [B, N, T, d] -> [B, T, N, d]; the twin that sdpa is tested against."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores_BNTS = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores_BNTS = scores_BNTS.masked_fill(~attention_mask, torch.finfo(scores_BNTS.dtype).min)
    elif attention_mask is not None:
        scores_BNTS = scores_BNTS + attention_mask
    weights = torch.softmax(scores_BNTS, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def _named(cache: Cache | None) -> dict[str, Any]:
    """The cache under the name that this version's outputs have for it."""
    return {_CACHE: cache}


class OpenELMBranchEnd(nn.Linear):
    """The matrix that ends a residual branch: it is drawn smaller."""


class OpenELMRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size] in the dtype of x; mean square in fp32."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_tables(position_ids_BT: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [B, 1, T, d] in fp32. Computed in every forward: no buffer to cast, to shard or to load."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_BT.device) / head_dim
    angles_BTd = position_ids_BT[..., None].float() * theta**-exponents  # a product, not a matmul: autocast leaves it
    angles_BTd = torch.cat((angles_BTd, angles_BTd), dim=-1)[:, None]
    return angles_BTd.cos(), angles_BTd.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in fp32, rounded once to the dtype of x."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class OpenELMAttention(nn.Module):
    is_causal = True  # read by transformers' attention functions when there is no mask

    def __init__(self, config: OpenELMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.query_heads, self.kv_heads = config.num_query_heads[layer_idx], config.num_kv_heads[layer_idx]
        self.num_key_value_groups = config.num_gqa_groups
        self.scaling = self.head_dim**-0.5
        heads = self.query_heads + 2 * self.kv_heads
        self.qkv_proj = nn.Linear(config.model_dim, heads * self.head_dim, bias=False)
        self.q_norm, self.k_norm = (
            OpenELMRMSNorm(self.head_dim, config.rms_norm_eps) if config.normalize_qk_projections else nn.Identity()
            for _ in range(2)
        )
        self.out_proj = OpenELMBranchEnd(self.query_heads * self.head_dim, config.model_dim, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        B, T, _ = x.shape
        heads_BHTd = self.qkv_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads_BHTd.split([self.query_heads, self.kv_heads, self.kv_heads], dim=1)
        query, key = _rotate(self.q_norm(query), *rotary), _rotate(self.k_norm(key), *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        if name in (None, "eager"):
            attend = eager_attention_forward
        elif _TRANSFORMERS_5:  # both spellings: set_attn_implementation looks for them in this file
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        else:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.out_proj(out.reshape(B, T, -1))


class OpenELMFeedForward(nn.Module):
    def __init__(self, config: OpenELMConfig, layer_idx: int):
        super().__init__()
        inner = config.ffn_dims[layer_idx]
        self.proj_1 = nn.Linear(config.model_dim, 2 * inner, bias=False)  # gate, then value
        self.proj_2 = OpenELMBranchEnd(inner, config.model_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.proj_1(x).chunk(2, dim=-1)
        return self.proj_2(F.silu(gate) * value)


class OpenELMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: OpenELMConfig, layer_idx: int):
        super().__init__()
        self.attn = OpenELMAttention(config, layer_idx)
        self.ffn = OpenELMFeedForward(config, layer_idx)
        self.ffn_norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)
        self.attn_norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)

    def forward(self, hidden_states, rotary, attention_mask=None, past_key_values=None, **kwargs) -> torch.Tensor:
        x = hidden_states
        x = x + self.attn(self.attn_norm(x), rotary, attention_mask, past_key_values, **kwargs)
        return x + self.ffn(self.ffn_norm(x))


class OpenELMPreTrainedModel(PreTrainedModel):
    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenELMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """corenet's `reset_parameters`: 1/sqrt(inputs) of a matrix, 1/sqrt(D) of the embedding (also as the head), and
        1/sqrt(2 L D) of the two matrices that end a layer's branches."""
        # torch.nn.init functions only: transformers 5 guards them, so that loaded weights are not drawn again.
        width, layers = self.config.model_dim, self.config.num_transformer_layers
        if isinstance(module, nn.Linear):
            ends_branch = isinstance(module, OpenELMBranchEnd)
            nn.init.normal_(module.weight, std=(2 * layers * width if ends_branch else module.in_features) ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=width**-0.5)
        elif isinstance(module, OpenELMRMSNorm):
            nn.init.ones_(module.weight)


class OpenELMModel(OpenELMPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: OpenELMConfig):
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList([OpenELMDecoderLayer(config, i) for i in range(config.num_transformer_layers)])
        self.norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states [B, T, D].

        Args:
            input_ids: [B, T] (or `inputs_embeds` [B, T, D] instead).
            attention_mask: [B, S] with 0 for padding, or a complete [B, 1, T, S] mask: boolean (True: may attend) or
                additive. A complete mask is used as it is, so it must be causal itself.
            position_ids: [B, T]; counted from the cache's length when left out.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        past_key_values = cache if past_key_values is None else past_key_values
        x = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        wanted = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and wanted and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        mask = causal_mask(attention_mask, x, past, self.config._attn_implementation or "eager")
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_freq_constant)
        states = [x]
        for layer in self.layers:
            x = layer(x, rotary, mask, past_key_values, **kwargs)
            states.append(x)
        x = self.norm(x)
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*states[:-1], x) if shown else None,  # type: ignore[arg-type]
            **_named(past_key_values),
        )
        return output if return_dict in (None, True) else output.to_tuple()


def causal_mask(mask: Any, x: torch.Tensor, past: int, attention: str) -> Any:
    """What the chosen attention wants: None where the causal rule holds and it knows it by itself, the padding [B, S] for flash
    kernels, a BlockMask for flex, else a mask [B, 1, T, S]. A padded query with nothing to attend to attends to itself, and
    nobody reads it."""
    T, S = x.shape[1], past + x.shape[1]
    if mask is not None and not isinstance(mask, torch.Tensor):
        return mask  # a BlockMask
    if mask is not None and mask.dim() == 4:
        if "flash" in attention:
            raise ValueError(f"{attention} knows padding and the causal rule only: use sdpa for a complete mask")
        if mask.dtype != torch.bool:
            return mask.to(x.dtype)
        return _blocks(mask) if attention == "flex_attention" else mask
    if mask is not None and not torch.compiler.is_compiling() and bool(mask.all()):
        mask = None
    if "flash" in attention:
        return mask
    if mask is None and (T == 1 or (past == 0 and attention not in ("eager", "flex_attention"))):
        return None
    allowed = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(past)[None, None]
    if mask is not None:
        itself = torch.eye(T, S, dtype=torch.bool, device=x.device) if past == 0 else torch.zeros_like(allowed)
        allowed = allowed & mask[:, None, None, :S].bool() | itself
    return _blocks(allowed) if attention == "flex_attention" else allowed


def _blocks(allowed_B1TS: torch.Tensor) -> Any:
    """The same for flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    B, _, T, S = allowed_B1TS.shape
    same = B == 1  # one mask for all of the batch

    def allow(b: Any, n: Any, t: Any, s: Any) -> torch.Tensor:
        return allowed_B1TS[0 if same else b, 0, t, s]

    return create_block_mask(allow, B, None, T, S, device=str(allowed_B1TS.device))


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    """The model with its language-model head."""

    _tied_weights_keys: Any = (
        {"lm_head.weight": "transformer.token_embeddings.weight"} if _TRANSFORMERS_5 else ["lm_head.weight"]
    )

    def __init__(self, config: OpenELMConfig):
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [B, T, V], and with `labels` [B, T] the next-token loss (labels are shifted here; -100 is ignored)."""
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **_named(getattr(outputs, _CACHE)),
        )
        return output if return_dict in (None, True) else output.to_tuple()


OpenELMModel.register_for_auto_class("AutoModel")
OpenELMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
