"""Steel's causal mixtures: soft slots that gather only what lies before. Travels with every export.

- prefix:  at token t slot j holds the softmax mean of tokens 0..t.        No token has an MLP of its own.
- lagged:  in segment k slot j holds the softmax mean of segment k - 1 (learned vectors where there is none), beside a
           shared MLP that reads the token itself.

Both carry their sums in the library's cache, keep packed documents apart and leave padding out. Imports nothing but
torch, transformers, the experts and the configuration; knows no attention, ranks or optimizer.

Shapes: B batch, T tokens (t of a block), h hidden, n experts, p slots of an expert, s = n p slots, K chunks of c
tokens, r = c + s rows of a chunk, G segments. Sums of slots are fp32 whatever the model is.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import CacheLayerMixin

from .configuration_steel import SteelConfig
from .experts_steel import MLP, as_autocast_wants, first_products, make_experts, outputs_of, pass_slots, run_experts

CHUNK = 64  # tokens of a prefix product: larger needs fewer running sums and more products
BLOCK = 2048  # tokens that pass at once; of longer sequences each block is computed again in the backward pass
# Logits lie within +-40: e^40 times a million tokens fits into fp32 with no running maximum, and so does e^-40.
_BOUND = 40.0
_TINY = 1e-30  # far below any sum of weights, so that only an empty slot divides by it


class Places(NamedTuple):
    """Where the tokens of one call lie; found once a call, read by every layer."""

    valid: torch.Tensor
    """[B, T] bool: no padding."""
    document: torch.Tensor
    """[B, T] int64: 0 continues the text that the cache has read; each document that begins in this call counts one up."""
    place: torch.Tensor
    """[B, T] int64: tokens, padding not counted, that precede it in its document."""
    documents: int
    """The most documents that begin in one block: a bound on what a block must hold."""

    def block(self, begin: int, before_B1: torch.Tensor) -> "Places":
        """Those of one block; its document 0 is number `before_B1`, in which the block before it ended."""
        valid, document, place = (part[:, begin : begin + BLOCK] for part in self[:3])
        return Places(valid, document - before_B1, place, self.documents)


def locate(
    x: torch.Tensor, mask_BT: torch.Tensor | None, position_ids: torch.Tensor | None, read_B: torch.Tensor | None
) -> Places:
    """Places of the tokens x [B, T, h].

    Args:
        mask_BT: 0 for padding.
        position_ids: [B or 1, T]; a document begins where they are 0. None: these tokens continue one text.
        read_B: int64, tokens that the cache has read of the documents that continue here.
    """
    B, T = x.shape[:2]
    valid = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask_BT is None else mask_BT.bool()
    begins = torch.zeros_like(valid) if position_ids is None else (position_ids == 0) & valid
    document = begins.cumsum(1)
    count = valid.cumsum(1)
    before = (count - valid.long()).where(begins, 0).cummax(1).values  # tokens of earlier documents
    continued = torch.zeros_like(before[:, 0]) if read_B is None else -read_B
    place = count - 1 - before.where(document > 0, continued[:, None])
    documents = 1
    if position_ids is None:
        documents = 0
    elif T > 1:  # asks the device once a call; a single token cannot hold more than one
        documents = int(torch.stack([part.sum(1).max() for part in begins.split(BLOCK, 1)]).max())
    return Places(valid, document, place, documents)


class SlotState(CacheLayerMixin):
    """The running sums of one layer, as one more layer of the library's cache: beams reorder it with the others."""

    is_sliding = False
    is_croppable = False
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.read_B: torch.Tensor | None = None
        self.tensors: tuple[torch.Tensor, ...] | None = None

    def store(self, read_B: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> None:
        self.read_B, self.tensors = read_B, tensors

    def _each(self, change: Any) -> None:
        if self.tensors is not None and self.read_B is not None:
            self.store(change(self.read_B), tuple(change(tensor) for tensor in self.tensors))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each(lambda tensor: tensor[indices])

    def crop(self, *_: Any) -> None:
        raise ValueError("softmoe_causal: slots cannot forget their last tokens; generate without an assistant")

    def reset(self) -> None:
        self.read_B = self.tensors = None

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return 0, 0

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing to allocate: keys and values stay None."""

    def offload(self) -> None:
        """Small: it stays where it is."""

    def prefetch(self) -> None:
        """See `offload`."""

    def update(self, *_: Any, **__: Any) -> Any:
        raise TypeError("slots have no keys and values")


class SteelCausalMixture(nn.Module):
    """What both causal mixtures share: routing, slots of equal magnitude, and one pass over blocks of tokens."""

    def __init__(self, config: SteelConfig):
        super().__init__()
        shape = (config.hidden_size, config.n_experts, config.slots_per_expert)
        self.phi = nn.Parameter(torch.randn(shape) / config.hidden_size**0.5)
        self.scale = nn.Parameter(torch.full((1,), config.hidden_size**0.5))
        self.experts = make_experts(config)
        self.eps = config.rms_norm_eps

    def forward(self, x: torch.Tensor, places: Places | None = None, state: SlotState | None = None) -> torch.Tensor:
        """[B, T, h] -> [B, T, h]. `state` is read and then holds what later tokens need."""
        x, given = as_autocast_wants(x), x.dtype
        places = locate(x, None, None, None) if places is None else places
        tensors = self._empty(x) if state is None or state.tensors is None else state.tensors
        again = torch.is_grad_enabled() and x.shape[1] > BLOCK
        pieces, document = [], torch.zeros_like(places.document[:, :1])
        for begin in range(0, x.shape[1], BLOCK):
            here, piece = places.block(begin, document), x[:, begin : begin + BLOCK]
            document = document + here.document[:, -1:]
            if again:
                y, tensors = checkpoint(self._block, piece, here, tensors, use_reentrant=False)
            else:
                y, tensors = self._block(piece, here, tensors)
            pieces.append(y)
        if state is not None:
            state.store(places.place[:, -1] + 1, tensors)
        return torch.cat(pieces, dim=1).to(given) if len(pieces) > 1 else pieces[0].to(given)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """[B, t, h] -> [B, t, s] in fp32, within +-_BOUND."""
        phi = F.normalize(self.phi.float(), dim=0).flatten(1)
        scale = _BOUND * torch.tanh(self.scale.float() / _BOUND)
        return F.normalize(x.float(), dim=-1) @ (scale * phi)

    def _empty(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def _block(self, x: torch.Tensor, places: Places, tensors: tuple[torch.Tensor, ...]) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return self._mix(x, self._logits(x), places, *tensors)

    def _mix(self, x: torch.Tensor, logits_Bts: torch.Tensor, places: Places, *tensors: torch.Tensor) -> Any:
        raise NotImplementedError


class SteelPrefixMixture(SteelCausalMixture):
    """y_t = sum_j C_tj f_j(slot_tj), slot_tj the softmax mean of x_0 .. x_t by the logits of slot j, brought to RMS 1.

    (A plain mean of t unlike tokens shrinks as 1/sqrt(t), and a senet expert is of degree four: late tokens would
    have no FFN.) The same tensors as v3. A slot is never formed: an expert's first product is linear, so it is taken
    of the tokens, and the means are taken of its results.
    """

    def _empty(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h, n, p = self.phi.shape
        return x.new_zeros(len(x), n * p, h, dtype=torch.float32), x.new_zeros(len(x), n * p, dtype=torch.float32)

    def _mix(self, x, logits_Bts, places, *tensors):  # type: ignore[override]
        (B, t, h), (_, n, p) = x.shape, self.phi.shape
        c = min(CHUNK, t)
        K = -(-t // c)

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            """[B, t, ...] -> [B, K, c, ...], filled up with zeros."""
            filled = F.pad(tensor, (0,) * (2 * tensor.dim() - 3) + (K * c - t,))
            return filled.view(B, K, c, *tensor.shape[2:])

        x_BKch, weight_BKcs = cut(x), cut(logits_Bts.exp() * places.valid[..., None])
        last = places.document[:, -1:]
        document_BKc = cut(places.document - last) + last[..., None]  # the fill belongs to the last document
        shares, carry_BKsh, tensors = _prefix_shares(x_BKch, weight_BKcs, document_BKc, *tensors)
        # Two kinds of rows: the tokens of the chunk, and for each slot the mean of all before the chunk.
        rows_BKrh = torch.cat((x_BKch, carry_BKsh.to(x.dtype)), dim=2)
        wide = rows_BKrh.float()
        gram_BKrr = wide @ wide.transpose(2, 3) / h
        square_BKsc = ((shares.flatten(2, 3) @ gram_BKrr).view(shares.shape) * shares).sum(-1)
        shares = (shares * torch.rsqrt(square_BKsc.clamp_min(0) + self.eps)[..., None]).to(x.dtype)
        pair = first_products(self.experts, rows_BKrh.flatten(0, 2))
        shares_n = shares.view(B * K, n, p * c, -1).transpose(0, 1).flatten(0, 1)
        pair = torch.bmm(shares_n, pair.reshape(n * B * K, c + n * p, -1)).view(n, B * K * p * c, -1)
        outputs = outputs_of(self.experts, pair).view(n, B, K, p, c, h)
        combine_BKcs = torch.softmax(cut(logits_Bts), dim=-1).to(x.dtype)
        combine = combine_BKcs.view(B, K, c, n, p).permute(3, 0, 1, 4, 2)[..., None]
        return (outputs * combine).sum((0, 3)).view(B, K * c, h)[:, :t], tensors


def _prefix_shares(x_BKch, weight_BKcs, document_BKc, sum_Bsh, weight_Bs):
    """What each row adds to each slot at each token.

    Args:
        sum_Bsh, weight_Bs: of the tokens before this block, weighted, and of their weights; document 0.

    Returns:
        shares [B, K, s, c, c + s], fp32: of the tokens of the chunk, then of the carried means (0 but for the own slot).
        carry [B, K, s, h]: means of what lies before each chunk, of the document in which the chunk begins.
        the two sums after the block, of the document in which it ends.
    """
    K, _, s = weight_BKcs.shape[1:]
    ends_BK = document_BKc[:, :, -1]
    prior = torch.cat((torch.zeros_like(ends_BK[:, :1]), ends_BK), dim=1)
    tail = weight_BKcs * (document_BKc == ends_BK[..., None])[..., None]
    sums = torch.cat((sum_Bsh[:, None], tail.transpose(2, 3) @ x_BKch.float()), dim=1)
    weights = torch.cat((weight_Bs[:, None], tail.sum(2)), dim=1)
    reach = (prior[:, :, None] == prior[:, None]).tril().float()
    sums, weights = (reach @ sums.flatten(2)).view(sums.shape), reach @ weights
    carry = sums[:, :K] / weights[:, :K, :, None].clamp_min(_TINY)
    seen = (document_BKc[..., None] == document_BKc[:, :, None]).tril()
    own = weight_BKcs.transpose(2, 3)[:, :, :, None] * seen[:, :, None]
    past = weights[:, :K, :, None] * (document_BKc == prior[:, :K, None])[:, :, None]
    each = past[..., None] * torch.eye(s, device=past.device)[:, None]
    total = (own.sum(-1) + past).clamp_min(_TINY)
    return torch.cat((own, each), dim=-1) / total[..., None], carry, (sums[:, K], weights[:, K])


class SteelLaggedMixture(SteelCausalMixture):
    """y_t = shared(x_t) + sum_j C_tj f_j(slot_j of the segment before t's), slots brought to RMS 1.

    Segments of `segment_length` tokens are counted in each document. In its first one the slots are learned vectors.
    The shared MLP is `intermediate_size` wide, an expert `intermediate_size // mlp_div_ratio`.
    """

    def __init__(self, config: SteelConfig):
        super().__init__(config)
        self.segment = config.segment_length
        self.first_slots = nn.Parameter(torch.randn(config.n_experts * config.slots_per_expert, config.hidden_size))
        self.shared = MLP[config.mlp_type](config, config.intermediate_size)

    def _empty(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s, h = self.first_slots.shape
        sums = x.new_zeros(len(x), s, h, dtype=torch.float32)
        return sums, sums[..., 0], sums

    def _mix(self, x, logits_Bts, places, *tensors):  # type: ignore[override]
        sum_Bsh, weight_Bs, readable_Bsh = tensors  # of the segment under way; what its tokens read
        starts = (places.place % self.segment == 0) & places.valid
        segment_Bt = starts.cumsum(1)  # 0: the one under way
        G = 1 + min(x.shape[1], x.shape[1] // self.segment + 1 + places.documents)
        member_BGt = segment_Bt[:, None] == torch.arange(G, device=x.device)[:, None]
        opens_BG = (member_BGt & (starts & (places.place == 0))[:, None]).any(-1)
        weight_Bts = logits_Bts.exp() * places.valid[..., None]
        weight_BGst = (weight_Bts[:, None] * member_BGt[..., None]).transpose(2, 3)
        under_way = (torch.arange(G, device=x.device) == 0).float()
        sums = (weight_BGst.flatten(1, 2) @ x.float()).view(*weight_BGst.shape[:3], -1)
        sums = sums + sum_Bsh[:, None] * under_way[:, None, None]
        weights = weight_BGst.sum(-1) + weight_Bs[:, None] * under_way[:, None]
        means = sums / weights[..., None].clamp_min(_TINY)
        later = torch.where(opens_BG[:, 1:, None, None], self.first_slots.float(), means[:, :-1])
        readable = torch.cat((readable_Bsh[:, None], later), dim=1)  # [B, G, s, h]
        slots = readable * torch.rsqrt(readable.pow(2).mean(-1, keepdim=True) + self.eps)
        outputs = pass_slots(self.experts, slots.flatten(0, 1).to(x.dtype)).reshape(len(x), -1, x.shape[-1])
        combine = torch.softmax(logits_Bts, dim=-1)[:, :, None] * member_BGt.transpose(1, 2)[..., None]
        at_end = segment_Bt[:, -1], torch.arange(len(x), device=x.device)
        after = tuple(tensor[at_end[1], at_end[0]] for tensor in (sums, weights, readable))
        own = run_experts([self.shared], x.flatten(0, 1)[None]).view(x.shape)
        return own + combine.flatten(2).to(x.dtype) @ outputs, after
