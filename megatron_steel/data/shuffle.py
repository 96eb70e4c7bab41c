"""Data sets into one whose documents lie in a random order: for corpora that lie sorted.

Document j of the output is document `permute(j, N, key)` of the inputs, counted in the order given: a keyed
permutation, the same whatever the parts are. Two passes, both through the disk in large sequential pieces:

1. Read the inputs once; append each document to the bucket that its place in the output falls into.
2. Read bucket after bucket whole, put its documents in their places, write them out.

Memory is two buckets (64 MB each; a 1024th of the tokens where there are more than 64 GB) and one piece. The scratch
folder holds the tokens once more until the end. Must not know the byte format or tokenizers.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_steel.data.indexed import Facts, IndexedDataset, IndexedWriter, PathLike
from megatron_steel.data.permutation import unpermute

_BUCKET_BYTES, _MOST_BUCKETS = 64 << 20, 1024
_PIECE_TOKENS, _PIECE_DOCUMENTS = 4 << 20, 1 << 18  # of one step in memory
_PLACE = np.dtype([("place", "<i8"), ("length", "<i8")])
Array = npt.NDArray[Any]


def shuffled(prefixes: Sequence[PathLike], output: PathLike, key: int, scratch: Path) -> Facts:
    """Write the documents of data sets of one dtype, permuted by `key`, to `output`, which gets no manifest.

    Args:
        scratch: a folder that is this call's alone; it is emptied first and gone at the end.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    sizes = []
    for prefix in prefixes:
        with IndexedDataset(prefix) as data:
            data.check_index()
            sizes.append((data.documents, data.bin_bytes))
            dtype = data.dtype
    documents, size = (sum(column) for column in zip(*sizes, strict=True))
    buckets = min(max(1, -(-size // _BUCKET_BYTES)), _MOST_BUCKETS, documents)
    first = 0
    for prefix, (count, _) in zip(prefixes, sizes, strict=True):
        with IndexedDataset(prefix) as data:
            _spread(data, first, documents, buckets, key, scratch)
        first += count
    with IndexedWriter(output, dtype) as writer:
        for bucket in range(buckets):
            _gather_bucket(writer, scratch, bucket, dtype)
    shutil.rmtree(scratch)
    return writer.facts


def _spread(data: IndexedDataset, first: int, documents: int, buckets: int, key: int, scratch: Path) -> None:
    """Append every document of `data`, the first of which is document `first` of all, to its bucket."""
    for start, lengths in _pieces(data):
        at = int(lengths[0]["place"])
        counts = lengths["length"]
        tokens = data.read(at, at + int(counts.sum()))
        places = unpermute(np.arange(first + start, first + start + len(counts)), documents, key)
        target = places * buckets // documents
        order = np.argsort(target, kind="stable")
        found, heads = np.unique(target[order], return_index=True)
        begins = np.cumsum(counts) - counts
        for bucket, chosen in zip(found.tolist(), np.split(order, heads[1:]), strict=True):
            rows = np.empty(len(chosen), _PLACE)
            rows["place"], rows["length"] = places[chosen], counts[chosen]
            _append(scratch / f"{bucket}.places", rows)
            _append(scratch / f"{bucket}.tokens", _picked(tokens, begins[chosen], counts[chosen]))


def _pieces(data: IndexedDataset) -> Iterator[tuple[int, Array]]:
    """The documents in runs of bounded size: the first one's number; stream position and length of each."""
    number = 0
    while number < data.documents:
        starts = data.document_starts(number, min(number + _PIECE_DOCUMENTS, data.documents) + 1)
        count = max(1, int(np.searchsorted(starts - starts[0], _PIECE_TOKENS, side="right")) - 1)
        rows = np.empty(count, _PLACE)
        rows["place"], rows["length"] = starts[:count], np.diff(starts[: count + 1])
        yield number, rows
        number += count


def _gather_bucket(writer: IndexedWriter, scratch: Path, bucket: int, dtype: npt.DTypeLike) -> None:
    path = scratch / f"{bucket}.places"
    if not path.exists():
        return
    rows = np.fromfile(path, _PLACE)
    tokens = np.fromfile(scratch / f"{bucket}.tokens", dtype)
    order = np.argsort(rows["place"])
    lengths = rows["length"][order]
    begins = (np.cumsum(rows["length"]) - rows["length"])[order]
    ends = np.cumsum(lengths)
    done = 0
    while done < len(order):
        before = int(ends[done - 1]) if done else 0
        stop = max(done + 1, int(np.searchsorted(ends, before + _PIECE_TOKENS, side="right")))
        writer.add_documents(_picked(tokens, begins[done:stop], lengths[done:stop]), lengths[done:stop])
        done = stop


def _picked(tokens: Array, begins: Array, lengths: Array) -> Array:
    """tokens[b : b + n] for each b of `begins` and n of `lengths`, one after another."""
    if len(begins) == 1:
        return tokens[int(begins[0]) : int(begins[0] + lengths[0])]
    ends = np.cumsum(lengths)
    return tokens[np.repeat(begins - (ends - lengths), lengths) + np.arange(int(ends[-1]))]


def _append(path: Path, rows: Array) -> None:
    with open(path, "ab") as file:
        file.write(rows.tobytes())
