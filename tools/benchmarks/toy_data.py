"""A tokenizer of made-up words and tokens of no meaning: what a benchmark needs where the text does not matter."""

from pathlib import Path

import numpy as np

from megatron_steel.data.indexed import IndexedWriter


def write_tokenizer(folder: Path, words: int) -> Path:
    """A Hugging Face tokenizer folder with `words` entries; the end of a document is 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<|endoftext|>": 0, "<|im_end|>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, words)}}
    inner = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return folder


def write_data(prefix: Path, tokens: int, words: int, document: int = 500, seed: int = 7) -> Path:
    """`PREFIX.bin` and `.idx` with at least so many tokens, in documents of `document` tokens."""
    generator = np.random.default_rng(seed)
    dtype = np.uint16 if words <= 2**16 else np.int32
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, dtype) as writer:
        for _ in range(-(-tokens // document)):
            writer.add_document(np.append(generator.integers(3, words, document - 1), 1).astype(dtype))
    return prefix
