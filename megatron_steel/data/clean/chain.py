"""A chain of data-juicer operators: read it, and leave out what would need a download.

Knows the form of a chain, not what an operator does; whether a name exists is for data-juicer to say.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_steel.errors import SteelError

SHIPPED = ("text", "code", "text-original", "code-original")
_LANGUAGE_MODEL = ("{lang}.sp.model", "{lang}.arpa.bin")
_TOKENIZER = "EleutherAI/pythia-6.9b-deduped"
_ON_RAY = "ray_bts_minhash_deduplicator"


@dataclass(frozen=True)
class Operator:
    name: str
    parameters: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} (tokens)" if self.parameters.get("tokenization") is True else self.name


@dataclass(frozen=True)
class Chain:
    name: str
    operators: tuple[Operator, ...]
    left_out: tuple[tuple[Operator, str], ...] = ()
    """Operators that do not run here, each with its reason."""


def load(name_or_path: str) -> Chain:
    """A shipped chain by name, or a YAML file with one key, `process`. Raises SteelError: no such file, another form."""
    shipped = name_or_path in SHIPPED
    path = Path(__file__).with_name(f"{name_or_path}.yaml") if shipped else Path(name_or_path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        remedy = f"give a YAML file or one of {', '.join(SHIPPED)}"
        raise SteelError(f"the chain cannot be read: {error}", name_or_path, remedy) from None
    except yaml.YAMLError as error:
        raise SteelError(f"the chain is not YAML: {' '.join(str(error).split())}", path, "mend the file") from None
    if not isinstance(tree, dict) or set(tree) != {"process"} or not isinstance(tree["process"], list):
        remedy = "paths, processes and the executor are arguments of the verb; keep `process` alone"
        raise SteelError("a chain is a YAML file with one key, `process`, a list of operators", path, remedy)
    operators = tuple(_operator(entry, path) for entry in tree["process"])
    if not operators:
        raise SteelError("the chain has no operators", path, "name at least one under `process`")
    return Chain(name_or_path if shipped else path.stem, operators)


def _operator(entry: Any, path: Path) -> Operator:
    if isinstance(entry, str):
        return Operator(entry, {})
    if isinstance(entry, dict) and len(entry) == 1:
        name, parameters = next(iter(entry.items()))
        if isinstance(name, str) and (parameters is None or isinstance(parameters, dict)):
            return Operator(name, parameters or {})
    raise SteelError(f"not an operator: {entry!r}", path, "write `- NAME:` and below it `key: value` lines")


def runnable(chain: Chain, models: str | os.PathLike[str] | None, ray: bool) -> Chain:
    """The chain without operators whose files are not in `models`; on Ray with the deduplicator that Ray has.

    Raises SteelError: nothing is left.
    """
    kept, left_out = [], []
    for operator in chain.operators:
        missing = [name for name in _files_needed(operator) if not models or not (Path(models) / name).exists()]
        if missing:
            where = f"not in {models}" if models else "needs --models"
            left_out.append((operator, f"{' and '.join(missing)}: {where}"))
        elif ray and operator.name == "document_simhash_deduplicator":
            left_out.append((operator, f"not made for Ray: {_ON_RAY} in its place"))
            kept.append(_ray_deduplicator(operator))
        else:
            kept.append(operator)
    if not kept:
        raise SteelError("no operator of the chain can run", chain.name, "; ".join(reason for _, reason in left_out))
    return Chain(chain.name, tuple(kept), tuple(left_out))


def _files_needed(operator: Operator) -> list[str]:
    """Files below the models folder that data-juicer would otherwise download."""
    parameters = operator.parameters
    lang = parameters.get("lang", "en")
    if operator.name == "perplexity_filter":
        return [name.format(lang=lang) for name in _LANGUAGE_MODEL]
    if parameters.get("tokenization") is True:
        return [_TOKENIZER] if operator.name == "alphanumeric_filter" else [f"{lang}.sp.model"]
    return []


def _ray_deduplicator(simhash: Operator) -> Operator:
    same = ("tokenization", "window_size", "lowercase", "ignore_pattern")
    return Operator(_ON_RAY, {key: value for key, value in simhash.parameters.items() if key in same})
