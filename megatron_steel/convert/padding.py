"""Rows of the vocabulary that belong to no token: named, and cut off where that is asked for.

A vocabulary is rounded up for speed, so the last rows of the embedding and of the head are no token's. They are trained on
nothing but never being right, and harmless. Must not know files or where weights come from.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron_steel.checkpoint.zero import Weight
    from megatron_steel.data.tokenizer import Tokenizer

Shapes = dict[str, tuple[int, ...]]


def padding_rows(config: "PretrainedConfig", tokenizer: "Tokenizer | None") -> range:
    """Rows of the embedding that belong to no token; empty where there are none or nobody knows the tokenizer."""
    rows = getattr(config.get_text_config(), "vocab_size", 0)
    return range(tokenizer.vocab_size, rows) if tokenizer else range(0)


def without_padding(config: "PretrainedConfig", tokenizer: "Tokenizer | None") -> "PretrainedConfig":
    """A copy of the configuration whose vocabulary is the tokenizer's.

    Raises SteelError where nobody knows the tokenizer, or it has more tokens than the model has rows.
    """
    where, remedy = "--cut-padding", "export without it"
    if tokenizer is None:
        raise SteelError("nobody knows the tokenizer of these weights, so no row is known to be padding", where, remedy)
    rows = getattr(config.get_text_config(), "vocab_size", 0)
    if tokenizer.vocab_size > rows:
        what = f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} tokens and the model {rows:,} rows"
        raise SteelError(what, where, remedy)
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    text.vocab_size = tokenizer.vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the class's own, of another tokenizer
        found = getattr(text, name, None)
        if isinstance(found, int) and found >= tokenizer.vocab_size:
            setattr(text, name, None)
    return cut


def require_cuttable(whole: Shapes, cut: Shapes) -> None:
    """Raise SteelError unless the second model is the first with fewer rows in some tensors."""
    for name in sorted({*whole, *cut}):
        before, after = whole.get(name), cut.get(name)
        fewer = before and after and after[0] <= before[0] and after[1:] == before[1:]
        if before != after and not fewer:
            what = f"this model's vocabulary is more than rows: {name} {before} would become {after}"
            raise SteelError(what, "--cut-padding", "export without it")


def cut_rows(weights: Iterable[tuple[str, "Weight"]], whole: Shapes, cut: Shapes) -> Iterator[tuple[str, "Weight"]]:
    """The stream, each tensor with as many rows as it has in `cut`; one that is not as in `whole` passes as it is."""
    for name, weight in weights:
        fewer = weight.shape == whole.get(name) and cut.get(name, weight.shape) != weight.shape
        yield name, weight.first_rows(cut[name][0]) if fewer else weight
