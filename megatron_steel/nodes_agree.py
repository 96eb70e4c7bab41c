"""Several nodes, one job: the same recipe, data, tokenizer, model, sharding and versions on each, and one run folder for all.

Each node opens its own copy of the data, so before anything is built its first rank says what it has found there. Other
content would train on without a word, each rank on its own numbers. Knows nothing of how nodes are reached.
"""

import contextlib
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.preflight import RunPlan
from megatron_steel.recipe import Recipe

_SEEN_WITHIN = 60.0  # seconds until a network file system shows a new name
_SHOWN = 10
Facts = dict[str, str]
"""what it is -> its value, each short enough to be read"""


def require(recipe: Recipe, plan: RunPlan, sharding: dict[str, Any], folder: Path) -> None:
    """Raise SteelError on all ranks where a node differs from the first, or does not see the run folder; a collective call.

    `sharding`: DeepSpeed's file as this node has read it; `auto` may choose another where GPUs differ.
    """
    if not dist.several_nodes():
        return
    mine = (
        (f"{socket.gethostname()} (rank {dist.rank()})", facts_of(recipe, plan, sharding))
        if dist.is_first_of_node()
        else None
    )
    nodes = [node for node in dist.gather(mine) if node]
    problem = differences(nodes)
    if problem:
        raise dist.shared(problem)
    _require_shared(folder)


def facts_of(recipe: Recipe, plan: RunPlan, sharding: dict[str, Any]) -> Facts:
    """What must be equal on all nodes."""
    from megatron_steel.train.state import versions

    facts = {f"version of {name}": version for name, version in versions().items()}
    facts |= _flat("recipe: ", recipe.to_dict())
    facts["tokenizer.path: fingerprint"] = str(plan.tokenizer["fingerprint"])
    facts |= _flat("deepspeed.config: ", sharding)
    facts |= _flat("model configuration: ", json.loads(json.dumps(plan.config.to_dict(), default=str)))
    for key, members in (("data.train", plan.train), ("data.validation", plan.validation)):
        for m in members:
            facts[f"{key}, {m.prefix}: tokens"] = f"{m.tokens:,}"
            facts[f"{key}, {m.prefix}: digest"] = m.digest
    return facts


def differences(nodes: list[tuple[str, Facts]]) -> SteelError | None:
    """One error with everything in which a node differs from the first one, both values said; None where all are equal."""
    (first, expected), *others = nodes
    told: dict[str, str] = {}
    for name, facts in others:
        for key in sorted({*expected, *facts}):
            here, there = expected.get(key, "not there"), facts.get(key, "not there")
            if here != there:
                told.setdefault(f"{key}\n        {here} on {first}\n        {there} on {name}", name)
    if not told:
        return None
    more = f"\n    and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    what = f"the nodes are not equal:\n    {chr(10).join(f'    {t}' for t in [*told][:_SHOWN]).strip()}{more}"
    remedy = "copy data, tokenizer and recipe from one node to the others, with the same versions installed"
    return SteelError(what, ", ".join(dict.fromkeys(told.values())), remedy)


def _require_shared(folder: Path) -> None:
    """What the first rank writes into the run folder all nodes must see: each rank saves its own part of a checkpoint there."""
    made = dist.together(lambda: _leave_mark(folder), only=dist.is_main())
    name = next(filter(None, dist.gather(made)))
    try:
        dist.together(lambda: _see(folder, name), only=dist.is_first_of_node())
    finally:
        if made:
            (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # a run that never begins leaves no folder


def _leave_mark(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
        os.close(handle)
    except OSError as error:
        what = f"the run folder cannot be written: {error.strerror}"
        raise SteelError(what, folder, "choose another run.dir, or mend this one") from error
    return Path(path).name


def _see(folder: Path, name: str) -> None:
    until = time.monotonic() + _SEEN_WITHIN
    while name not in (
        os.listdir(folder) if folder.is_dir() else []
    ):  # a listing is fresher than a question for one name
        if time.monotonic() > until:
            what = "the run folder is not shared: what the first rank has written there is not seen"
            raise SteelError(
                what, folder, "put run.dir on a disk that all nodes share; data may lie on each node's own"
            )
        time.sleep(0.5)


def _flat(prefix: str, tree: Any) -> Facts:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(f"{prefix}{key}.", value).items()}
    return {prefix.removesuffix("."): json.dumps(tree, ensure_ascii=False, default=str)}
