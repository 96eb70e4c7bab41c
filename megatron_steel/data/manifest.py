"""`PREFIX.manifest.json`: what a data set is, so that it can be trusted without being read again.

Counts, sizes, times of change, a digest of the content, the largest id and its document, the tokenizer and the input
files by name. The digest of every byte decides what is the same data; the MD5 of both ends of the `.bin` (as Steel-LLM
takes it) tells in a moment what probably is. It holds no absolute path and not the prefix: a data set may be moved and renamed.
A data set without one (Megatron's own) is scanned once and then has one. Must not know the byte format.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_steel.data.indexed import Facts, IndexedDataset, PathLike, bin_path, idx_path
from megatron_steel.data.permutation import permute
from megatron_steel.data.scan import scan
from megatron_steel.errors import SteelError

log = logging.getLogger("megatron_steel")
FORMAT_VERSION = 1
_END_BYTES = 25_000_000
TokenizerFacts = dict[str, Any]
"""name, vocab_size, eos_id, fingerprint"""


@dataclass(frozen=True)
class Manifest(Facts):
    """`Facts`, and what only the maker or the file system knows."""

    bin_mtime_ns: int
    idx_mtime_ns: int
    tokenizer: TokenizerFacts | None = None
    provenance: list[dict[str, Any]] = field(default_factory=list)
    """One entry an input file, in order: name, bytes, documents, what became of its rows, and `shuffled` (key and number of
    documents) where the documents of several entries were permuted together."""
    format_version: int = FORMAT_VERSION
    head_tail_md5: str | None = None
    """`head_tail_md5` of the `.bin`; None in a manifest of an older version."""
    kind: str = "text"
    """`pairs`: each document is two sequences, a prompt and a response."""

    def origin(self, document: int) -> tuple[str, int] | None:
        """(name of the input file, number among the documents that came of it), all from 0; None where it is not known."""
        if sum(entry["documents"] for entry in self.provenance) != self.documents:
            return None  # a part of it came from elsewhere
        entries = iter([entry for entry in self.provenance if entry["documents"]])  # files that gave none lie anywhere
        for entry in entries:
            group, shuffle = [entry], entry.get("shuffled")
            while shuffle and sum(e["documents"] for e in group) < shuffle["documents"]:
                group.append(next(entries))
            size = sum(e["documents"] for e in group)
            if document < size:
                inside = permute(document, size, shuffle["key"]) if shuffle else document
                return _within(group, inside)
            document -= size
        return None


def _within(entries: list[dict[str, Any]], document: int) -> tuple[str, int]:
    for entry in entries:
        if document < entry["documents"]:
            return entry["name"], document
        document -= entry["documents"]
    raise IndexError(document)


def manifest_path(prefix: PathLike) -> Path:
    return Path(f"{os.fspath(prefix)}.manifest.json")


def head_tail_md5(prefix: PathLike) -> str:
    """MD5 of the first and the last 25,000,000 bytes of the `.bin`, or of all of it where it is shorter than both.

    Source: Steel-LLM (pretrain_modify_from_TinyLlama/lit_gpt/packed_dataset.py, `CalcMD5`). Data that differ only between the ends
    have equal ones: it hints, and the digest decides. Raises OSError.
    """
    md5 = hashlib.md5(usedforsecurity=False)
    with open(bin_path(prefix), "rb") as file:
        if os.fstat(file.fileno()).st_size < 2 * _END_BYTES:
            md5.update(file.read())
        else:
            md5.update(file.read(_END_BYTES))
            file.seek(-_END_BYTES, os.SEEK_END)
            md5.update(file.read())
    return md5.hexdigest()


def write(
    prefix: PathLike,
    facts: Facts,
    tokenizer: TokenizerFacts | None = None,
    provenance: Sequence[dict[str, Any]] = (),
    kind: str = "text",
) -> Manifest:
    """Write the manifest of data just written or scanned, whole or not at all. Raises OSError."""
    times = {
        f"{kind}_mtime_ns": path(prefix).stat().st_mtime_ns for kind, path in (("bin", bin_path), ("idx", idx_path))
    }
    more = {
        "tokenizer": tokenizer,
        "provenance": list(provenance),
        "head_tail_md5": head_tail_md5(prefix),
        "kind": kind,
    }
    manifest = _with_facts(facts, **times, **more)
    path = manifest_path(prefix)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(manifest), file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return manifest


def load(prefix: PathLike) -> Manifest | None:
    """The manifest as it is written; None where there is none or (with a warning) where it cannot be read."""
    path = manifest_path(prefix)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {tree.get('format_version')!r}")
        return Manifest(**tree)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s cannot be used (%s): the data will be scanned", path, error)
        return None


def fresh(prefix: PathLike) -> Manifest | None:
    """The manifest if it agrees with the files' sizes and times; else None. Raises SteelError as opening does."""
    with IndexedDataset(prefix) as data:
        manifest = load(prefix)
        if manifest is None or _found(data) != {key: getattr(manifest, key) for key in _found(data)}:
            return None
        return manifest


def trust(prefix: PathLike, vocab_size: int | None = None) -> Manifest:
    """The manifest of a data set whose files agree with it; otherwise scan the data once and remember.

    Args:
        vocab_size: when given, every token id must be below it.

    Raises:
        SteelError: as opening does; a broken index; a token id that is negative or not below `vocab_size`, with
            the number of a document that holds it.
    """
    manifest = fresh(prefix) or _rescan(prefix)
    if vocab_size is not None and manifest.max_token_id >= vocab_size:
        raise SteelError(
            f"document {manifest.max_token_document} (counted from 0) holds token id {manifest.max_token_id}, "
            f"but the vocabulary has {vocab_size} ids (0 to {vocab_size - 1})",
            bin_path(prefix),
            "tokenize with the model's tokenizer, or give the model a vocabulary at least as large",
        )
    return manifest


def warn_of_twins(prefixes: Sequence[PathLike]) -> None:
    """Say before a long scan which data sets look alike: equal sizes, and equal `head_tail_md5`. Not proven to be the same.

    Where every manifest is fresh nothing is read: their digests will tell. Raises SteelError as opening does.
    """
    known = {os.fspath(prefix): fresh(prefix) for prefix in prefixes}
    if None not in known.values():
        return
    seen: dict[tuple[int, str], str] = {}
    sizes = [bin_path(prefix).stat().st_size for prefix in known]
    for (prefix, manifest), size in zip(known.items(), sizes, strict=True):
        if sizes.count(size) > 1:
            md5 = (manifest and manifest.head_tail_md5) or head_tail_md5(prefix)
            twin = seen.setdefault((size, md5), prefix)
            if twin != prefix:
                log.warning("%s and %s look like the same data (equal size, beginning and end): a scan will tell", twin, prefix)  # fmt: skip


def _rescan(prefix: PathLike) -> Manifest:
    before = load(prefix)
    why = "its files have changed since their manifest was written" if before else "it has no manifest"
    log.info("scanning %s once: %s", os.fspath(prefix), why)
    facts = scan(prefix)
    same = before is not None and before.digest == facts.digest
    if before and not same:
        log.warning(
            "%s: the content is not what its manifest describes (digest %s, now %s): taken as new data",
            os.fspath(prefix), before.digest[:12], facts.digest[:12],
        )  # fmt: skip
    tokenizer, provenance, kind = (None, [], "text")
    if before and same:
        tokenizer, provenance, kind = before.tokenizer, before.provenance, before.kind
    try:
        return write(prefix, facts, tokenizer, provenance, kind)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start scans again", manifest_path(prefix), error.strerror)
        known = {"tokenizer": tokenizer, "provenance": provenance, "kind": kind}
        return _with_facts(facts, bin_mtime_ns=0, idx_mtime_ns=0, **known)


def _with_facts(facts: Facts, **more: Any) -> Manifest:
    return Manifest(**dataclasses.asdict(facts), **more)


def verify(prefix: PathLike) -> Manifest:
    """Read everything and compare with the manifest, whatever sizes and times say. Changes nothing on disk.

    Raises:
        SteelError: no manifest, a broken index, a negative id, or a list of all that differs.
    """
    manifest = load(prefix)
    found = dataclasses.asdict(scan(prefix))
    if manifest is None:
        what = "the index is consistent, but there is no manifest to compare the content with"
        raise SteelError(what, manifest_path(prefix), "it is written when the data is first trained on")
    wrong = [f"{key} is {value}, the manifest says {getattr(manifest, key)}" for key, value in found.items()
             if getattr(manifest, key) != value]  # fmt: skip
    if wrong:
        remedy = "restore the files, or tokenize again; if the change is meant, delete the manifest"
        raise SteelError("the data is not what its manifest says: " + "; ".join(wrong), prefix, remedy)
    return manifest


def describe(prefix: PathLike) -> dict[str, Any]:
    """Facts for people, without reading the data: counts from the header, the rest where a fresh manifest has it."""
    with IndexedDataset(prefix) as data:
        tokens, documents = data.tokens, data.documents
        facts: dict[str, Any] = {
            "tokens": tokens, "documents": documents, "sequences": data.sequences, "dtype": data.dtype.name,
            "mean tokens per document": round(tokens / documents, 1), "bytes": data.bin_bytes + data.idx_bytes,
        }  # fmt: skip
    manifest = fresh(prefix)
    if manifest is None:
        return facts | {"manifest": "none that agrees with the files: the first run scans them once"}
    facts |= {"largest token id": f"{manifest.max_token_id} (document {manifest.max_token_document}, counted from 0)"}
    facts |= {"digest": manifest.digest, "MD5 of both ends": manifest.head_tail_md5}
    facts |= {} if manifest.kind == "text" else {"kind": manifest.kind}
    facts |= {f"tokenizer {key}": value for key, value in (manifest.tokenizer or {}).items()}
    return facts | {"made from": [entry["name"] for entry in manifest.provenance]}


def _found(data: IndexedDataset) -> dict[str, Any]:
    """What the manifest says and the files show at a glance."""
    return {
        "tokens": data.tokens, "sequences": data.sequences, "documents": data.documents, "dtype": data.dtype.name,
        "bin_bytes": data.bin_bytes, "idx_bytes": data.idx_bytes,
        "bin_mtime_ns": bin_path(data.prefix).stat().st_mtime_ns,
        "idx_mtime_ns": idx_path(data.prefix).stat().st_mtime_ns,
    }  # fmt: skip
