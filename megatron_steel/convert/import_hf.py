"""A published model becomes a folder to start from: as it is, with another vocabulary, or with chosen layers.

1. `published` reads it; of a published Steel-LLM the tensors are those of our own classes, name for name.
2. Unchanged, its files are copied once they prove to hold what its class needs; a Steel-LLM's tensors are written again.
3. Changed, tensors stream from file to file (`change`): layers renumbered, rows of the vocabulary chosen.

The dtype on disk is kept. Knows nothing of runs and checkpoints.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_steel.convert import published_steel
from megatron_steel.convert.change import (
    GENERATION,
    Change,
    copy_if_there,
    require_finite,
    write_beside,
    write_changed,
    write_weights,
)
from megatron_steel.convert.published import Published, once, read_published, require_loads
from megatron_steel.convert.weights import BIN, SAFE
from megatron_steel.model.folder import refuse_outside


def import_hf(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    trust_code: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    vocab_size: int | None = None,
    layers: Sequence[int] | None = None,
) -> Path:
    """Make `output` a Hugging Face folder that `model.path` and `model.init_from` take.

    Args:
        source: a folder with `config.json` and weights (safetensors or pytorch_model.bin, whole or sharded).
        output: must not exist, or be empty; it appears whole or not at all.
        trust_code: allow modelling code of a foreign architecture to run (a Steel-LLM folder's is never run).
        tokenizer: the new model's, a folder or a sentencepiece `.model` (default: the one in `source`).
        vocab_size: rows of its embedding (default: as many as `tokenizer` has ids, or as in `source`).
        layers: those that it has, in this order, counted from 0 or from the end (-1); one may come twice.

    Raises:
        SteelError: no model there, a missing, unexpected or misshapen tensor (named), an impossible configuration, a
            layer that does not exist or cannot stand elsewhere, a number that is not finite, a tokenizer that does not fit.
    """
    from megatron_steel.convert.hf import publishing, refuse_used

    folder, target = Path(source), Path(output).absolute()
    refuse_used(target)
    refuse_outside(folder)
    found = read_published(folder, trust_code)
    with publishing(target, "import") as aside:
        if tokenizer is not None or vocab_size is not None or layers is not None:
            said = write_changed(found, aside, None if tokenizer is None else Path(tokenizer), vocab_size, layers)
        else:
            said = _steel(found, aside) if found.is_steel else _copy(found, aside)
    print(f"{output}: {said}")
    return target


def _steel(source: Published, aside: Path) -> str:
    """Write a published Steel-LLM as our own folder; returns what to tell."""
    from megatron_steel.convert import companions

    change = Change({name: [name] for name in once(source)})
    write_weights(source, change, aside)
    tokenizer = bool(companions.copy_tokenizer_files(source.folder, aside))
    write_beside(source, source.tree, aside)
    published_steel.tell_what_is_absent(source.folder, tokenizer)
    c = source.config
    return (
        f"Steel-LLM with FFN {c.FFN_type}, MLP {c.mlp_type}, {'tied' if c.tie_word_embeddings else 'untied'} head; "
        f"{_parameters(source):,} parameters in {len(change.names)} tensors ({source.tree['dtype']}), each equal to the "
        "published one"
    )


def _copy(source: Published, aside: Path) -> str:
    """Prove that a folder loads, then copy what it needs; returns what to tell."""
    from megatron_steel.convert import companions

    folder = source.folder
    require_loads(folder, source.config, source.weights.shapes, source.shapes, source.trust_code)
    for name, tensor in source.weights.items():
        require_finite(name, tensor, folder)
    for name in ("config.json", *(file.name for file in source.weights.files), f"{SAFE}.index.json",
                 f"{BIN}.index.json", GENERATION):  # fmt: skip
        copy_if_there(folder / name, aside)
    for file in companions.code_files(source.config, str(folder)):
        shutil.copyfile(file, aside / file.name)
    companions.copy_tokenizer_files(folder, aside)
    return (
        f"{type(source.model).__name__} with {_parameters(source):,} parameters, copied as it is; it loads without a "
        "tensor missing or left over"
    )


def _parameters(source: Published) -> int:
    """Numbers in all parameters; a tied matrix counts once."""
    return sum(parameter.numel() for parameter in source.model.parameters())
