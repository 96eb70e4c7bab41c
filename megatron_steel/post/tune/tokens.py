"""Rows to tokens on disk, once, before any rank starts; every row counted.

1. `rows` gives conversations, `mask` their ids and labels.
2. What is longer than `max_length` loses its end; a row that keeps nothing to learn is left out. Both are counted.
3. Packed rows are made here too, so that the number of steps is known before the first.

Arrow files, mapped by every rank: memory holds a batch. Must not know models, trainers or ranks.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_steel.errors import SteelError
from megatron_steel.model.head import IGNORE
from megatron_steel.post.tune.mask import Supervision, prompt_and_reply
from megatron_steel.post.tune.rows import read_rows

_BATCH = 500
_COLUMNS = {"sft": ("input_ids", "labels"), "dpo": ("prompt_ids", "chosen_ids", "rejected_ids")}


def write_tokens(
    file: Path, source: Path, kind: str, supervision: Supervision, longest: int, packing: bool
) -> dict[str, int]:
    """Tokenize one jsonl file to one Arrow file.

    Args:
        longest: tokens that a conversation keeps (for dpo: the prompt with either reply).

    Returns: rows, kept, cut, left_out, tokens, supervised, and sequences (rows of the Arrow file).
    Raises SteelError: an unfit row, or none that keeps anything to learn.
    """
    import pyarrow as pa

    counts = dict.fromkeys(("rows", "kept", "cut", "left_out", "tokens", "supervised"), 0)
    make = _sft if kind == "sft" else _dpo
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in _COLUMNS[kind]])
    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _batches(read_rows(source, kind)):
            made = [row for row in make(batch, supervision, longest, counts) if row is not None]
            counts["rows"] += len(batch)
            counts["kept"] += len(made)
            writer.write_table(pa.Table.from_pylist(made, schema))
    counts["left_out"] = counts["rows"] - counts["kept"]
    if not counts["kept"]:
        raise SteelError(f"no row keeps anything to learn within {longest} tokens", source, "raise max_length")
    counts["sequences"] = _pack(file, longest) if packing else counts["kept"]
    return counts


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch


def _sft(rows: list[dict[str, Any]], supervision: Supervision, longest: int, counts: dict[str, int]) -> Iterator[Any]:
    for tokens in supervision.encode([row["messages"] for row in rows]):
        ids, labels = tokens.ids[:longest], tokens.labels[:longest]
        learned = sum(label != IGNORE for label in labels)
        counts["cut"] += len(tokens.ids) > longest
        if not learned:
            yield None
            continue
        counts["tokens"] += len(ids)
        counts["supervised"] += learned
        yield {"input_ids": ids, "labels": labels}


def _dpo(rows: list[dict[str, Any]], supervision: Supervision, longest: int, counts: dict[str, int]) -> Iterator[Any]:
    chosen, rejected = (
        supervision.encode([row["prompt"] + row[side] for row in rows]) for side in ("chosen", "rejected")
    )
    for good, bad in zip(chosen, rejected, strict=True):
        (prompt, yes), (other, no) = prompt_and_reply(good), prompt_and_reply(bad)
        if prompt != other:  # a tokenizer that joins the reply's first letters to what stands before it
            same = next(
                (i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(len(prompt), len(other))
            )
            yes, no, prompt = [*prompt[same:], *yes], [*other[same:], *no], prompt[:same]
        room = longest - len(prompt)
        counts["cut"] += max(len(yes), len(no)) > room
        yes, no = yes[: max(room, 0)], no[: max(room, 0)]
        if not yes or yes == no:
            yield None
            continue
        counts["tokens"] += 2 * len(prompt) + len(yes) + len(no)
        counts["supervised"] += len(yes) + len(no)
        yield {"prompt_ids": prompt, "chosen_ids": yes, "rejected_ids": no}


def _pack(file: Path, longest: int) -> int:
    """Put packed rows in the place of a file; returns how many."""
    from datasets import Dataset

    from megatron_steel.post.tune.batches import pack

    packed = pack(Dataset.from_file(str(file)), longest)
    aside = file.with_suffix(".packed")
    _write_stream(packed, aside)
    for cached in packed.cache_files:  # TRL's own copy
        Path(cached["filename"]).unlink(missing_ok=True)
    aside.replace(file)
    return len(packed)


def _write_stream(dataset: Any, file: Path) -> None:
    import pyarrow as pa

    with pa.OSFile(str(file), "wb") as sink:
        writer = None
        for table in dataset.with_format("arrow").iter(batch_size=_BATCH):
            writer = writer or pa.ipc.new_stream(sink, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
