"""One pass over every byte of a data set: digests, the largest id and where it is, and a consistent index.

Streams in chunks of tens of MB and says how far it is. Must not know the byte format or the manifest.
"""

import hashlib
import logging
import time

import numpy as np

from megatron_steel.data.indexed import Facts, IndexedDataset, PathLike, content_digest, negative_id

log = logging.getLogger("megatron_steel")
_SECONDS_BETWEEN_LINES = 10.0


def scan(prefix: PathLike) -> Facts:
    """Read all of a data set. Raises SteelError for a negative id (naming the document) and for a broken index."""
    with IndexedDataset(prefix) as data:
        data.check_index()
        bin_sha, idx_sha = hashlib.sha256(), hashlib.sha256()
        started = spoken = time.monotonic()
        position, max_id, max_position = 0, -1, 0
        for raw in data.raw("bin"):
            tokens = np.frombuffer(raw, data.dtype)
            if tokens.min() < 0:
                raise negative_id(data, position + int(tokens.argmin()))
            if tokens.max() > max_id:
                max_id, max_position = int(tokens.max()), position + int(tokens.argmax())
            bin_sha.update(raw)
            position += len(tokens)
            if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                _progress(data, position, spoken - started)
        for raw in data.raw("idx"):
            idx_sha.update(raw)
        return Facts(
            tokens=data.tokens, sequences=data.sequences, documents=data.documents, dtype=data.dtype.name,
            bin_bytes=data.bin_bytes, idx_bytes=data.idx_bytes,
            digest=content_digest(bin_sha.digest(), idx_sha.digest()),
            max_token_id=max_id, max_token_document=data.document_of(max_position),
        )  # fmt: skip


def _progress(data: IndexedDataset, position: int, seconds: float) -> None:
    share = position / data.tokens
    speed = position * data.dtype.itemsize / seconds / 1e6
    left = seconds / share - seconds
    log.info("scanning %s: %.0f%%, %.0f MB/s, about %.0f s left", data.prefix, 100 * share, speed, left)
