"""What files call a tensor where transformers 5 calls it otherwise than all before it.

In training a tensor has the name of transformers 5. Published files of some families have an older one, which 5.x
reads too and everything else (4.x, vLLM, llama.cpp) needs. Must not know files or numbers.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

PUBLISHED = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}}
"""model_type: {name in training: name in files}."""


def trained(model_type: str, named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """The same pairs, each under the name of training: what an older transformers trained has the files' names."""
    names = {old: new for new, old in PUBLISHED.get(model_type, {}).items()}
    return ((names.get(name, name), value) for name, value in named)


def published(model_type: str, named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """The same pairs, each under the name that files have."""
    names = PUBLISHED.get(model_type, {})
    return ((names.get(name, name), value) for name, value in named)
