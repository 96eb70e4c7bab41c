"""Tokenizers: a Hugging Face folder or a sentencepiece model, behind one small face.

A faster call is used only after it has given the ids of the plain one on a set of awkward texts. Special tokens
written out in a text become their ids with a Hugging Face folder (chat data relies on it) and stay ordinary text with
a sentencepiece model. Loads local files only. Must not know data files or formats; training one is `train_tokenizer`,
encoding a corpus is `encoders`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_steel.errors import SteelError

log = logging.getLogger("megatron_steel")
Encode = Callable[[list[str]], list[list[int]]]

PROBES = (
    "钢铁是怎样炼成的？炼钢需要铁、碳和一千五百度的高温。",
    "The quick brown fox jumps over the lazy dog's back; it's 12:30.",
    "def f(x: int) -> str:\n\treturn f'{x!r}'  # tab\n\n\nclass A:\n    pass\n",
    "3.14159 1,000,000 ２０２４ ⅷ x²+y²=z² 0xFF",
    "🙂 👩\u200d👩\u200d👧 🇨🇳 e\u0301 é ﬁ ＡＢ",
    "  two  spaces\u3000全角空格\u00a0nbsp\r\nCRLF \t end ",
    "Привет, мир! こんにちは 안녕 שלום مرحبا ไทย",
    "\x00\x01\x7f\ufeff\u200b\ufffd",
    "𠮷野家 龘靐齉齾 ㍿ <s>[INST]<|im|><0x0A>",
    *("", " ", "\n", "a\n\n b\n\n\n", "aaaaaaaaaaa" + " " * 33 + "=" * 65),
)
"""Texts on which encoders are compared. Fingerprints hold their ids: another text here is another fingerprint."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    Attributes:
        name: the folder's or file's name, without its path.
        vocab_size: the largest id, added tokens included, plus one.
        eos_id: the id that ends a document.
        fingerprint: equal for tokenizers with the same pieces and the same ids on `PROBES`, wherever they lie.
    """

    name: str
    vocab_size: int
    eos_id: int
    fingerprint: str
    encode_batch: Encode
    """Ids of each text, nothing added at either end."""
    decode: Callable[[Sequence[int]], str]
    kind: str = "transformers"
    """or sentencepiece"""
    special: dict[str, int] = field(default_factory=dict)
    """The special strings that become one id where a text holds them written out, and that id."""
    serialized: Callable[[], str] = str
    """The text of its tokenizer.json; empty where it is none of Hugging Face's fast tokenizers."""

    def facts(self) -> dict[str, Any]:
        """For a manifest: name, vocab_size, eos_id, fingerprint."""
        return {key: getattr(self, key) for key in ("name", "vocab_size", "eos_id", "fingerprint")}


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a Hugging Face tokenizer folder or a sentencepiece `.model` file.

    Raises SteelError where it is not there, cannot be loaded, or has no end-of-text token.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file() and path.suffix == ".model":
        return _from_sentencepiece(path)
    what = "a tokenizer file ends in .model" if path.is_file() else "there is no such tokenizer"
    make = f"megatron-steel train-tokenizer TEXT... --output {path} --vocab-size N"
    raise SteelError(
        what, path, f"give a Hugging Face tokenizer folder or a sentencepiece .model file, or make one: {make}"
    )


def _from_folder(path: Path) -> Tokenizer:
    # Workers are processes: threads inside them would only fight, and a fork after threads may hang.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken folder makes it raise
        what = f"transformers cannot load this tokenizer: {type(error).__name__}: {error}"
        raise SteelError(what, path, "give a folder with tokenizer.json or the files of its class") from None
    if hf.eos_token_id is None:
        raise _no_eos(path, "set eos_token in its tokenizer_config.json")
    hf.model_max_length = int(1e30)  # a document may be of any length: no warning for each long one
    encode = _proven(_fast_encoders(hf), lambda texts: hf(texts, add_special_tokens=False)["input_ids"], path)
    vocab = hf.get_vocab()

    def decode(ids: Sequence[int]) -> str:
        return str(hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    pieces = sorted(vocab.items(), key=lambda item: (item[1], item[0]))
    added = {str(token): i for i, token in hf.added_tokens_decoder.items() if token.special and i != hf.unk_token_id}
    backend: Any = getattr(hf, "backend_tokenizer", None)
    return Tokenizer(
        name=path.resolve().name,
        vocab_size=max(vocab.values()) + 1,
        eos_id=hf.eos_token_id,
        fingerprint=_fingerprint(pieces, hf.eos_token_id, encode),
        encode_batch=encode,
        decode=decode,
        special=added,
        serialized=(lambda: str(backend.to_str())) if hasattr(backend, "to_str") else str,
    )


def _fast_encoders(hf: Any) -> list[Encode]:
    """Faster ways to the ids of `hf(texts)`, the fastest first; each is used only if it proves equal."""
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        return []

    def rust(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return [rust] if hasattr(backend, "encode_batch_fast") else []


def _proven(candidates: list[Encode], plain: Encode, path: Path) -> Encode:
    probes = list(PROBES)
    expected = [list(ids) for ids in plain(probes)]
    for encode in candidates:
        if encode(probes) == expected:
            return encode
        log.warning("a fast encoder gives other ids than the tokenizer in %s: not used", path)
    return plain


def _from_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        what = f"sentencepiece cannot load this model: {error}"
        raise SteelError(what, path, "give the .model file that its trainer wrote") from None
    if model.eos_id() < 0:
        raise _no_eos(path, "train it with an end-of-sentence piece")

    def encode(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = model.encode(texts, num_threads=1)
        return ids

    def decode(ids: Sequence[int]) -> str:
        return str(model.decode([int(i) for i in ids]))

    size = model.get_piece_size()
    pieces = [(model.id_to_piece(i), i) for i in range(size)]
    return Tokenizer(
        name=path.name,
        vocab_size=size,
        eos_id=model.eos_id(),
        fingerprint=_fingerprint(pieces, model.eos_id(), encode),
        encode_batch=encode,
        decode=decode,
        kind="sentencepiece",
    )


def _fingerprint(pieces: list[tuple[str, int]], eos_id: int, encode: Encode) -> str:
    # Neither paths nor library versions: files that serialise differently may hold one tokenizer.
    content = json.dumps([pieces, eos_id, encode(list(PROBES))], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _no_eos(path: Path, remedy: str) -> SteelError:
    return SteelError("the tokenizer has no end-of-text token (eos), which must end every document", path, remedy)
