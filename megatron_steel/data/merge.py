"""Many data sets into one: tokens, sequences and documents add up, in the order given.

Streams: memory does not grow with the data, and the output appears whole or not at all.
Must not know the byte format (`data.indexed`) or tokenizers.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_steel.data import manifest
from megatron_steel.data.indexed import Facts, IndexedDataset, IndexedWriter, PathLike, negative_id
from megatron_steel.data.reserve import reserved
from megatron_steel.errors import SteelError

log = logging.getLogger("megatron_steel")
_STEP = 1 << 20


def merge(prefixes: Sequence[PathLike], output: PathLike) -> manifest.Manifest:
    """Merge data sets of one dtype and one tokenizer; write the merged manifest and return it.

    Raises:
        SteelError: nothing to merge, the output is an input, the same content twice, dtypes or tokenizers differ, an
            input is broken, the output cannot be written, or another process is writing it.
    """
    if not prefixes:
        raise SteelError("there is nothing to merge", output, "name at least one data set")
    if os.path.basename(output) in ("", ".", ".."):
        raise SteelError("the output is a folder, not the beginning of file names", output, "give FOLDER/NAME")
    if Path(output).resolve() in {Path(p).resolve() for p in prefixes}:
        raise SteelError("the output is one of the inputs", output, "choose another output")
    _check_dtypes(prefixes, output)
    known = [manifest.trust(prefix) for prefix in prefixes]  # a copy with other times is read, not taken as unknown
    _refuse_twins(prefixes, known)
    tokenizer, kinds = _common_tokenizer(prefixes, known, output), {m.kind for m in known}
    if len(kinds) > 1:
        raise SteelError("some of the data sets are pairs and others are text", output, "merge each kind by itself")
    try:
        with reserved(output):
            facts = concatenate(prefixes, output)
            return manifest.write(output, facts, tokenizer, [e for m in known for e in m.provenance], *kinds)
    except OSError as error:
        raise SteelError(f"cannot write: {error.strerror or error}", output, "mend it and repeat") from None


def concatenate(prefixes: Sequence[PathLike], output: PathLike) -> Facts:
    """Stream data sets of one dtype into one at `output`, which gets no manifest. Raises SteelError as `merge`."""
    with IndexedDataset(prefixes[0]) as data:
        dtype = data.dtype
    with IndexedWriter(output, dtype) as writer:
        for prefix in prefixes:
            with IndexedDataset(prefix) as data:
                _append(writer, data)
    return writer.facts


def _append(writer: IndexedWriter, data: IndexedDataset) -> None:
    data.check_index()
    sequences, documents, position = writer.sequences, writer.documents, 0
    for raw in data.raw("bin"):
        tokens = np.frombuffer(raw, data.dtype)
        if data.dtype.kind == "i" and tokens.min() < 0:
            raise negative_id(data, position + int(tokens.argmin()))
        if tokens.max() > writer.max_id:
            writer.note_max(int(tokens.max()), documents + data.document_of(position + int(tokens.argmax())))
        writer.add_tokens(raw)
        position += len(tokens)
    for start in range(0, data.sequences, _STEP):
        writer.add_sequences(data.lengths(start, min(start + _STEP, data.sequences)))
    for start in range(1, data.documents + 1, _STEP):
        writer.add_boundaries(data.boundaries(start, min(start + _STEP, data.documents + 1)) + sequences)


def _refuse_twins(prefixes: Sequence[PathLike], known: Sequence[manifest.Manifest]) -> None:
    first: dict[str, str] = {}
    for prefix, found in zip([os.fspath(p) for p in prefixes], known, strict=True):
        if found.digest in first:
            remedy = "name it once; to train on it more often, give it a larger weight"
            raise SteelError(f"{first[found.digest]} has the same content", prefix, remedy)
        first[found.digest] = prefix


def _check_dtypes(prefixes: Sequence[PathLike], output: PathLike) -> None:
    kinds: dict[str, str] = {}
    for prefix in prefixes:
        with IndexedDataset(prefix) as data:
            kinds.setdefault(data.dtype.name, os.fspath(prefix))
    if len(kinds) > 1:
        listed = ", ".join(f"{dtype} in {prefix}" for dtype, prefix in kinds.items())
        raise SteelError(f"the data sets have different dtypes: {listed}", output, "tokenize them with one tokenizer")


def _common_tokenizer(
    prefixes: Sequence[PathLike], known: Sequence[manifest.Manifest], output: PathLike
) -> manifest.TokenizerFacts | None:
    tokenizers = [m.tokenizer for m in known]
    by_print = {t["fingerprint"]: os.fspath(p) for t, p in zip(tokenizers, prefixes, strict=True) if t}
    if len(by_print) > 1:
        listed = ", ".join(by_print.values())
        raise SteelError(f"the data sets were made with different tokenizers: {listed}", output, "use one tokenizer")
    if by_print and None in tokenizers:
        log.warning("not every data set names its tokenizer: the merged manifest names none")
    return tokenizers[0] if None not in tokenizers else None
