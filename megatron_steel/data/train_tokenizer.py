"""Train a sentencepiece BPE tokenizer and write it as a Hugging Face folder that needs no sentencepiece.

Nothing is normalised: `decode(encode(text)) == text` for every text without U+2581 (sentencepiece's own sign for a
space); unknown characters become bytes. ChatML's `<|im_start|>`, `<|im_end|>` (end of document) and `<|endoftext|>`
(padding) are control tokens. The folder is proven to give sentencepiece's ids before it takes its name.
Same input, same bytes. Must not know `.bin`/`.idx`.
"""

import io
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_steel.data import readers
from megatron_steel.data.tokenizer import PROBES, load_tokenizer
from megatron_steel.errors import SteelError

log = logging.getLogger("megatron_steel")
UNKNOWN, PAD, EOS, START = "<unk>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"
_SPACE = "\u2581"
_SAMPLE_BYTES = 128 << 20  # text for the trainer: more changes little and takes memory (about ten times as much)
_APART = "\n|" + "|".join(map(re.escape, (UNKNOWN, PAD, EOS, START)))  # control tokens must not become pieces
_LINE_CHARACTERS = 1000  # the trainer skips long lines; Chinese ones are long
_FILES = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}  # all that is written, or replaced
_HELD_OUT = 100  # every so many documents one is not trained on
_NORMAL = 1  # a piece's type in a sentencepiece model
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(
    inputs: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    vocab_size: int,
    text_key: str = "text",
    compare: Sequence[str | os.PathLike[str]] = (),
) -> dict[str, float]:
    """Train on jsonl, json, parquet or text files (an even sample of at most 128 MB) and write `output_dir`.

    Args:
        vocab_size: ids in all, control tokens and 256 bytes included; exactly so many come out.
        compare: other tokenizers, measured on the same held-out text.

    Returns: characters per token of the new one and of each in `compare`, by path, on every 100th document, which is
        held out of the training; empty where there are fewer documents.

    Raises:
        SteelError: an input cannot be read or holds no text, the vocabulary is too large for the text (naming the
            largest possible) or too small, or `output_dir` holds anything that is not written here.
    """
    output = Path(output_dir).resolve()
    _check_output(output)
    others = {os.fspath(path): load_tokenizer(path) for path in compare}
    started = time.monotonic()
    lines, held_out = _sample(inputs, text_key)
    model = _train(lines, vocab_size, output)
    aside = output.with_name(f"{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write_folder(aside / "new", model, vocab_size)
        _prove(aside / "new", lines)
        _check_output(output)  # the training took a while
        _put_in_place(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log.info("tokenizer of %d ids in %s (%.1f s)", vocab_size, output, time.monotonic() - started)
    return {
        path: sum(map(len, held_out)) / sum(map(len, tokenizer.encode_batch(held_out)))
        for path, tokenizer in ({os.fspath(output_dir): load_tokenizer(output)} | others).items() if held_out
    }  # fmt: skip


def _check_output(output: Path) -> None:
    """Only what a training wrote may be replaced: a model's folder holds a tokenizer.json, too."""
    if output == Path.cwd():
        raise SteelError("the output is the current folder", output, "choose another folder")
    if not output.exists():
        return
    foreign = sorted({path.name for path in output.iterdir()} - _FILES) if output.is_dir() else ["a file"]
    if foreign:
        what = f"the output exists and is no tokenizer folder: it holds {', '.join(foreign[:5])}"
        raise SteelError(what, output, "choose another folder")


def _put_in_place(aside: Path, output: Path) -> None:
    if not output.exists():
        os.replace(aside / "new", output)
        return
    os.replace(output, aside / "old")
    try:
        os.replace(aside / "new", output)
    except OSError:
        os.replace(aside / "old", output)
        raise


def _sample(inputs: Sequence[str | os.PathLike[str]], text_key: str) -> tuple[list[str], list[str]]:
    """Lines from every part of the input, in order, each part giving its share of the budget; and held-out texts."""
    units = [unit for path in inputs for unit in readers.units(path, 16 << 20)]
    total = sum(unit.size for unit in units)
    lines: list[str] = []
    held_out: list[str] = []
    documents = 0
    for unit in units:
        left = _SAMPLE_BYTES * unit.size / max(1, total)
        for text in _texts(unit, text_key):
            documents += 1
            if documents % _HELD_OUT == 0:
                held_out.append(text)
                continue
            for line in re.split(_APART, text):
                lines += [line[i : i + _LINE_CHARACTERS] for i in range(0, len(line), _LINE_CHARACTERS)]
            left -= len(text.encode())
            if left <= 0:
                break
    if not lines:
        what = "the input holds no text to train a tokenizer on"
        raise SteelError(what, ", ".join(map(str, inputs)), f"is the text under the key {text_key!r}?")
    return lines, held_out


def _texts(unit: readers.Unit, text_key: str) -> Iterator[str]:
    return (row.text for row in readers.rows(unit, text_key) if row.text)


def _train(lines: list[str], vocab_size: int, output: Path) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=0.9995, required_chars=_SPACE, byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            unk_id=0, pad_id=1, eos_id=2, bos_id=-1, unk_piece=UNKNOWN, pad_piece=PAD, eos_piece=EOS,
            control_symbols=[START], max_sentence_length=4 * _LINE_CHARACTERS + 1,
            num_threads=os.cpu_count() or 1, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise _too_large_or_small(str(error), vocab_size, output) from None
    return model.getvalue()


def _too_large_or_small(message: str, vocab_size: int, output: Path) -> Exception:
    where = f"--vocab-size {vocab_size} for {output}"
    if found := re.search(r"too high.*?<= (\d+)", message):
        what = f"the text is too small for a vocabulary of {vocab_size}: the largest possible is {found[1]}"
        return SteelError(what, where, f"ask for at most {found[1]}, or give more text")
    if "smaller than required_chars" in message:
        found = re.search(r"(\d+) vs (\d+)", message)
        least = f": the smallest possible is {max(map(int, found.groups()))}" if found else ""
        what = f"a vocabulary of {vocab_size} cannot hold the characters of the text{least}"
        return SteelError(what, where, "ask for a larger one")
    return SteelError(f"sentencepiece could not train: {message}", where, "change the text or the size")


def _write_folder(folder: Path, model: bytes, vocab_size: int) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    if len(proto.pieces) != vocab_size:
        raise SteelError(
            f"the text gave {len(proto.pieces)} ids, {vocab_size} were asked for", folder, "ask for another size"
        )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model)
    fast = _hugging_face(proto)
    (folder / "tokenizer.json").write_text(json.dumps(fast, ensure_ascii=False, indent=1), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN,
        "additional_special_tokens": [START], "chat_template": CHAT_TEMPLATE, "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _hugging_face(proto: Any) -> dict[str, Any]:
    """`tokenizer.json` for a BPE model: every way to put a piece together from two is a merge, best piece first."""
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = []
    for piece in sorted(normal, key=lambda p: -normal[p]):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted((pair for pair in pairs if pair[0] in normal and pair[1] in normal), key=lambda p: vocab[p[0]])
    special = [
        {"id": vocab[token], "content": token, "special": True, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
        for token in (PAD, EOS, START)
    ]  # fmt: skip
    # No piece reaches across the start of a run of spaces or a line end: cutting there changes no id and keeps
    # every word short, which is what makes the encoder quick.
    words = {"Regex": f"{_SPACE}+[^{_SPACE}\\n]*|[^{_SPACE}\\n]+|\\n"}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": {"type": "Split", "pattern": words, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": UNKNOWN, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocab, "merges": [list(pair) for pair in merges]},
    }  # fmt: skip


def _prove(folder: Path, lines: list[str]) -> None:
    """The folder's ids are sentencepiece's, on awkward texts and on lines from all over the sample."""
    texts = [*PROBES, *lines[:: max(1, len(lines) // 2000)]]
    ours, theirs = load_tokenizer(folder), load_tokenizer(folder / "tokenizer.model")
    for text, mine, its in zip(texts, ours.encode_batch(texts), theirs.encode_batch(texts), strict=True):
        if mine != its or (ours.decode(mine) != text and _SPACE not in text):
            raise RuntimeError(f"the Hugging Face form of the tokenizer differs from sentencepiece on {text!r}")
