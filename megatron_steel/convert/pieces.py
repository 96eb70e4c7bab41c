"""What the pieces of a tokenizer stand for, so that two tokenizers of different spelling can be compared.

A byte-level BPE writes " the" as `Ġthe`, sentencepiece as `▁the`, a byte that is no text as one of 256 letters or as
`<0xE9>`: a piece is known by its bytes. Where a tokenizer has neither spelling its pieces equal only the same strings.
Special tokens are known by their string, and are never equal to ordinary text. Must not know models or rows.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.errors import SteelError

if TYPE_CHECKING:
    from megatron_steel.data.tokenizer import Tokenizer

Key = tuple[str, bytes | str]
_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
ROLES = ("eos", "bos", "pad", "unk")


@dataclass(frozen=True)
class Pieces:
    """The vocabulary of one tokenizer."""

    names: dict[int, str]
    """Each id's string, as the tokenizer spells it."""
    keys: dict[int, list[Key]]
    """What each id stands for; the first that another tokenizer has too is taken."""
    roles: dict[str, int]
    """The ids of eos, bos, pad and unk, where it has them."""
    spelling: str
    """`bytes`, `spaces` (sentencepiece) or `plain`."""
    tokenize: Callable[[str], Sequence[int]] | None
    """Ids of a string in this tokenizer's own spelling, without splitting into words; None where it has no such model."""

    def by_key(self) -> dict[Key, int]:
        """The id of each thing stood for; a whole piece goes before a byte of the same meaning."""
        found: dict[Key, int] = {}
        for rank in range(max(map(len, self.keys.values()), default=0)):
            for number, keys in self.keys.items():
                if rank < len(keys):
                    found.setdefault(keys[rank], number)
        return found

    def spelled(self, key: Key) -> str | None:
        """What a key looks like in this tokenizer's text; None where it cannot be written."""
        value = key[1]
        if self.spelling == "bytes":
            return "".join(_LETTERS[byte] for byte in (value if isinstance(value, bytes) else value.encode()))
        try:
            text = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            return None
        return text.replace(" ", _SPACE) if self.spelling == "spaces" else text


def read_pieces(path: Path) -> Pieces:
    """The pieces of a tokenizer folder or sentencepiece `.model` file, which `load_tokenizer` has already accepted."""
    return _from_folder(path) if path.is_dir() else _from_sentencepiece(path)


def _from_folder(path: Path) -> Pieces:
    from transformers import AutoTokenizer

    hf: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    names = {number: piece for piece, number in hf.get_vocab().items()}
    added = {number: (str(token), token.special) for number, token in hf.added_tokens_decoder.items()}
    backend = getattr(hf, "backend_tokenizer", None)
    tree = json.loads(backend.to_str()) if hasattr(backend, "to_str") else {}
    spelling = _spelling(tree)
    keys = {n: _keys(name, spelling) if n not in added else _added_keys(*added[n]) for n, name in names.items()}
    roles = {role: getattr(hf, f"{role}_token_id") for role in ROLES}
    known = {role: number for role, number in roles.items() if number is not None}
    inner = backend.model if tree else None
    tokenize = None if inner is None else lambda text: [token.id for token in inner.tokenize(text)]
    return Pieces(names, keys, known, spelling, tokenize)


def _from_sentencepiece(path: Path) -> Pieces:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    names = {number: model.id_to_piece(number) for number in range(model.get_piece_size())}
    special = {number for number in names if model.is_control(number) or model.is_unknown(number)}
    keys = {n: _added_keys(name, True) if n in special else _keys(name, "spaces") for n, name in names.items()}
    roles = {role: getattr(model, f"{role}_id")() for role in ROLES}
    return Pieces(names, keys, {role: number for role, number in roles.items() if number >= 0}, "spaces", None)


def _spelling(tree: dict[str, Any]) -> str:
    """How a tokenizer.json writes bytes and spaces, by the steps before and after its model."""
    steps = json.dumps([tree.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    if '"ByteLevel"' in steps:
        return "bytes"
    return "spaces" if '"Metaspace"' in steps or f'"{_SPACE}"' in steps else "plain"


def _keys(name: str, spelling: str) -> list[Key]:
    """What an ordinary piece stands for."""
    if spelling == "bytes":
        if all(letter in _BYTES for letter in name):
            return [("text", bytes(_BYTES[letter] for letter in name))]
        return [("plain", name)]  # a piece that no text can make
    if spelling == "plain":
        return [("plain", name)]
    byte = _BYTE.fullmatch(name)
    if byte:
        raw = bytes([int(byte[1], 16)])
        return [("byte", raw), ("text", raw)]
    return [("text", name.replace(_SPACE, " ").encode())]


def _added_keys(content: str, special: bool) -> list[Key]:
    return [("added", content)] if special else [("added", content), ("text", content.encode())]


def _letters() -> dict[int, str]:
    """GPT-2's letters for the 256 bytes: printable Latin-1 stands for itself, the rest for letters from 256 on."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {**{b: chr(b) for b in itself}, **{b: chr(256 + i) for i, b in enumerate(others)}}


_LETTERS = _letters()
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}


def load_alone(folder: Path, scratch: Path) -> tuple[Path, "Tokenizer"]:
    """A model folder's tokenizer, from its files alone: beside a config.json transformers may load another class.

    Returns: where the files lie that were read, `scratch` or (where they need the configuration) `folder`; the tokenizer.
    Raises SteelError: the folder holds no tokenizer, or it cannot be loaded.
    """
    from megatron_steel.convert import companions
    from megatron_steel.data.tokenizer import load_tokenizer

    if not companions.copy_tokenizer_files(folder, scratch):
        raise SteelError("the model's folder holds no tokenizer, so nobody knows which row is which piece", folder,
                         "put the tokenizer's files beside its weights")  # fmt: skip
    try:
        return scratch, load_tokenizer(scratch)
    except SteelError:
        return folder, load_tokenizer(folder)
