"""Many texts to ids: gigatoken where it has proved equal to the tokenizer, else the tokenizer itself.

Two libraries agree on a character only where both know it: the standard gains letters and marks every year, and
gigatoken's tables are newer than those of `tokenizers`. So it gets texts of `_SETTLED` characters alone, on every one of
which the two have been compared; a text with any other goes to the tokenizer, which a worker loads when the first comes.

`choose` decides once for a job, in the parent: it compares the two on every such character, on `PROBES` and on the first
documents of the input, and says in one line which is used and why. The `Choice` travels to the workers, and each opens an `Encoder`.
The ids are the same either way, so the choice changes nothing but the time. Must not know files or data sets.
"""

import importlib.util
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_steel.data.tokenizer import PROBES, Tokenizer, load_tokenizer
from megatron_steel.errors import SteelError

log = logging.getLogger("megatron_steel")
Ids = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]
"""The ids of all texts one after another, and how many each text has."""
_MORE_PROBES = (
    "\u1100\u1161 \u0915\u093c \u0958 \u212b \u2126 \ufb1d o\u0302\u0323 o\u0323\u0302",  # what NFC changes
    "a" * 5000 + "\n" * 300 + " " * 2001 + "。" * 1000 + "1" * 700 + "\t" * 65,
    "".join(map(chr, range(1, 0x300))),
    "\U0010ffff\ue000\ufffe\u2028\u2029\x85\x1c\v\f\r\r\n \r \n",
    "I'LL you'Re 'tis ''s DON'T l'été _snake_case camelCase HTTPServer x=-1e-9;//TODO\n\t\t}",
    "钢铁Steel炼钢123万吨，约￥4.5亿（2024年）……——「引号」\u3000\u3000段落\n\n",
    "<|im_start|>user\n你好<|im_end|>\n<|endoftext|><|im_end|",
    "नमस्ते दुनिया ﷺ 𝒜𝓫𝕔 👨\u200d👩\u200d👧\u200d👦🏽 \u0301\u0301",
)
_SETTLED = (
    (0x0000, 0x052F),  # Latin, phonetic letters, combining marks, Greek, Cyrillic
    (0x0531, 0x058F),  # Armenian
    (0x0590, 0x06FF),  # Hebrew, Arabic
    (0x0900, 0x09FD),  # Devanagari, Bengali up to the last mark that both know
    (0x0E00, 0x0E7F),  # Thai
    (0x10A0, 0x11FF),  # Georgian, Hangul letters
    (0x1E00, 0x2BFF),  # more Latin and Greek, punctuation, arrows, mathematics, box drawing, shapes, dingbats
    (0x2E80, 0xA4CF),  # radicals, CJK punctuation, kana, bopomofo, ideographs and extension A, Yi
    (0xA960, 0xA97F),  # Hangul letters
    (0xAC00, 0xD7FF),  # Hangul
    (0xE000, 0xFFFF),  # private use, compatibility ideographs and forms, full width
    (0x1D400, 0x1D7FF),  # mathematical letters
    (0x1F000, 0x1FAFF),  # tiles, enclosed letters, emoji
    (0x20000, 0x2A6DF),  # extension B
    (0x2F800, 0x2FA1F),  # compatibility ideographs
    (0xE0100, 0xE01EF),  # variants of ideographs
)
"""First and last code points whose characters the two read alike: `_every_character` compares them all, and
`tests/data/test_encoders.py` does so in many surroundings."""
_UNSETTLED = re.compile("[^" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in _SETTLED) + "]")
_CACHE_BYTES = 512 << 20  # gigatoken remembers every word it has seen, and forgets none by itself


@dataclass(frozen=True)
class Choice:
    """What a process needs to open the encoder; picklable.

    Attributes:
        name: "gigatoken" or "transformers" or "sentencepiece".
        path: the tokenizer's.
        serialized: its `tokenizer.json` text for gigatoken, else empty.
        vocab_size, eos_id, special_ids: the tokenizer's.
    """

    name: str
    path: str
    serialized: str
    vocab_size: int
    eos_id: int
    special_ids: tuple[int, ...]


class Encoder:
    """Callable on a list of texts, gives `Ids` (nothing added at either end). Has the choice's attributes."""

    def __init__(self, choice: Choice, encode: Callable[[list[str]], Ids] | None = None):
        self.choice, self.vocab_size, self.eos_id = choice, choice.vocab_size, choice.eos_id
        if encode is None and choice.name == "gigatoken":
            encode = _Divided(_Gigatoken(choice.serialized), lambda: _plain(load_tokenizer(choice.path)))
        self._encode = encode or _plain(load_tokenizer(choice.path))
        self._is_special = np.zeros(choice.vocab_size, bool)
        self._is_special[list(choice.special_ids)] = True

    def __call__(self, texts: list[str]) -> Ids:
        ids, lengths = self._encode(texts)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            bad = int(ids.max())
            what = f"the tokenizer gives id {bad}, but its vocabulary ends at {self.vocab_size - 1}"
            raise SteelError(what, self.choice.name, "mend the tokenizer's folder: its files do not belong together")
        return ids, lengths

    def special(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> int:
        """How many of the texts hold a special string of the tokenizer, written out."""
        found = np.flatnonzero(self._is_special[ids])
        return len(np.unique(np.searchsorted(np.cumsum(lengths), found, side="right")))


def choose(tokenizer: Tokenizer, path: str, documents: Sequence[str]) -> Encoder:
    """The fastest encoder that gives the tokenizer's own ids on probes and on `documents`; logs which and why."""
    written_out = [f"a{word}b {word}{word}\n {word} {word[:-1]}" for word in tokenizer.special]
    texts = [*PROBES, *_MORE_PROBES, *written_out, *_every_character(), *documents]
    facts = tokenizer.vocab_size, tokenizer.eos_id, tuple(sorted(set(tokenizer.special.values())))
    plain, source = _plain(tokenizer), tokenizer.serialized()
    try:
        fast = _proven(source, plain, texts)
    except _NotUsed as why:
        log.info("encoder: %s (gigatoken is not used: %s)", tokenizer.kind, why)
        return Encoder(Choice(tokenizer.kind, path, "", *facts), plain)
    log.info("encoder: gigatoken (equal to the tokenizer on %d probes and the first %d documents)",
             len(texts) - len(documents), len(documents))  # fmt: skip
    return Encoder(Choice("gigatoken", path, source, *facts), fast)


def _every_character() -> list[str]:
    """A text for each range of `_SETTLED`: every character in a word, before a contraction and behind a space."""
    return ["".join(f"a{chr(c)}'s {chr(c)}" for c in range(first, last + 1)) for first, last in _SETTLED]


class _NotUsed(Exception):  # noqa: N818  (it says why)
    """Why gigatoken cannot stand in for a tokenizer."""


def _proven(source: str, plain: Callable[[list[str]], Ids], texts: list[str]) -> "_Divided":
    if not source:
        raise _NotUsed("it reads Hugging Face's fast tokenizers only")
    if importlib.util.find_spec("gigatoken") is None:
        raise _NotUsed("it is not installed")
    try:
        fast = _Divided(_Gigatoken(source), lambda: plain)
        found = fast(texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise _NotUsed(f"it cannot read this tokenizer: {str(error).splitlines()[0][:200]}") from None
    wrong = [i for i, (mine, its) in enumerate(zip(_split(found), _split(plain(texts)), strict=True)) if mine != its]
    if wrong:
        raise _NotUsed(f"it gives other ids on {len(wrong)} of {len(texts)} texts, first on {texts[wrong[0]][:40]!r}")
    return fast


def _split(found: Ids) -> list[list[int]]:
    return [part.tolist() for part in np.split(found[0], np.cumsum(found[1])[:-1])]


def _plain(tokenizer: Tokenizer) -> Callable[[list[str]], Ids]:
    def encode(texts: list[str]) -> Ids:
        lists = tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        return np.fromiter(itertools.chain.from_iterable(lists), np.int64, int(lengths.sum())), lengths

    return encode


class _Divided:
    """Texts of settled characters to one encoder, the others to a second one, which is made when the first of them comes."""

    def __init__(self, fast: Callable[[list[str]], Ids], make_plain: Callable[[], Callable[[list[str]], Ids]]):
        self._fast, self._make_plain = fast, make_plain
        self._plain: Callable[[list[str]], Ids] | None = None

    def __call__(self, texts: list[str]) -> Ids:
        is_other = np.array([not text.isascii() and _UNSETTLED.search(text) is not None for text in texts], bool)
        if not is_other.any():
            return self._fast(texts)
        self._plain = self._plain or self._make_plain()
        found = self._plain([text for text, other in zip(texts, is_other, strict=True) if other])
        if is_other.all():
            return found
        return _joined(is_other, found, self._fast([text for text, o in zip(texts, is_other, strict=True) if not o]))


def _joined(is_first: npt.NDArray[np.bool_], first: Ids, second: Ids) -> Ids:
    """Two encoders' ids in the order of the texts."""
    lengths = np.empty(len(is_first), np.int64)
    lengths[is_first], lengths[~is_first] = first[1], second[1]
    owner = np.repeat(is_first, lengths)
    ids = np.empty(len(owner), np.int64)
    ids[owner], ids[~owner] = first[0], second[0]
    return ids, lengths


class _Gigatoken:
    """The Rust encoder in this thread alone, loaded anew whenever its memory of words has grown too large."""

    def __init__(self, serialized: str):
        import psutil

        self._serialized = serialized
        self._memory = psutil.Process().memory_info
        self._load()

    def _load(self) -> None:
        import gigatoken

        self._inner: Any = None  # the old one goes before the new one comes
        self._inner = gigatoken.Tokenizer.from_json(self._serialized)
        self._base = self._memory().rss

    def __call__(self, texts: list[str]) -> Ids:
        import awkward

        if self._memory().rss - self._base > _CACHE_BYTES:
            self._load()
        found = self._inner.encode_batch(texts, parallel=False)
        return np.asarray(awkward.flatten(found, axis=1)), np.asarray(awkward.num(found, axis=1))
