"""ZeRO checkpoints that others wrote: transformers' Trainer with DeepSpeed, or a loop that calls the engine itself.

    RUN/checkpoint-N/{global_stepN/*.pt, latest, config.json, tokenizer files}     Trainer; RUN means its newest whole one
    SAVED/{latest, TAG/*.pt} or SAVED/TAG                                          a loop; the model is named beside it

Nothing was hashed by the trainer, so whole means: the files of every rank are there and open. The files are pickles of
strangers, and `checkpoint.zero` reads them weights-only. Must not know what an export looks like.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.checkpoint import zero
from megatron_steel.checkpoint.commit import Checkpoint
from megatron_steel.checkpoint.sound import require_sound
from megatron_steel.convert.sources import Trained, tokenizer_at
from megatron_steel.errors import SteelError

LATEST = "latest"  # DeepSpeed's pointer: the name of the folder with the newest files
_TRAINERS = re.compile(r"^checkpoint-(\d+)$")
_STATES = "*model_states.pt"
_GENERATION = "generation_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def is_foreign(source: Path) -> bool:
    """Whether others' checkpoints lie here, whole or not."""
    named = source.is_dir() and _TRAINERS.match(source.resolve().name) is not None
    return named or bool(_checkpoints(source)) or (source / LATEST).is_file() or _has_states(source)


def find(source: Path, model: Path | None, tokenizer: Path | None = None) -> Trained:
    """What a checkpoint of others holds; of several in a Trainer's output folder the newest whole one.

    Args:
        model: a Hugging Face folder with the configuration, and maybe the tokenizer, where the checkpoint has none.
        tokenizer: a folder or a `.model`, instead of what lies beside the checkpoint or the model.
    Raises:
        SteelError: none is whole, a damaged or unsafe file, no configuration, names that are not the model's.
    """
    candidates = _checkpoints(source)
    problems = []
    for path in reversed(candidates):
        try:
            return _trained(path, model, source, tokenizer)
        except SteelError as error:
            if len(candidates) > 1:
                dist.log.warning("passed over a checkpoint: %s", error)
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        what = f"none of its {len(problems)} checkpoints can be exported; the newest: {problems[0].what}"
        raise SteelError(what, source, problems[0].remedy)
    return _trained(source, model, source, tokenizer)


def _trained(path: Path, model: Path | None, source: Path, place: Path | None) -> Trained:
    from megatron_steel.convert import names
    from megatron_steel.model.build import build_config
    from megatron_steel.recipe import Model

    states = _states_of(path)
    if model is not None and not (model / "config.json").is_file():
        raise SteelError("the model's folder has no config.json", model, "name another folder: --model HF_DIR")
    folder = _first((model, path, path.parent), "config.json")
    if folder is None:
        raise SteelError("the checkpoint says nothing of its model: there is no config.json beside it", path,
                         "name the model's folder: --model HF_DIR")  # fmt: skip
    require_sound(states)
    found = zero.opened(states)
    tokenizer_path = place or _first((path, model, path.parent, source), *_TOKENIZERS)
    tokenizer = tokenizer_at(tokenizer_path) if tokenizer_path else None
    if tokenizer is None:
        dist.log.warning("no tokenizer lies beside the checkpoint: the export has none (--tokenizer may bring it)")
    generation = _first((path, model), _GENERATION)
    step = _step(path, found.counters)
    config = build_config(Model(path=str(folder)), tokenizer.vocab_size if tokenizer else None)
    wrote = "transformers' Trainer" if (path / "trainer_state.json").is_file() else "a DeepSpeed training loop"
    return Trained(
        checkpoint=Checkpoint(states, {"step": step}),
        config=config,
        weights=lambda: names.trained(config.model_type, zero.stream_pieces(zero.opened(states))),
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        code=folder,
        generation=generation / _GENERATION if generation else None,
        foreign=True,
        notes=(("checkpoint", f"`{path.name}`, written by {wrote}; not hashed by the trainer"),),
    )


def _checkpoints(source: Path) -> list[Path]:
    """A Trainer's checkpoint-N folders in `source`, oldest first."""
    if not source.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in source.iterdir() if path.is_dir() and (match := _TRAINERS.match(path.name))
    ]
    return [path for _, path in sorted(found)]


def _states_of(path: Path) -> Path:
    """The folder of DeepSpeed's files that `path` is, or that its `latest` names."""
    if _has_states(path):
        return path
    try:
        tag = (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise SteelError("there is no DeepSpeed checkpoint here", path / LATEST,
                         f"name another folder ({error})") from None  # fmt: skip
    if not tag or Path(tag).name != tag:
        raise SteelError(f"the pointer is unsafe: it names no folder beside it, but {tag!r}", path / LATEST,
                         "name the folder with DeepSpeed's files itself")  # fmt: skip
    if not _has_states(path / tag):
        raise SteelError("the checkpoint is not whole: its folder of DeepSpeed's files is missing or empty", path / tag,
                         "use another checkpoint")  # fmt: skip
    return path / tag


def _has_states(path: Path) -> bool:
    return path.is_dir() and next(path.glob(_STATES), None) is not None


def _first(folders: "Iterable[Path | None]", *names: str) -> Path | None:
    """The first folder that holds one of these files."""
    return next((f for f in folders if f is not None and any((f / name).is_file() for name in names)), None)


def _step(path: Path, counters: dict[str, int]) -> int:
    """Optimizer steps, as the Trainer counts them or as DeepSpeed does."""
    try:
        state: Any = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return counters["global_steps"]
