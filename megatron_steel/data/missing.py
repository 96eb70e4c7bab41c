"""Data that a recipe names and nobody has made yet: the commands that make it, to be copied.

A prefix whose last part is a corpus that `prepare` knows gets that corpus's commands. Must not know recipes.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_steel.data.fetch import CORPORA
from megatron_steel.data.indexed import bin_path, idx_path
from megatron_steel.errors import SteelError


def require_made(prefixes: Sequence[str], tokenizer_path: str, key: str, pairs: bool = False) -> None:
    """Raise SteelError that lists every prefix without a file, and how to make each. (One file of two is another mistake.)

    Args:
        tokenizer_path: what the run tokenizes with.
        key: of the recipe, to point at.
        pairs: the model is an encoder-decoder.
    """
    missing = [prefix for prefix in prefixes if not bin_path(prefix).exists() and not idx_path(prefix).exists()]
    if not missing:
        return
    what = f"no data lies at {', '.join(missing)}: neither .bin nor .idx"
    lines = [line for prefix in missing for line in commands(prefix, tokenizer_path, pairs)]
    remedy = f"mend the path (without .bin or .idx), or make {'it' if len(missing) == 1 else 'them'}:\n    "
    raise SteelError(what, key, remedy + "\n    ".join(lines))


def commands(prefix: str, tokenizer_path: str, pairs: bool = False) -> list[str]:
    """The commands that make a data set, one a line."""
    held_out = prefix.endswith("-validation")
    made = prefix.removesuffix("-validation") if held_out else prefix
    path = Path(made)
    name = (
        path.parent.name if path.name == "train" and path.parent.name else path.name
    )  # data/zh/train: the text is zh.jsonl
    tokenize = f"megatron-steel tokenize {name}.jsonl --tokenizer {tokenizer_path} --output {made}"
    if pairs:
        tokenize += " --prompt-key prompt --response-key response"
    if held_out:
        return [f"{tokenize} --validation-ratio 0.001"]
    corpus = None if pairs else CORPORA.get(name)
    if corpus is None:
        return [tokenize]
    raw = f"raw/{name}"
    get = f"megatron-steel prepare {name} --fetch {raw}" if corpus.huggingface else f"# into {raw}: {corpus.by_hand}"
    prepare = f"megatron-steel prepare {name} $(find {raw} -type f ! -name fetch.json) --output {name}.jsonl"
    return [get, prepare, tokenize]
