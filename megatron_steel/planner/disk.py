"""Bytes on disk of a run: its checkpoints while it runs, and the tokens it reads."""

from dataclasses import dataclass

from megatron_steel.recipe import Recipe, Train

_STATE_BYTES = 12  # a parameter: fp32 weight and two moments (12.0 measured over all ranks at ZeRO-3)
_WEIGHT_BYTES = 2  # stages 0 to 2 also write the bf16 weights


@dataclass(frozen=True)
class Disk:
    checkpoint: int
    """One checkpoint."""
    checkpoints: int
    """At the fullest moment: those kept, and one being written."""
    export: int
    """One bf16 export."""
    tokens: int | None
    """The run's tokens, each once, as `.bin`; None where the length is not known without the data. Several epochs
    read the same files again."""


def disk(recipe: Recipe, parameters: int, vocab_size: int, stage: int, steps: int | None, tokens: int | None) -> Disk:
    """Sizes that follow from a recipe; document indexes (20 bytes a document) are not in them."""
    one = parameters * (_STATE_BYTES + (_WEIGHT_BYTES if stage < 3 else 0))
    return Disk(
        one,
        checkpoints_at_most(recipe.train, steps) * one,
        2 * parameters,
        None if tokens is None else tokens * token_bytes(vocab_size),
    )


def checkpoints_at_most(train: Train, steps: int | None) -> int:
    """Beside each other while the last one is written: it, those it follows, which go only once it is whole, and those
    kept for ever that are older. Where the length is not known, the last ones alone."""
    followed = max(2, train.keep_last) + 1
    if steps is None:
        return followed
    saves = -(-steps // train.save_every_steps)
    followed = min(saves, followed)
    if train.keep_every_steps is None:
        return followed
    return followed + (saves - followed) * train.save_every_steps // train.keep_every_steps


def token_bytes(vocab_size: int) -> int:
    """uint16 up to 65,499 ids, as Megatron decides, else int32."""
    return 2 if vocab_size < 65500 else 4
