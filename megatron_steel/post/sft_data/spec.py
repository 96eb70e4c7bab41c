"""A data specification: which sets, how much of each, and what is left out; as frozen dataclasses read from YAML.

Every problem is reported at once. Must not know what a row looks like.
"""

import difflib
import glob
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_steel.data.chatml import SYSTEM
from megatron_steel.errors import SteelError
from megatron_steel.post.sft_data.sources import table

_TEST = re.compile(r"test(?:s|ing|sets?|data|split)?")


class _Section:
    """Refuses unknown keys when pydantic validates a subclass."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class Part(_Section):
    type: str
    """A name of the table for this kind of data."""
    files: list[str]
    """Paths or patterns, as published: .jsonl, .json, .parquet, each but parquet also .gz or .zst."""
    ratio: float | None = None
    """The share of its usable rows that is drawn; all of them when ratio, rows and weight are left out."""
    rows: int | None = None
    """Draw exactly so many; fewer usable ones are an error."""
    weight: float | None = None
    """Parts in proportion: as many as the scarcest set allows. Every set has a weight, or none."""
    name: str = ""
    """The model's name, for self-cognition."""
    author: str = ""
    """Its maker, for self-cognition."""


@dataclass(frozen=True)
class Spec(_Section):
    tokenizer: str
    """The exported model's folder, or another tokenizer folder with a chat template."""
    sources: list[Part]
    kind: Literal["sft", "dpo", "grpo"] = "sft"
    max_tokens: int = 2048
    """Longer conversations are left out, counted as the tokenizer's chat template renders them."""
    seed: int = 666
    heldout_ratio: float = 0.005
    """The share of questions kept for validation, chosen by what the question says."""
    system: str | None = SYSTEM
    """The system turn of conversations that have none; null: none is put in."""
    benchmarks: list[str] = field(default_factory=list)
    """Files or folders of test questions; what holds one of them is left out."""
    max_malformed_ratio: float = 0.001
    """A set with a larger share of rows that are not of its form is an error."""


def load_spec(path: str) -> Spec:
    """Read a specification. Raises SteelError: not there, not YAML, or a list of everything that is wrong."""
    import pydantic
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SteelError("there is no such specification", path, "docs/sft_data.md shows one") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SteelError(f"the specification is not YAML: {error}", path, "mend the file") from None
    try:
        spec = pydantic.TypeAdapter(Spec).validate_python(tree)
        problems = _problems(spec)
    except pydantic.ValidationError as error:
        problems = [_describe(dict(one)) for one in error.errors()]
    if problems:
        what = "the specification has problems:\n    - " + "\n    - ".join(problems)
        raise SteelError(what, path, "mend these keys; docs/sft_data.md shows a whole specification")
    return spec


def files_of(part: Part, refuse_test: bool) -> list[Path]:
    """The files of a set, each once, those of a pattern in the order of their names.

    Raises SteelError: a pattern that fits no file; with `refuse_test` a file whose name, or one of the three folders that it lies
    in, is called test, or a link to such a file.
    """
    found: dict[Path, None] = {}
    for pattern in part.files:
        hits = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not hits:
            raise SteelError("there is no such file", pattern, f"mend the files of the source {part.type}")
        found |= dict.fromkeys(Path(hit) for hit in hits if Path(hit).is_file())
    for path in found if refuse_test else []:
        # Wherever it is named from, and what a link stands for: Hugging Face's cache holds links to names of no meaning.
        words = {word for real in (path.absolute(), path.resolve()) for word in _words(real)}
        if any(_TEST.fullmatch(word) for word in words):
            what = f"this is a test split of {part.type}: a model that trains on it has no score on it any more"
            raise SteelError(what, path, "leave it out, or say --force-test-splits and report it with every score")
    return list(found)


def _words(path: Path) -> list[str]:
    return re.split(r"[^a-z]+", "/".join(path.parts[-4:]).lower())


def _problems(spec: Spec) -> list[str]:
    problems, known = [], table(spec.kind)
    if not spec.sources:
        problems.append("sources: the list is empty")
    if spec.max_tokens < 1:
        problems.append(f"max_tokens: {spec.max_tokens} must be above 0")
    if not 0 <= spec.heldout_ratio < 1:
        problems.append(f"heldout_ratio: {spec.heldout_ratio} is not in [0, 1)")
    if not 0 <= spec.max_malformed_ratio < 1:
        problems.append(f"max_malformed_ratio: {spec.max_malformed_ratio} is not in [0, 1)")
    for i, part in enumerate(spec.sources):
        problems += [f"sources.{i}.{problem}" for problem in _part_problems(part, list(known), spec.kind)]
    weighted = [part for part in spec.sources if part.weight is not None]
    if weighted and len(weighted) != len(spec.sources):
        problems.append("sources: give every source a weight, or none")
    return problems


def _part_problems(part: Part, known: list[str], kind: str) -> list[str]:
    problems = []
    if part.type not in known:
        near = difflib.get_close_matches(part.type, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        problems.append(f"type: {part.type!r} is no source of kind {kind}; {hint}")
    if not part.files:
        problems.append("files: the list is empty")
    given = [key for key in ("ratio", "rows", "weight") if getattr(part, key) is not None]
    if len(given) > 1:
        problems.append(f"{given[1]}: {' and '.join(given)} exclude each other")
    if part.ratio is not None and not 0 < part.ratio <= 1:
        problems.append(f"ratio: {part.ratio} is not in (0, 1]")
    problems += [f"{key}: {getattr(part, key)} must be above 0" for key in ("rows", "weight")
                 if getattr(part, key) is not None and not getattr(part, key) > 0]  # fmt: skip
    named = bool(part.name and part.author)
    if part.type == "self-cognition" and not named:
        problems.append("name, author: self-cognition needs the model's name and its author's")
    if part.type != "self-cognition" and (part.name or part.author):
        problems.append("name, author: only self-cognition takes them")
    return problems


def _describe(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "unexpected_keyword_argument":
        keys = [*Spec.__dataclass_fields__, *Part.__dataclass_fields__]
        near = difflib.get_close_matches(key.rpartition(".")[2], keys, n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    return f"{key}: {error['msg']}" + ("" if error["type"] == "missing" else f" (got {error['input']!r})")
