"""Another vocabulary for a model: which old rows each new row of the embedding and the head is made of.

1. A pruned tokenizer (`kept_ids.json`): its rows are the old ones, by these ids, once every piece proves to be the same.
2. Any other tokenizer: a piece that both have keeps its row; a new piece gets the mean of the rows of the pieces that the
   old tokenizer's model cuts it into (vocabulary transfer: arXiv 2402.09977); eos, bos, pad and unk that have no namesake
   take the row of the old one of that role.
3. A size alone: rows are added at the end, or taken away where the tokenizer has no id.

A row that no piece uses gets the mean of all rows in use. Zeros would not do in a head: a logit of 0 lies far above those of
a trained model, and rows that mean nothing would share most of the probability; with the mean the other logits are as they
were and the new ones ordinary (the default of transformers draws from around the same mean). Must not know files of weights.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.convert.pieces import Key, Pieces, load_alone, read_pieces
from megatron_steel.data.prune_tokenizer import KEPT_IDS
from megatron_steel.data.tokenizer import Tokenizer
from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    import torch

_AT_ONCE = 4096
"""Rows whose parts are in memory together."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Rows:
    """The plan of a new matrix."""

    parts: list[tuple[int, ...]]
    """For each new row the old rows that it is made of: one: copied; several: their mean; none: the mean of `used`."""
    used: int
    """How many of the first old rows mean something."""
    said: str
    """The counts, in words."""

    def of(self, old: "torch.Tensor") -> "torch.Tensor":
        """The new matrix or bias [len(parts), ...], in the dtype of the old one; means are taken in fp32."""
        import torch

        new = old.new_empty((len(self.parts), *old.shape[1:]))
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, part in enumerate(self.parts):
            by_length[len(part)].append(row)
        for length, rows in by_length.items():
            for first in range(0, len(rows), _AT_ONCE):
                some = rows[first : first + _AT_ONCE]
                if length:
                    of = old[torch.tensor([self.parts[row] for row in some])]
                    new[some] = of[:, 0] if length == 1 else of.mean(1, dtype=torch.float32).to(old.dtype)
                else:
                    new[some] = old[: self.used].mean(0, dtype=torch.float32).to(old.dtype)
        return new

    def new_ids(self) -> dict[int, int]:
        """The new id of each old row that was copied."""
        found: dict[int, int] = {}
        for new, part in enumerate(self.parts):
            if len(part) == 1:
                found.setdefault(part[0], new)
        return found


def plan_rows(folder: Path, rows: int, tokenizer: Path | None, after: Tokenizer | None, vocab_size: int | None) -> Rows:
    """What becomes of the `rows` of a model whose own tokenizer lies in `folder`.

    Args:
        tokenizer: the new one, a folder or a sentencepiece `.model`; None keeps the model's own.
        after: the same, loaded.
        vocab_size: rows of the new model; None: as many as the new tokenizer has ids.

    Raises:
        SteelError: the model has no tokenizer, `kept_ids.json` does not describe the new one, too few rows for its ids.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if tokenizer is None or after is None:
            return _resized(folder, rows, rows if vocab_size is None else vocab_size, Path(scratch))
        size = after.vocab_size if vocab_size is None else vocab_size
        _require_room(after, size, tokenizer)
        source, before = load_alone(folder, Path(scratch))
        if before.vocab_size > rows:
            what = f"the model's own tokenizer has {before.vocab_size} ids and its embedding {rows} rows"
            raise SteelError(what, folder, "put the tokenizer that the model was trained with beside its weights")
        old, new = read_pieces(source), read_pieces(tokenizer)
        if (tokenizer / KEPT_IDS).is_file():
            parts, said = _kept(old, new, tokenizer, folder)
        else:
            parts, said = _matched(old, new, folder)
        more = size - len(parts)
        return Rows(parts + [()] * more, before.vocab_size, said + (f", {more:,} for no piece" if more else ""))


def with_ids(tree: dict[str, Any], rows: Rows, ids: dict[str, int | None], several: bool) -> dict[str, Any]:
    """Special ids of `config.json` or `generation_config.json` for the new tokenizer.

    Args:
        ids: its bos, eos and pad.
        several: as generation has them: what there is none of is left out, and old end-of-turn ids that still exist stay
            beside the new eos (it stops at each).
    """
    new = rows.new_ids()

    def moved(value: Any) -> list[int]:
        return [new[i] for i in (value if isinstance(value, list) else [value]) if i in new]

    changed = dict(tree)
    for name, value in tree.items():
        if name.endswith("_token_id") and name not in _IDS and value is not None:
            found = moved(value)
            changed[name] = found if isinstance(value, list) else next(iter(found), None)
    changed |= ids
    changed = {name: value for name, value in changed.items() if value is not None or not several}
    others = [i for i in moved(tree.get("eos_token_id")) if i != ids["eos_token_id"]]
    if several and others:
        changed["eos_token_id"] = [ids["eos_token_id"], *dict.fromkeys(others)]
    return changed


def _resized(folder: Path, rows: int, size: int, scratch: Path) -> Rows:
    """More rows or fewer, for the tokenizer that the model has."""
    _, own = load_alone(folder, scratch)
    _require_room(own, size, folder)
    parts: list[tuple[int, ...]] = [(row,) for row in range(min(rows, size))]
    change = f"{size - rows:,} added at the end" if size >= rows else f"{rows - size:,} that no token uses taken away"
    return Rows(
        parts + [()] * (size - len(parts)), min(rows, own.vocab_size), f"{len(parts):,} rows as they were, {change}"
    )


def _require_room(tokenizer: Tokenizer, size: int, where: Path) -> None:
    if size < tokenizer.vocab_size:
        what = f"the tokenizer has {tokenizer.vocab_size} ids, and {size} rows cannot hold them"
        raise SteelError(
            what, where, f"give --vocab-size at least {tokenizer.vocab_size} (a multiple of 64 is fastest)"
        )


def _kept(old: Pieces, new: Pieces, tokenizer: Path, folder: Path) -> tuple[list[tuple[int, ...]], str]:
    """The rows of a pruned tokenizer. Every piece must be what the old tokenizer has at the id it is said to come from."""
    file = tokenizer / KEPT_IDS
    try:
        kept = [int(i) for i in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise SteelError(f"it cannot be read: {error}", file, "prune the tokenizer again") from None
    if len(kept) != max(new.names) + 1:
        what = f"it names {len(kept)} ids, and the tokenizer beside it has {max(new.names) + 1}"
        raise SteelError(what, file, "prune the tokenizer again")
    for number, piece in sorted(new.names.items()):
        if old.names.get(kept[number]) != piece:
            is_there = repr(old.names[kept[number]]) if kept[number] in old.names else "nothing"
            what = f"the model's tokenizer is not the one that was pruned: id {number} is {piece!r}, from the old " \
                   f"{kept[number]}, where the model has {is_there}"  # fmt: skip
            raise SteelError(what, file, f"name the model that has the unpruned tokenizer; {folder} has another")
    return [(i,) for i in kept], f"{len(kept):,} rows by {KEPT_IDS}, every piece the same"


def _matched(old: Pieces, new: Pieces, folder: Path) -> tuple[list[tuple[int, ...]], str]:
    """The rows of any other tokenizer, and how many of them are copies, of a role, means and unknown."""
    if old.tokenize is None:
        raise SteelError("the model's tokenizer has no tokenizer.json form, so new pieces cannot be cut by it", folder,
                         "save it with a fast tokenizer class of transformers first")  # fmt: skip
    known = old.by_key()
    roles = {number: old.roles[role] for role, number in reversed(new.roles.items()) if role in old.roles}
    parts: list[tuple[int, ...]] = []
    counts = dict.fromkeys(("copied", "by role", "means", "unknown"), 0)
    for number in range(max(new.names) + 1):
        keys = new.keys.get(number, [])
        same = next((known[key] for key in keys if key in known), None)
        if same is not None:
            how, part = "copied", (same,)
        elif number in roles:
            how, part = "by role", (roles[number],)
        else:
            cut = _cut(old, known, keys)
            how, part = ("means" if cut else "unknown"), cut
        counts[how] += 1
        parts.append(part)
    return parts, (
        f"{counts['copied']:,} of {len(parts):,} rows copied ({counts['copied'] / len(parts):.1%}), "
        f"{counts['means']:,} means of the old pieces of a new one ({counts['means'] / len(parts):.1%}), "
        f"{counts['by role']:,} special tokens by role, {counts['unknown']:,} means of all"
    )


def _cut(old: Pieces, known: dict[Key, int], keys: Iterable[Key]) -> tuple[int, ...]:
    """The old pieces that a new one is made of; empty where the old tokenizer cannot write it."""
    assert old.tokenize is not None
    for key in keys:
        text = old.spelled(key)
        found = old.tokenize(text) if text else []
        if text is None and isinstance(key[1], bytes):  # a part of a character, for a tokenizer that writes characters
            found = [known[one] for byte in key[1] if (one := ("byte", bytes([byte]))) in known]
        found = [i for i in found if i != old.roles.get("unk")]
        if found:
            return tuple(found)
    return ()
