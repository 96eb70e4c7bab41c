"""GPT-2 without biases, as nanoGPT trains it: the file that is trained is the file that is shipped.

Pre-LayerNorm decoder with learned positions, exact GELU and tied embeddings; transformers' GPT2 class always has biases.
Parameter names and shapes are nanoGPT's. Imports nothing but torch, transformers (4.57 and 5.x) and its
configuration; knows no ranks, precision or optimizer.

Shapes: B batch, T tokens, S keys (past + T), h hidden, N heads, d head, V vocabulary.
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

from .configuration_nanogpt import NanoGPTConfig

_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
# transformers 5.24 calls a model's keys and values `cache`; before they were `past_key_values`. Both are taken.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def eager_attention_forward(
    module: nn.Module, query, key, value, attention_mask=None, scaling=1.0, dropout=0.0, **kwargs
):
    """Plain attention, [B, N, T, d] -> [B, T, N, d]; the twin that sdpa is tested against."""
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


class NanoGPTBranchEnd(nn.Linear):
    """The matrix that ends a residual branch: it is drawn smaller."""


class NanoGPTAttention(nn.Module):
    is_causal = True  # read by transformers' attention functions when there is no mask
    num_key_value_groups = 1

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = NanoGPTBranchEnd(config.n_embd, config.n_embd, bias=False)

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> torch.Tensor:
        B, T, h = x.shape
        query, key, value = (
            part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in self.c_attn(x).split(h, dim=-1)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        if name in (None, "eager"):
            attend = eager_attention_forward
        elif _TRANSFORMERS_5:  # both spellings: set_attn_implementation looks for them in this file
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        else:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.config.dropout if self.training else 0.0
        out, _ = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # fmt: skip
        return self.c_proj(out.reshape(B, T, h))


class NanoGPTMLP(nn.Module):
    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = NanoGPTBranchEnd(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class NanoGPTBlock(GradientCheckpointingLayer):
    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=False)
        self.attn = NanoGPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=False)
        self.mlp = NanoGPTMLP(config)
        self.dropout = config.dropout

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs) -> torch.Tensor:
        x = hidden_states
        attended = self.attn(self.ln_1(x), attention_mask, past_key_values, **kwargs)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)


class NanoGPTPreTrainedModel(PreTrainedModel):
    config_class = NanoGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoGPTBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """nanoGPT, model.py: what ends a residual branch is drawn smaller, so that the stream's variance does not grow with depth."""
        # torch.nn.init functions only: transformers 5 guards them, so that loaded weights are not drawn again.
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            ends_branch = isinstance(module, NanoGPTBranchEnd)
            nn.init.normal_(module.weight, std=std / (2 * self.config.n_layer) ** 0.5 if ends_branch else std)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)


class NanoGPTModel(NanoGPTPreTrainedModel):
    """Embeddings, decoder layers and final norm."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([NanoGPTBlock(config, i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value  # type: ignore[assignment]

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
            attention_mask: [B, S] with 0 for padding, or a complete [B, 1, T, S] mask: boolean (True: may attend) or
                additive. A complete mask is used as it is, so it must be causal itself.
            position_ids: [B, T], below `n_positions`; counted from the cache's length when left out.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        past_key_values = cache if past_key_values is None else past_key_values
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        wanted = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and wanted and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        mask = causal_mask(attention_mask, x, past, self.config._attn_implementation or "eager")
        x = F.dropout(x + self.wpe(position_ids), self.config.dropout, self.training)
        states = [x]
        for block in self.h:
            x = block(x, mask, past_key_values, **kwargs)
            states.append(x)
        x = self.ln_f(x)
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


class NanoGPTForCausalLM(NanoGPTPreTrainedModel, GenerationMixin):
    """The model with its language-model head."""

    _tied_weights_keys: Any = {"lm_head.weight": "transformer.wte.weight"} if _TRANSFORMERS_5 else ["lm_head.weight"]

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.transformer = NanoGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
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


NanoGPTModel.register_for_auto_class("AutoModel")
NanoGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
