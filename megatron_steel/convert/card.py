"""README.md of an export: what the model is, what it was trained on, what its loss means, how to use and train it.

The figures are `card_facts`; here they become Markdown with the front matter that hubs read. What is not known is left
out; language and licence are never guessed. Must not know where a figure comes from.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.convert import card_facts
from megatron_steel.data.chat_template import TRAINING_FILE
from megatron_steel.data.checksums import SUMS
from megatron_steel.errors import SteelError
from megatron_steel.model.text_to_text import is_text_to_text
from megatron_steel.model.verdict import read_verdict, sees_future

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron_steel.checkpoint.commit import Checkpoint

# The hub's own cache, or a folder that is called as on the hub.
_HUB = re.compile(r"(?:.*/)?models--([\w.-]+?)--([\w.-]+)/snapshots/.*|([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)")
_OUR_FOLDERS = ("runs", "exports", "models", "checkpoints")


@dataclass(frozen=True)
class Made:
    """How this export was made."""

    config: "PretrainedConfig"
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    tokenizer: str | None
    """The transformers class that loads it, if any does."""
    padding: range
    """Rows of the vocabulary that belong to no token and are kept."""
    cut: int
    """Such rows that were cut off."""
    difference: float | None
    """Of the logits, where the export was verified."""
    license: str | None
    notes: tuple[tuple[str, str], ...] = ()
    """More rows, of the kind of source that the weights come from."""


def require_license(name: str | None) -> None:
    """Raise SteelError for what no hub takes for the name of a licence."""
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        what = f"{name!r} is no licence as the hubs name them"
        raise SteelError(what, "--license", "use their short names: apache-2.0, mit, cc-by-4.0, ..., or other")


def write_card(folder: Path, name: str, checkpoint: "Checkpoint", made: Made) -> None:
    """Write README.md. `name`: what the model is called, the export's folder name."""
    manifest, config = checkpoint.manifest, made.config
    metrics, report = card_facts.read_metrics(checkpoint), read_verdict(folder)
    future, two_sided = sees_future(config, report), is_text_to_text(config)
    start = manifest.get("recipe", {}).get("model", {}).get("init_from")
    equal = "not verified" if made.difference is None else f"differ by at most {made.difference:.3g} from those of the trained weights rounded to {made.dtype}"  # fmt: skip
    parts = [
        _front_matter(made.license, start),
        f"# {name}",
        _origin(manifest, start),
        _WARNING if future else "",
        "## The model",
        _table([*card_facts.architecture(config, made.shapes, made.dtype), *_padding(made),
                ("logits against the checkpoint", equal), *made.notes]),
        "## Its training",
        _table(card_facts.training(manifest, metrics)),
        _data(manifest),
        "## Its loss",
        _table(card_facts.losses(manifest, metrics, report, future)),
        "## How to use it",
        _how_to_load("auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8")), made.tokenizer, two_sided),
        _commands(folder, name, checkpoint, made),
        "## Limits",
        _limits(made, manifest),
        _versions(manifest),
    ]  # fmt: skip
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _front_matter(license_id: str | None, start: str | None) -> str:
    import yaml

    tree: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if license_id:
        tree["license"] = license_id
    if base := _on_the_hub(start):
        tree["base_model"] = base
    comment = "" if license_id else "# license: choose one before you publish\n"
    return f"---\n{yaml.safe_dump(tree, sort_keys=False)}{comment}---"


def _on_the_hub(start: str | None) -> str | None:
    """ORG/NAME of the model that a run started from, where its path says so."""
    found = _HUB.fullmatch(start or "")
    if not found or found[3] in _OUR_FOLDERS:
        return None
    return f"{found[1] or found[3]}/{found[2] or found[4]}"


def _origin(manifest: dict[str, Any], start: str | None) -> str:
    if not manifest.get("recipe"):
        return "Exported by megatron_steel from a checkpoint of another trainer."
    how = f"Trained further from `{_on_the_hub(start) or Path(start).name}`" if start else "Pretrained from scratch"
    return f"{how} with megatron_steel {manifest.get('versions', {}).get('megatron_steel', '')}".rstrip() + "."


def _padding(made: Made) -> list[tuple[str, str]]:
    if made.padding:
        return [("padding", f"rows {made.padding.start}..{made.padding.stop - 1} of the vocabulary belong to no token")]
    return [("padding", f"{made.cut:,} rows that belonged to no token were cut off the vocabulary")] if made.cut else []


def _data(manifest: dict[str, Any]) -> str:
    rows = card_facts.data_sets(manifest)
    if not rows:
        return ""
    held_out = card_facts.validation_sets(manifest)
    titles = ("data set", "tokens", "weight", "share of what was read")
    used = [column for column in range(4) if column < 2 or any(row[column] for row in rows)]
    lines = [" | ".join(_cell(row[column]) for column in used) for row in (titles, *rows)]
    lines.insert(1, "|".join("---" for _ in used))
    table = "\n".join(f"| {line} |" for line in lines)
    return f"## Its data\n\n{table}" + (f"\n\nHeld out for validation: {held_out}." if held_out else "")


def _how_to_load(code: bool, tokenizer: str | None, text_to_text: bool) -> str:
    trust = ", trust_remote_code=True" if code else ""
    auto = "AutoModelForSeq2SeqLM" if text_to_text else "AutoModelForCausalLM"
    prompt = '"你好" + tokenizer.eos_token' if text_to_text else '"你好"'
    lines = [
        f"from transformers import {auto}{f', {tokenizer}' if tokenizer else ''}",
        "",
        'folder = "."  # this folder',
        f'model = {auto}.from_pretrained(folder, dtype="auto"{trust})',
    ]
    if tokenizer:
        lines += [
            f"tokenizer = {tokenizer}.from_pretrained(folder{trust if tokenizer == 'AutoTokenizer' else ''})",
            f'text = tokenizer({prompt}, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)',
            "print(tokenizer.decode(model.generate(**text, max_new_tokens=64)[0]))",
        ]
    return "\n".join(["```python", *lines, "```"])


def _commands(folder: Path, name: str, checkpoint: "Checkpoint", made: Made) -> str:
    """Shell lines, with names for paths: NAME is this folder."""
    name = shlex.quote(name)
    lines = [f"megatron-steel generate {name} --prompt 你好"]
    if _has_template(folder):
        lines += [f"megatron-steel generate {name} --chat"]
    if made.tokenizer and not is_text_to_text(made.config):
        lines += [f"megatron-steel evaluate {name} --tasks ceval-valid,cmmlu"]
    recipe = checkpoint.manifest.get("recipe")
    if recipe:
        run = Path(recipe["run"]["dir"]).name
        averaged = checkpoint.manifest.get("averaged_steps")
        source = f"runs/{run}" if averaged else f"runs/{run}/checkpoints/{checkpoint.path.name}"
        options = (f" --average {len(averaged)}" if averaged else "") + f" --dtype {made.dtype}"
        options += " --verify" * (made.difference is not None) + " --cut-padding" * bool(made.cut)
        options += f" --license {made.license}" if made.license else ""
        tokenizer = name if made.tokenizer == "AutoTokenizer" else Path(recipe["tokenizer"]["path"]).name
        lines += [
            "# train it further, on other data for one:",
            f"megatron-steel pretrain RECIPE model.path={name} model.init_from={name} tokenizer.path={tokenizer}",
            "# this folder was made by:",
            f"megatron-steel export {source} {name}{options}",
        ]  # fmt: skip
    said = ["```bash", *lines, "```"]
    if (folder / TRAINING_FILE).is_file():
        said += ["", f"`{TRAINING_FILE}` renders what the tokenizer's own chat template renders and marks the assistant's words, "
                 "for a loss on them alone (`chat_template_path` and `assistant_only_loss` of TRL)."]  # fmt: skip
    return "\n".join([*said, "", f"`sha256sum --check {SUMS}` tells whether every file is whole."])


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _limits(made: Made, manifest: dict[str, Any]) -> str:
    what = "answer prompts" if is_text_to_text(made.config) else "continue text"
    said = [f"It was trained to {what}: what it states may be false."]
    length = manifest.get("recipe", {}).get("data", {}).get("sequence_length")
    reach = getattr(made.config.get_text_config(), "max_position_embeddings", None)
    if length:
        said += [f"It was trained on sequences of {length:,} tokens" + (f"; the {reach:,} of its configuration are more than it has seen." if reach and reach > length else ".")]  # fmt: skip
    if (
        any(re.search(r"\.experts\.(gate_up|down)_proj$", name) for name in made.shapes)
        and made.config.model_type != "steel"
    ):
        said += ["Its experts lie in its files as transformers 5 joins them: 4.x and llama.cpp do not find them there."]
    return "\n".join(f"- {line}" for line in said)


def _versions(manifest: dict[str, Any]) -> str:
    versions = manifest.get("versions")
    return (
        "Trained with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "." if versions else ""
    )


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows)])


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


_WARNING = """\
**This model's loss sees the future.** It mixes over the whole sequence, so each position was trained with a view of the
tokens it had to predict. The losses below are not language-model losses, and text generated token by token is worse than
they promise."""
