"""Megatron's `.bin`/`.idx` pair: the byte format, a reader, a writer, and merge.

The only module that knows the bytes (little-endian, no padding; source: Megatron-LM, core/datasets/indexed_dataset.py):

    .bin   the tokens of all documents, one after another, without a header
    .idx   9 bytes "MMIDIDX\\0\\0" | u64 version 1 | u8 dtype code | u64 S | u64 D
           i32[S] tokens of each sequence | i64[S] byte offset of each sequence in .bin
           i64[D] the sequence at which each document begins, and S at the end: D = documents + 1

A document holds any number of sequences; ours hold one (none where it is empty), or two: a prompt and a response.
Nothing here grows with the corpus: readers ask the file for the few bytes that they need (`pread`, so a file that is
cut while open gives an error and not a dead process), the writer spools its index to disk.
Must not know tokenizers, manifests or what a sample is.
"""

import bisect
import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_steel.data.reserve import locked
from megatron_steel.errors import SteelError

PathLike = str | os.PathLike[str]
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_I64 = struct.Struct("<q")
_DTYPES = {
    code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_FLOAT_CODES = (6, 7)  # float64 and float32 in one code base, the other way round in another
_LENGTH, _OFFSET = np.dtype("<i4"), np.dtype("<i8")
_CHUNK_BYTES = 32 << 20
_AGAIN = "copy or tokenize the data again"


@dataclass(frozen=True)
class Facts:
    """What a pass over every byte of a data set finds out."""

    tokens: int
    sequences: int
    documents: int
    dtype: str
    bin_bytes: int
    idx_bytes: int
    digest: str
    """SHA-256 over the SHA-256 of `.bin` and that of `.idx`: the content, whatever its path."""
    max_token_id: int
    max_token_document: int
    """The first document (counted from 0) that holds the largest id."""


def best_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """Megatron's rule: u16 where the vocabulary is known and below 65500, else i32."""
    return np.dtype("<u2" if vocab_size is not None and vocab_size < 65500 else "<i4")


def bin_path(prefix: PathLike) -> Path:
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: PathLike) -> Path:
    return Path(f"{os.fspath(prefix)}.idx")


class IndexedDataset:
    """An open data set. Opening reads a few dozen bytes, whatever the size; `data.scan` looks at all of them.

    Attributes:
        tokens, sequences, documents: counts. dtype: of a token. bin_bytes, idx_bytes: sizes of the files.

    Raises:
        SteelError: a file is missing or cut, the header is not Megatron's, the dtype is not one of integers,
            the counts, sizes and last entries do not agree, or there is no token.
    """

    def __init__(self, prefix: PathLike):
        self.prefix = os.fspath(prefix)
        self._bin_fd = self._idx_fd = -1
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise SteelError(
                    f"a data set is two files and {path.name} is missing", path, "give the path without .bin or .idx"
                )
        self._bin_fd = os.open(bin_path(prefix), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._idx_fd = os.open(idx_path(prefix), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.bin_bytes, self.idx_bytes = os.fstat(self._bin_fd).st_size, os.fstat(self._idx_fd).st_size
        self._read_header()
        self._check_ends()

    def _read_header(self) -> None:
        if self.idx_bytes < _HEADER.size:
            raise self._broken(f"the index is truncated: {self.idx_bytes} bytes are not even a header")
        magic, version, code, self.sequences, boundaries = _HEADER.unpack(self._pread("idx", _HEADER.size, 0))
        if magic != _MAGIC:
            raise self._broken(f"not a Megatron index: it begins with {magic!r}, not {_MAGIC!r}")
        if version != 1:
            raise self._broken(f"the index has version {version}; only version 1 is known")
        if code in _FLOAT_CODES:
            raise self._broken(f"dtype code {code} means floats (of 32 or 64 bits: writers disagree), not tokens")
        if code not in _DTYPES:
            raise self._broken(f"dtype code {code} is unknown; known are {sorted(_DTYPES)}")
        self.dtype = _DTYPES[code]
        self.documents = boundaries - 1
        self._offsets_at = _HEADER.size + self.sequences * _LENGTH.itemsize
        self._documents_at = self._offsets_at + self.sequences * _OFFSET.itemsize
        wanted = self._documents_at + boundaries * _OFFSET.itemsize
        if self.idx_bytes != wanted:
            counts = f"{self.sequences} sequences and {boundaries} document boundaries need {wanted} bytes"
            is_cut = "the index is truncated" if self.idx_bytes < wanted else "the index is too long"
            modes = " (multimodal? that is not supported)" if self.idx_bytes == wanted + self.sequences else ""
            raise self._broken(f"{is_cut}{modes}: {counts}, it has {self.idx_bytes}")

    def _check_ends(self) -> None:
        where = bin_path(self.prefix)
        if self.documents < 1 or self.sequences < 1 or self.bin_bytes == 0:
            raise SteelError("the data set is empty: it holds no token", where, "tokenize an input that has text")
        self.tokens, odd = divmod(self.bin_bytes, self.dtype.itemsize)
        if odd:
            raise SteelError(f"{self.bin_bytes} bytes are no whole number of {self.dtype} tokens", where, _AGAIN)
        last = self.sequences - 1
        length, offset = int(self.lengths(last, last + 1)[0]), int(self.offsets(last, last + 1)[0])
        if length < 0 or offset < 0 or int(self.offsets(0, 1)[0]) != 0:
            raise self._broken(f"impossible entries: the last sequence has {length} tokens at byte {offset}")
        wanted = offset + length * self.dtype.itemsize
        if self.bin_bytes != wanted:
            is_cut = "truncated" if self.bin_bytes < wanted else "longer than its index says"
            raise SteelError(
                f"the tokens are {is_cut}: {self.bin_bytes} bytes, the index needs {wanted}", where, _AGAIN
            )
        ends = int(self.boundaries(0, 1)[0]), int(self.boundaries(self.documents, self.documents + 1)[0])
        if ends != (0, self.sequences):
            raise self._broken(f"the documents span the sequences {ends[0]} to {ends[1]}, not 0 to {self.sequences}")

    def lengths(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens of the sequences [start, stop), i32."""
        return self._entries(_HEADER.size, _LENGTH, start, stop)

    def offsets(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Byte offsets in `.bin` of the sequences [start, stop), i64."""
        return self._entries(self._offsets_at, _OFFSET, start, stop)

    def boundaries(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The first sequence of each of the documents [start, stop), i64; entry `documents` is `sequences`."""
        return self._entries(self._documents_at, _OFFSET, start, stop)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The tokens [start, stop) of the stream: shape [stop - start], the file's dtype, the caller's own copy.

        Raises:
            IndexError: outside the stream. SteelError: the file has been cut since it was opened.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.tokens}")
        tokens = np.empty(stop - start, self.dtype)
        at = start * self.dtype.itemsize
        if os.preadv(self._bin_fd, [tokens.data], at) < tokens.nbytes:  # as a rule it gives all
            raw = self._pread("bin", tokens.nbytes, at)
            tokens = np.frombuffer(raw, self.dtype).copy()
        return tokens

    def document(self, number: int) -> npt.NDArray[Any]:
        """The tokens of document `number` (from 0), the file's dtype."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        start, stop = self.document_starts(number, number + 2)
        return self.read(int(start), int(stop))

    def document_of(self, position: int) -> int:
        """The number of the document that holds token `position`: two short reads for each halving of the corpus."""
        if not 0 <= position < self.tokens:
            raise IndexError(f"token {position} of {self.tokens}")
        return bisect.bisect_right(range(self.documents + 1), position, key=self._document_start) - 1

    def document_cuts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions p of the stream with start < p < stop at which a document begins: sorted, int64, each once."""
        if stop - start < 2:
            return np.zeros(0, np.int64)
        number, width = self.document_of(start) + 1, 64
        found = []
        while number <= self.documents:
            starts = self.document_starts(number, min(number + width, self.documents + 1))
            found.append(starts[starts < stop])
            if starts[-1] >= stop:
                break
            number, width = number + width, min(width * 2, 1 << 20)
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def _document_start(self, number: int) -> int:
        """As `document_starts` for one document, without arrays: the inner step of every search."""
        (sequence,) = _I64.unpack(self._pread("idx", 8, self._documents_at + number * 8))
        if sequence == self.sequences:
            return self.tokens
        if not 0 <= sequence < self.sequences:
            raise self._broken(f"document {number} begins at sequence {sequence} of {self.sequences}")
        (at,) = _I64.unpack(self._pread("idx", 8, self._offsets_at + sequence * 8))
        if not 0 <= at <= self.bin_bytes:
            raise self._broken(f"sequence {sequence} begins at byte {at} of {self.bin_bytes}")
        return int(at) // self.dtype.itemsize

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Stream positions at which the documents [start, stop) begin; entry `documents` is the end of the stream."""
        first = self.boundaries(start, stop)
        low, high = int(first[0]), int(first[-1])
        if not 0 <= low <= high <= self.sequences or np.any(np.diff(first) < 0):
            raise self._broken(
                f"the boundaries of documents {start} to {stop - 1} do not rise from 0 to {self.sequences}"
            )
        end = np.array([self.bin_bytes], _OFFSET)  # where a sequence after the last would begin
        at = np.concatenate([self.offsets(low, min(high + 1, self.sequences)), end])[first - low]
        if at[0] < 0 or at[-1] > self.bin_bytes:
            raise self._broken(
                f"documents {start} to {stop - 1} begin at bytes {at[0]} to {at[-1]} of {self.bin_bytes}"
            )
        return at // self.dtype.itemsize

    def raw(self, which: str) -> Iterator[bytes]:
        """Every byte of `"bin"` or `"idx"`, in chunks of whole tokens, tens of MB each."""
        size = self.bin_bytes if which == "bin" else self.idx_bytes
        for at in range(0, size, _CHUNK_BYTES):
            yield self._pread(which, min(_CHUNK_BYTES, size - at), at)

    def _entries(self, at: int, dtype: np.dtype[Any], start: int, stop: int) -> npt.NDArray[Any]:
        size = dtype.itemsize
        return np.frombuffer(self._pread("idx", (stop - start) * size, at + start * size), dtype)

    def _pread(self, which: str, count: int, at: int) -> bytes:
        fd = self._bin_fd if which == "bin" else self._idx_fd
        data = os.pread(fd, count, at)
        while len(data) < count:  # the system hands out at most 2 GB at a time
            more = os.pread(fd, count - len(data), at + len(data))
            if not more:
                where = f"{self.prefix}.{which}"
                size = os.fstat(fd).st_size
                raise SteelError(f"the file ends at byte {size}: it was cut after it was opened", where, _AGAIN)
            data += more
        return data

    def _broken(self, what: str) -> SteelError:
        return SteelError(what, idx_path(self.prefix), _AGAIN)

    def check_index(self) -> None:
        """Read the whole index: no negative length, offsets are their sum, boundaries rise. Raises SteelError."""
        at, step = 0, 1 << 20
        for start in range(0, self.sequences, step):
            stop = min(start + step, self.sequences)
            lengths, offsets = self.lengths(start, stop).astype(np.int64), self.offsets(start, stop)
            if lengths.min() < 0:
                bad = start + int(lengths.argmin())
                raise self._broken(f"sequence {bad} has a negative length ({lengths[bad - start]})")
            ends = np.cumsum(lengths * self.dtype.itemsize) + at
            wrong = np.flatnonzero(offsets != ends - lengths * self.dtype.itemsize)
            if wrong.size:
                here = int(wrong[0])
                due = int(ends[here] - lengths[here] * self.dtype.itemsize)
                raise self._broken(f"sequence {start + here} points to byte {offsets[here]}; the lengths say {due}")
            at = int(ends[-1])
        for start in range(0, self.documents, step):
            first = self.boundaries(start, min(start + step, self.documents) + 1)
            if first[0] < 0 or first[-1] > self.sequences or np.any(np.diff(first) < 0):
                raise self._broken(f"a boundary from document {start} on does not rise from 0 to {self.sequences}")

    def close(self) -> None:
        for fd in (self._bin_fd, self._idx_fd):
            if fd >= 0:
                os.close(fd)
        self._bin_fd = self._idx_fd = -1

    def __enter__(self) -> "IndexedDataset":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_idx_fd"):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedDataset, (self.prefix,)  # a worker process opens the files itself


class IndexedWriter:
    """Writes a data set of `dtype` aside; leaving the `with` block publishes it, an error leaves nothing.

    `.bin` takes its name before `.idx`, and an older `.idx` goes first: an `.idx` never stands beside a `.bin` that is
    not its own. A second writer of the same prefix gets `Busy`. After the block `facts` holds what was written.
    """

    facts: Facts

    def __init__(self, prefix: PathLike, dtype: npt.DTypeLike):
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            raise ValueError(f"{self.dtype} is no token dtype: {[str(d) for d in _CODES]}")
        self._limits = np.iinfo(self.dtype)
        self._one_each = True  # document i is sequence i so far: its boundaries need not be spooled
        self.tokens = self.sequences = self.documents = 0
        self.max_id, self._max_document = -1, 0
        self._sha = hashlib.sha256()
        self._beside = ThreadPoolExecutor(1)  # hashing and syncing `.bin`, while the rest goes on
        self._hashed: Future[None] | None = None
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> "IndexedWriter":
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._files["documents"] = locked(Path(self._aside("documents")))  # whoever holds it owns the others
        for name in ("bin", "idx"):
            self._files[name] = open(self._aside(name), "wb+", buffering=1 << 20)
        self._files["idx"].write(bytes(_HEADER.size))
        self._files["documents"].write(np.zeros(1, _OFFSET).tobytes())
        return self

    def add_document(self, ids: npt.ArrayLike) -> None:
        """As `add_documents` for one: its ids, end of document included."""
        tokens = np.asarray(ids)
        if tokens.size and tokens.dtype.kind not in "iu":
            raise ValueError(f"token ids are integers, not {tokens.dtype}")
        self.add_documents(tokens, np.array([tokens.size]))

    def add_documents(self, ids: npt.NDArray[Any], lengths: npt.NDArray[Any], sequences_each: int = 1) -> None:
        """Append documents: their ids one after another, and how many each has; 0 is a boundary without a sequence.

        With `sequences_each` n every n lengths are the sequences of one document. Raises SteelError where an id is negative or does not fit the dtype.
        """
        if ids.size:
            ends = np.cumsum(lengths)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high > self._limits.max:
                bad = low if low < 0 else high
                sequence = int(np.searchsorted(ends, ids.tolist().index(bad), side="right"))
                document = self.documents + sequence // sequences_each
                what = f"document {document} (counted from 0) holds token id {bad}, outside 0 to {self._limits.max}"
                raise SteelError(what, self.prefix, "use the tokenizer's real vocabulary size for the dtype")
            if high > self.max_id:
                sequence = int(np.searchsorted(ends, ids.argmax(), side="right"))
                self.note_max(high, self.documents + sequence // sequences_each)
            self.add_tokens(np.ascontiguousarray(ids, self.dtype).data)
        boundaries = (self.sequences + np.cumsum(lengths > 0))[sequences_each - 1 :: sequences_each]
        self.add_sequences(lengths[lengths > 0])
        self.add_boundaries(boundaries)

    def add_tokens(self, raw: bytes | memoryview) -> None:
        """Append bytes of whole tokens to `.bin`."""
        self._wait_for_hash()
        if isinstance(raw, bytes):  # nobody can change it meanwhile
            self._hashed = self._beside.submit(self._sha.update, raw)
        else:
            self._sha.update(raw)
        self._files["bin"].write(raw)
        self.tokens += memoryview(raw).nbytes // self.dtype.itemsize

    def _wait_for_hash(self) -> None:
        if self._hashed:
            self._hashed.result()

    def add_sequences(self, lengths: npt.NDArray[Any]) -> None:
        self._files["idx"].write(np.ascontiguousarray(lengths, _LENGTH).data)
        self.sequences += len(lengths)

    def add_boundaries(self, ends: npt.NDArray[Any]) -> None:
        """Close a document after the sequence numbers `ends`."""
        if self._one_each and np.any(ends - self.documents != np.arange(1, len(ends) + 1)):
            self._one_each = False  # from here on they are spooled: first those that were only counted
            for chunk in _countings(1, self.documents + 1):
                self._files["documents"].write(chunk.data)
        if not self._one_each:
            self._files["documents"].write(np.ascontiguousarray(ends, _OFFSET).data)
        self.documents += len(ends)

    def note_max(self, token_id: int, document: int) -> None:
        """Document `document` holds `token_id`; the first holder of the largest is kept for `facts`."""
        if token_id > self.max_id:
            self.max_id, self._max_document = token_id, document

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._beside.shutdown()
            self._discard()

    def _publish(self) -> None:
        if self.tokens == 0:
            raise SteelError("there is no token to write", self.prefix, "give an input that has text")
        self._files["bin"].flush()
        synced = self._beside.submit(os.fsync, self._files["bin"].fileno())
        idx_sha = self._finish_index()
        idx_bytes = self._files["idx"].seek(0, os.SEEK_END)
        self._files["idx"].flush()
        os.fsync(self._files["idx"].fileno())
        self._wait_for_hash()
        synced.result()
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._aside("bin"), bin_path(self.prefix))
        os.replace(self._aside("idx"), idx_path(self.prefix))
        _sync_folder(Path(self.prefix).parent)
        self.facts = Facts(
            tokens=self.tokens, sequences=self.sequences, documents=self.documents, dtype=str(self.dtype.name),
            bin_bytes=self.tokens * self.dtype.itemsize, idx_bytes=idx_bytes,
            digest=content_digest(self._sha.digest(), idx_sha),
            max_token_id=self.max_id, max_token_document=self._max_document,
        )  # fmt: skip

    def _finish_index(self) -> bytes:
        """Lengths are in place: add the header, the offsets they imply and the boundaries. Returns the SHA-256."""
        idx, header = (
            self._files["idx"],
            _HEADER.pack(_MAGIC, 1, _CODES[self.dtype], self.sequences, self.documents + 1),
        )
        sha = hashlib.sha256(header)
        for lengths in self._lengths():
            sha.update(lengths.data)
        at = 0
        for lengths in self._lengths():
            ends = np.cumsum(lengths, dtype=_OFFSET) * self.dtype.itemsize + at
            at, offsets = int(ends[-1]), ends - lengths.astype(_OFFSET) * self.dtype.itemsize
            sha.update(offsets.data)
            idx.seek(0, os.SEEK_END)
            idx.write(offsets.data)
        idx.seek(0, os.SEEK_END)
        self._files["documents"].seek(0)
        spooled = iter(lambda: self._files["documents"].read(1 << 22), b"")
        chunks: Iterator[Any] = _countings(0, self.documents + 1) if self._one_each else spooled
        for chunk in chunks:
            sha.update(chunk)
            idx.write(chunk)
        idx.seek(0)
        idx.write(header)
        return sha.digest()

    def _lengths(self) -> Iterator[npt.NDArray[Any]]:
        idx, step = self._files["idx"], 1 << 20
        for start in range(0, self.sequences, step):
            idx.seek(_HEADER.size + start * _LENGTH.itemsize)
            yield np.frombuffer(idx.read(min(step, self.sequences - start) * _LENGTH.itemsize), _LENGTH)

    def _aside(self, name: str) -> str:
        return f"{self.prefix}.{name}.partial"  # a fixed name: what a killed writer leaves, the next one overwrites

    def _discard(self) -> None:
        for name, file in reversed(self._files.items()):  # the locked one last, and gone before it is unlocked
            Path(self._aside(name)).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what a full disk did not take is thrown away here
                file.close()


def _countings(start: int, stop: int) -> Iterator[npt.NDArray[Any]]:
    return (np.arange(at, min(at + (1 << 20), stop), dtype=_OFFSET) for at in range(start, stop, 1 << 20))


def negative_id(data: IndexedDataset, position: int) -> SteelError:
    """The error that names the document of a negative id at `position`."""
    document, token = data.document_of(position), int(data.read(position, position + 1)[0])
    what = f"document {document} (counted from 0) holds the negative token id {token}"
    return SteelError(what, bin_path(data.prefix), _AGAIN)


def content_digest(bin_sha256: bytes, idx_sha256: bytes) -> str:
    return hashlib.sha256(bin_sha256 + idx_sha256).hexdigest()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
