"""The Steel architecture: the file that is trained is the file that is shipped.

Qwen-style pre-norm decoder (RMSNorm, rotary positions, QKV bias, grouped-query attention) whose FFN is dense or
a soft mixture of experts (`experts_steel.py`, `mixture_steel.py`). Parameter names and formulas are those of the original Steel-LLM. Imports
nothing but torch, transformers (4.57 and 5.x), its mixtures and its configuration; knows no ranks, precision or optimizer.

Shapes: B batch, T tokens, S keys (past + T), h hidden, N heads, K key/value heads, d head, V vocabulary.
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
from transformers.utils import logging

from .configuration_steel import SteelConfig

# All files are named here: transformers 4 copies what this file imports, not what those import in turn.
from .experts_steel import MLP, SteelSoftMoEV1, SteelSoftMoEV2, SteelSoftMoEV3
from .mixture_steel import Places, SlotState, SteelCausalMixture, SteelLaggedMixture, SteelPrefixMixture, locate

logger = logging.get_logger(__name__)
_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
# transformers 5.24 calls a model's keys and values `cache`; before they were `past_key_values`. Both are taken.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def _named(cache: Cache | None) -> dict[str, Any]:
    """The cache under the name that this version's outputs have for it."""
    return {_CACHE: cache}


class SteelRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h] in the dtype of x; mean square in fp32."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


MIXTURES = (SteelSoftMoEV1, SteelSoftMoEV2, SteelSoftMoEV3, SteelCausalMixture)
"""Classes that read the weights of all their experts themselves: one unit for whoever fetches weights by module."""
_PUBLISHED = {"softmoe_v1": SteelSoftMoEV1, "softmoe_v2": SteelSoftMoEV2, "softmoe_v3": SteelSoftMoEV3}
_CAUSAL = {"prefix": SteelPrefixMixture, "lagged": SteelLaggedMixture}


def _feed_forward(config: SteelConfig) -> nn.Module:
    if config.FFN_type == "raw":
        return MLP[config.mlp_type](config)
    if config.FFN_type == "softmoe_causal":
        return _CAUSAL[config.causal_slots](config)
    return _PUBLISHED[config.FFN_type](config)


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


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key at their positions, under the name that fused kernels know it by."""
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


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


def _blocks(allowed_B1TS: torch.Tensor) -> Any:
    """The same for flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    B, _, T, S = allowed_B1TS.shape
    same = B == 1  # one mask for all of the batch

    def allow(b: Any, n: Any, t: Any, s: Any) -> torch.Tensor:
        return allowed_B1TS[0 if same else b, 0, t, s]

    return create_block_mask(allow, B, None, T, S, device=str(allowed_B1TS.device))


class SteelAttention(nn.Module):
    is_causal = True  # read by transformers' attention functions when there is no mask

    def __init__(self, config: SteelConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=True)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        B, T, _ = x.shape
        query, key, value = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        if past_key_values is not None:
            seen = int(past_key_values.get_seq_length(self.layer_idx))
            where = {"cache_position": torch.arange(seen, seen + T, device=x.device)}
            key, value = past_key_values.update(key, value, self.layer_idx, where)
            if attention_mask is None or attention_mask.shape[-1] == seen + T:
                key, value = key[:, :, : seen + T], value[:, :, : seen + T]  # a static cache hands out all its room
        name = self.config._attn_implementation
        if name in (None, "eager"):
            attend = eager_attention_forward
        elif _TRANSFORMERS_5:  # both spellings: set_attn_implementation looks for them in this file
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        else:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.config.attention_dropout if self.training else 0.0
        out, _ = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # fmt: skip
        return self.o_proj(out.reshape(B, T, -1))


class SteelDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SteelConfig, layer_idx: int):
        super().__init__()
        self.self_attn = SteelAttention(config, layer_idx)
        self.mlp = _feed_forward(config)
        self.input_layernorm = SteelRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SteelRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states, rotary, attention_mask=None, past_key_values=None, places=None, **kwargs
    ) -> torch.Tensor:
        x = hidden_states
        x = x + self.self_attn(self.input_layernorm(x), rotary, attention_mask, past_key_values, **kwargs)
        read = self.post_attention_layernorm(x)
        if not isinstance(self.mlp, SteelCausalMixture):
            return x + self.mlp(read)
        return x + self.mlp(read, places, _slot_states(past_key_values, self.self_attn.layer_idx))


def _slot_states(cache: Cache | None, layer_idx: int) -> SlotState | None:
    """The state of one layer: they lie behind all layers of keys and values, in their order."""
    states = [] if cache is None else [layer for layer in cache.layers if isinstance(layer, SlotState)]
    return states[layer_idx] if states else None


class SteelPreTrainedModel(PreTrainedModel):
    config_class = SteelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SteelDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        # torch.nn.init functions only: transformers 5 guards them, so that loaded weights are not drawn again.
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, SteelRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, SteelSoftMoEV2):
            nn.init.normal_(module.score, std=1.0)
        elif isinstance(module, (SteelSoftMoEV3, SteelCausalMixture)):
            nn.init.normal_(module.phi, std=module.phi.shape[0] ** -0.5)
            # Causal: logits of spread 1, so that slots differ from the start. v3 as published: all but uniform.
            nn.init.constant_(module.scale, 1.0 if isinstance(module, SteelSoftMoEV3) else module.phi.shape[0] ** 0.5)
            if isinstance(module, SteelLaggedMixture):
                nn.init.normal_(module.first_slots, std=1.0)


class SteelModel(SteelPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: SteelConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SteelDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = SteelRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

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
        """Hidden states [B, T, h].

        Args:
            input_ids: [B, T] (or `inputs_embeds` [B, T, h] instead).
            attention_mask: [B, S] with 0 for padding, or a complete mask: boolean [B, 1, T, S] (True: may attend),
                additive, or flex attention's BlockMask. A complete mask is used as it is, so it must be causal itself.
            position_ids: [B, T]; counted from the cache's length when left out.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        past_key_values = cache if past_key_values is None else past_key_values
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = self._cache(past_key_values, use_cache)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        places = self._places(x, attention_mask, position_ids, past_key_values, past)
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        mask = self._mask(attention_mask, x, past)
        rotary = rotary_tables(
            position_ids, self.config.hidden_size // self.config.num_attention_heads, self.config.rope_theta
        )
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [x]
        for layer in self.layers:
            x = layer(x, rotary, mask, past_key_values, places, **kwargs)
            if wanted:
                states.append(x)
        x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*states[:-1], x) if wanted else None,
            **_named(past_key_values),
        )
        return output if return_dict in (None, True) else output.to_tuple()

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.config._attn_implementation == "vllm" and self.config.FFN_type not in ("raw", "softmoe_v1"):
            raise ValueError(  # it keeps keys and values itself and shows each token once, without what the slots hold
                f"FFN_type {self.config.FFN_type} cannot run in vLLM, whose cache has no place for its slots"
            )
        if self.config.sees_future:  # later tokens change earlier ones: what was cached would be wrong
            if given is not None and given.get_seq_length() > 0:
                raise ValueError(f"FFN_type {self.config.FFN_type} reads the whole sequence: call it without a cache")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            return None
        cache = given if given is not None or not use_cache else DynamicCache(config=self.config)
        if cache is not None and self.config.FFN_type == "softmoe_causal":
            self._add_slot_states(cache)
        return cache

    def _add_slot_states(self, cache: Cache) -> None:
        """One state a layer, behind the keys and values of all layers; the cache may come from `generate`, empty."""
        if any(isinstance(layer, SlotState) for layer in cache.layers):
            return
        if cache.get_seq_length() > 0:
            raise ValueError("past_key_values: this cache was filled by another model, its slots are missing")
        while len(cache.layers) < self.config.num_hidden_layers:  # made when first used, if nobody named the layers
            cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
        cache.layers.extend(SlotState() for _ in range(self.config.num_hidden_layers))

    def _places(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        past: int,
    ) -> Places | None:
        """What causal slots must know of each token: padding, its document, its place there."""
        if self.config.FFN_type != "softmoe_causal":
            return None
        padding = mask[:, past : past + x.shape[1]] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        state = _slot_states(cache, 0)
        return locate(x, padding, position_ids, None if state is None else state.read_B)

    def _mask(self, mask: torch.Tensor | None, x: torch.Tensor, past: int) -> Any:
        """What the chosen attention wants: None where the plain causal rule holds and it knows it by itself (sdpa then takes
        its fast path), the padding [B, S] for flash kernels, a BlockMask for flex, else a mask [B, 1, T, S]."""
        name = self.config._attn_implementation or "eager"
        if mask is not None and not isinstance(mask, torch.Tensor):
            return mask  # a BlockMask
        if mask is not None and mask.dim() == 4:
            if "flash" in name:
                raise ValueError(f"{name} knows padding and the causal rule only: use sdpa for a complete mask")
            if mask.dtype != torch.bool:
                return mask.to(x.dtype)
            return _blocks(mask) if name == "flex_attention" else mask
        if mask is not None and not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None
        if "flash" in name:
            return mask
        allowed = self._allowed(mask, x, past, implicit=name not in ("eager", "flex_attention"))
        if name == "flex_attention" and allowed is not None and allowed.dtype == torch.bool:
            return _blocks(allowed)
        return allowed

    def _allowed(self, mask: torch.Tensor | None, x: torch.Tensor, past: int, implicit: bool) -> torch.Tensor | None:
        """Boolean (or additive) [B, 1, T, S]; None where `implicit` attention needs none, or where there is one query."""
        T, S = x.shape[1], past + x.shape[1]
        if mask is None and (T == 1 or (past == 0 and implicit)):
            return None
        allowed = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(past)[None, None]
        if mask is None:
            return allowed
        if self.config.sees_future:
            # v2 and v3 read what padding holds, so it holds what the original puts there: a query that has nothing to attend
            # to takes the mean of all values. (A number that bf16 holds too: autocast must not make it infinite.)
            least = max(torch.finfo(x.dtype).min, torch.finfo(torch.bfloat16).min)
            allowed = allowed & mask[:, None, None, :S].bool()
            return x.new_zeros(allowed.shape).masked_fill(~allowed, least)
        itself = torch.eye(T, S, dtype=torch.bool, device=x.device) if past == 0 else None
        allowed = allowed & mask[:, None, None, :S].bool()
        # A padded query with nothing to attend to would be NaN: it attends to itself, and nobody reads it.
        return allowed if itself is None else allowed | itself


class SteelForCausalLM(SteelPreTrainedModel, GenerationMixin):
    """Steel with its language-model head."""

    _tied_weights_keys: Any = {"lm_head.weight": "model.embed_tokens.weight"} if _TRANSFORMERS_5 else ["lm_head.weight"]

    def __init__(self, config: SteelConfig):
        super().__init__(config)
        self.model = SteelModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        outputs = self.model(
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

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; for a model that sees the future every token recomputes the whole prefix."""
        if self.config.sees_future:
            logger.warning_once(
                f"FFN_type {self.config.FFN_type} is not causal: each new token recomputes the whole text so far, and "
                "no token of the text saw in training what it sees now. Expect slow and worse text than the loss promises."
            )
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)  # type: ignore[misc]


SteelModel.register_for_auto_class("AutoModel")
SteelForCausalLM.register_for_auto_class("AutoModelForCausalLM")
