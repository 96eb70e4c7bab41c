"""Text that the model in training writes after fixed prompts, always the likeliest token: the same every time.

1. `Prompts.of` encodes the prompts before anything is built, and refuses one that leaves no room.
2. `Prompts.write` spreads them over the ranks and goes on token by token, without a cache and without padding, so that each
   text is what the model writes for that prompt alone. Under ZeRO-3 every forward pass needs every rank: all ranks do
   equally many, also those whose text has ended or that have no prompt left.

It leaves training as it was: no random number is drawn, nothing is compiled for the lengths that occur here, and the
model is back in training mode afterwards. Knows nothing of where the texts go.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.recipe import Recipe

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from megatron_steel.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """What to go on with.

    Attributes:
        texts: the prompts.
        ids: their tokens; an empty prompt is the end of the document before it.
        new_tokens: to write after each.
        vocab_size: ids that the tokenizer knows; a padded embedding has more.
        eos_id: ends a text.
        decode: ids to text.
    """

    texts: list[str]
    ids: list[list[int]]
    new_tokens: int
    vocab_size: int
    eos_id: int
    decode: Callable[[Sequence[int]], str]

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: "Tokenizer") -> "Prompts | None":
        """None where the recipe has no prompts. Raises SteelError for one that is too long."""
        texts, new = list(recipe.train.sample_prompts), recipe.train.sample_tokens
        if not texts:
            return None
        ids = [list(ids) or [tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
        longest = max(ids, key=len)
        if len(longest) + new > recipe.data.sequence_length:
            what = (
                f"a prompt of {len(longest)} tokens and {new} more are longer than the sequences that the model "
                f"learns from ({recipe.data.sequence_length})"
            )
            where = f"train.sample_prompts: {texts[ids.index(longest)][:40]!r}"
            raise SteelError(what, where, "shorten it, or set a smaller train.sample_tokens")
        return cls(texts, ids, new, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.decode)

    def write(self, engine: "DeepSpeedEngine", goes_on: Callable[[], bool]) -> list[str] | None:
        """What the model writes after each prompt, on every rank; a collective call.

        Args:
            goes_on: asked after each token; the same answer on all ranks. Where it is False the result is None.
        """
        import torch

        mine: dict[int, list[int]] = {}
        engine.eval()
        try:
            with torch.no_grad(), _uncompiled():
                for first in range(0, len(self.texts), dist.world_size()):
                    number = first + dist.rank()
                    ids = self._go_on(engine, self.ids[number % len(self.ids)], goes_on)
                    if ids is None:
                        return None
                    mine[number] = ids
        finally:
            engine.train()
        written = {number: ids for part in dist.gather(mine) for number, ids in part.items()}
        return [self._text(self.ids[n], written[n]) for n in range(len(self.texts))]

    def _go_on(self, engine: "DeepSpeedEngine", prompt: list[int], goes_on: Callable[[], bool]) -> list[int] | None:
        import torch

        ids_BT = torch.tensor([prompt], device=engine.device)
        for _ in range(self.new_tokens):
            logits_BTV = engine(input_ids=ids_BT)
            ids_BT = torch.cat([ids_BT, logits_BTV[:, -1:, : self.vocab_size].argmax(dim=-1)], dim=1)
            if not goes_on():
                return None
        return ids_BT[0, len(prompt) :].tolist()

    def _text(self, prompt: list[int], written: list[int]) -> str:
        """Decoded with its prompt, because pieces alone would lose their leading spaces."""
        if self.eos_id in written:
            written = written[: written.index(self.eos_id)]
        before, whole = self.decode(prompt), self.decode([*prompt, *written])
        return whole[len(before) :] if whole.startswith(before) else whole


def _uncompiled() -> contextlib.AbstractContextManager[None]:
    """Compiled layers would be compiled again for every new length, and those of training might change with it."""
    import torch

    compiles = "torch._dynamo" in sys.modules  # to load it takes seconds, and without it nothing is compiled
    return torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()
