"""Make a tokenizer smaller: keep the ids that a corpus uses most, and everything that they are built from.

BPE that can write any text by bytes. Kept are the bytes, the added tokens, and then, by how often an id occurs in
tokenized data, each token together with all tokens on all ways that lead to it by merges. So a text all of whose ids
are kept gets the same pieces as before: the merges that fired are all there, and a merge that is gone had not fired.
Other texts get more, shorter pieces. `kept_ids.json` says which old id each new one was, for a model's embeddings.
Must not know the byte format or models.
"""

import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.data import manifest
from megatron_steel.data.indexed import IndexedDataset, PathLike
from megatron_steel.data.tokenizer import PROBES, Tokenizer, load_tokenizer
from megatron_steel.errors import SteelError

log = logging.getLogger("megatron_steel")
KEPT_IDS = "kept_ids.json"
_PROVEN_DOCUMENTS = 200
_BYTES = 256


def prune_tokenizer(source: PathLike, prefixes: Sequence[PathLike], vocab_size: int, output_dir: PathLike) -> float:
    """Write a tokenizer of `vocab_size` ids to `output_dir`; returns the share of the data's tokens that keep their id.

    Args:
        source: a Hugging Face folder whose tokenizer is BPE with all bytes (GPT-2's, Qwen's, Llama's kinds).
        prefixes: data sets that this tokenizer made; their ids are counted.
        vocab_size: ids in all, added tokens included, without holes.

    Raises:
        SteelError: another kind of tokenizer, data of another one, a size that is no smaller or cannot hold bytes and
            added tokens, or an output that exists.
    """
    output = Path(output_dir).resolve()
    if output.exists():
        raise SteelError("the output exists", output, "choose another folder")
    before = load_tokenizer(source)
    tree = _bpe(source)
    counts = _counts(prefixes, before)
    kept = _choose(tree, counts, vocab_size, source)
    aside = output.with_name(f"{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write(aside, source, _pruned(tree, kept), kept)
        _prove(before, load_tokenizer(aside), kept, prefixes)
        os.replace(aside, output)
    except OSError as error:
        raise SteelError(f"cannot write: {error.strerror or error}", output, "choose another folder") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    share = float(counts[kept].sum() / max(1, counts.sum()))
    log.info(
        "%s: %d of %d ids; %.3f%% of the data's tokens keep their id",
        output,
        vocab_size,
        before.vocab_size,
        100 * share,
    )
    return share


def _hf(source: PathLike) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.fspath(source), local_files_only=True, trust_remote_code=False)


def _bpe(source: PathLike) -> dict[str, Any]:
    """`tokenizer.json` as a tree, also of a folder that has none. Raises SteelError where pruning would not be exact."""
    backend = getattr(_hf(source), "backend_tokenizer", None)
    tree: dict[str, Any] = json.loads(backend.to_str()) if backend else {"model": {"type": "none in Rust"}}
    model = tree["model"]
    if model["type"] != "BPE":
        raise SteelError(f"its kind is {model['type']}", source, "only BPE tokenizers can be pruned exactly")
    post = tree.get("post_processor") or {"type": "ByteLevel"}
    if post["type"] not in ("ByteLevel", "TemplateProcessing"):
        raise SteelError(f"it ends with a {post['type']} step, which holds ids", source, "this kind is not supported")
    model["merges"] = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if not model.get("byte_fallback") and len(_letters(model["vocab"])) < _BYTES:
        raise SteelError("it cannot write any text by bytes", source, "use a byte-level tokenizer")
    return tree


def _letters(vocab: dict[str, int]) -> set[str]:
    """Tokens of one character: with byte-level BPE, the bytes."""
    return {token for token in vocab if len(token) == 1}


def _counts(prefixes: Sequence[PathLike], tokenizer: Tokenizer) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """How often each id occurs in the data: i64 [vocab_size]."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for prefix in prefixes:
        made_by = manifest.trust(prefix, tokenizer.vocab_size).tokenizer
        if made_by and made_by["fingerprint"] != tokenizer.fingerprint:
            remedy = "count data that this tokenizer made"
            raise SteelError(f"the data was made by another tokenizer ({made_by['name']})", prefix, remedy)
        with IndexedDataset(prefix) as data:
            for raw in data.raw("bin"):
                counts += np.bincount(np.frombuffer(raw, data.dtype), minlength=len(counts))
    return counts


def _choose(tree: dict[str, Any], counts: Any, size: int, source: PathLike) -> list[int]:
    """The old ids that stay, ascending."""
    model = tree["model"]
    vocab: dict[str, int] = model["vocab"]
    parts: dict[str, set[str]] = defaultdict(set)
    for left, right in model["merges"]:
        parts[left + right] |= {left, right}
    added = {token["id"] for token in tree["added_tokens"]}
    fallback = [f"<0x{byte:02X}>" for byte in range(_BYTES)] if model.get("byte_fallback") else _letters(vocab)
    kept = added | {vocab[token] for token in [*fallback, *filter(None, [model.get("unk_token")])]}
    if not len(kept) <= size < len({*vocab.values()} | added):
        what = f"{size} ids: the bytes and added tokens alone are {len(kept)}, and the tokenizer has {len(counts)}"
        raise SteelError(what, source, "choose a size between them")
    by_count = sorted(vocab, key=lambda token: (-counts[vocab[token]], vocab[token]))
    while len(kept) < size:  # what did not fit may later, when others have brought most of its parts
        for token in by_count:
            new = {vocab[part] for part in _closure(token, parts)} - kept
            if len(kept) + len(new) <= size:
                kept |= new
    return sorted(kept)


def _closure(token: str, parts: dict[str, set[str]]) -> set[str]:
    """The token and all that it may be merged from."""
    found, open_ = set(), [token]
    while open_:
        if (part := open_.pop()) not in found:
            found.add(part)
            open_ += parts.get(part, ())
    return found


def _pruned(tree: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    new = {old: number for number, old in enumerate(kept)}
    model = dict(tree["model"])
    model["vocab"] = {
        token: new[old] for token, old in sorted(model["vocab"].items(), key=lambda i: i[1]) if old in new
    }
    model["merges"] = [list(m) for m in model["merges"] if {*m, m[0] + m[1]} <= model["vocab"].keys()]
    tree = {**tree, "model": model}
    tree["added_tokens"] = [{**token, "id": new[token["id"]]} for token in tree["added_tokens"]]
    if (post := tree.get("post_processor")) and post["type"] == "TemplateProcessing":
        special = {
            name: {**entry, "ids": [new[i] for i in entry["ids"]]} for name, entry in post["special_tokens"].items()
        }
        tree["post_processor"] = {**post, "special_tokens": special}
    return tree


def _write(folder: Path, source: PathLike, tree: dict[str, Any], kept: list[int]) -> None:
    """A folder that transformers 4 and 5 load: written by hand, for a re-save by 5 cannot be read by 4."""
    hf = _hf(source)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": hf.model_max_length,
        "clean_up_tokenization_spaces": False,
        **{key: getattr(hf, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token") if getattr(hf, key)},
    }  # fmt: skip
    named = {config.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    config["additional_special_tokens"] = [
        t["content"] for t in tree["added_tokens"] if t["special"] and t["content"] not in named
    ]
    if hf.chat_template:
        config["chat_template"] = hf.chat_template
    folder.mkdir(parents=True)
    for name, value in (("tokenizer.json", tree), ("tokenizer_config.json", config), (KEPT_IDS, kept)):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _prove(before: Tokenizer, after: Tokenizer, kept: list[int], prefixes: Sequence[PathLike]) -> None:
    """Same pieces where all are kept, and the same text back everywhere: on awkward texts and on the data's own."""
    new = {old: number for number, old in enumerate(kept)}
    texts = [*PROBES, *_documents(prefixes, before)]
    for text, old, now in zip(texts, before.encode_batch(texts), after.encode_batch(texts), strict=True):
        same = any(i not in new for i in old) or [new[i] for i in old] == list(now)
        if not same or before.decode(old) != after.decode(now):
            raise RuntimeError(f"the pruned tokenizer differs on {text!r}")


def _documents(prefixes: Sequence[PathLike], tokenizer: Tokenizer) -> Iterator[str]:
    for prefix in prefixes:
        with IndexedDataset(prefix) as data:
            for number in range(0, data.documents, max(1, data.documents // _PROVEN_DOCUMENTS)):
                yield tokenizer.decode(data.document(number)[:1000].tolist())
