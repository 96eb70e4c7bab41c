"""README.md of an export: what the model is, what it was trained on, what its loss means, how to load it.

Every figure comes from the checkpoint's manifest and the run's `metrics.jsonl`; what is not known is left out.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel.checkpoint.commit import Checkpoint
from megatron_steel.model.verdict import read_verdict, sees_future

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def write_card(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    config: "PretrainedConfig",
    parameters: int,
    dtype: str,
    tokenizer: str | None,
    difference: float | None,
    notes: tuple[tuple[str, str], ...] = (),
) -> None:
    """Write README.md.

    Args:
        name: what the model is called, the export's folder name.
        parameters: numbers in the model.
        tokenizer: the transformers class that loads it, if any does.
        difference: of the logits, where the export was verified.
        notes: more rows, of the kind of source that the weights come from.
    """
    manifest = checkpoint.manifest
    code = "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    loss = validation_loss(checkpoint)
    rows = [
        ("architecture", f"`{config.model_type}`" + (f", FFN `{config.FFN_type}`" if hasattr(config, "FFN_type") else "")),
        ("parameters", f"{parameters:,} ({dtype})"),
        ("training", f"{manifest['step']:,} steps, {manifest.get('tokens', 0):,} tokens"),
        ("data", _data(manifest)),
        ("validation loss", f"{loss[1]:.4f} nats per token at step {loss[0]:,}" if loss else "not measured"),
        ("logits against the checkpoint", "not verified" if difference is None else f"differ by at most {difference:.3g} from those of the trained weights rounded to {dtype}"),
        *notes,
    ]  # fmt: skip
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    start = manifest.get("recipe", {}).get("model", {}).get("init_from")
    version = manifest.get("versions", {}).get("megatron_steel", "")
    text = _CARD.format(
        name=name,
        origin=f"Trained further from `{Path(start).name}`" if start else "Pretrained from scratch",
        version=version,
        table=table,
        warning=_WARNING if sees_future(config, read_verdict(folder)) else "",
        load=_how_to_load(code, tokenizer),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def validation_loss(checkpoint: Checkpoint) -> tuple[int, float] | None:
    """(step, loss) of the last validation up to the checkpoint's step, from the run's `metrics.jsonl`."""
    file = checkpoint.path.absolute().parent.parent / "metrics.jsonl"
    if not file.is_file():
        return None
    found = None
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step, loss = int(row["step"]), float(row["validation_loss"])
        except (ValueError, KeyError, TypeError):
            continue  # a training line, or one that a crash tore
        if step <= checkpoint.step:
            found = step, loss
    return found


def _data(manifest: dict[str, Any]) -> str:
    sets = manifest.get("data", [])
    return ", ".join(f"{entry['name']} ({entry['tokens']:,} tokens)" for entry in sets) or "unknown"


def _how_to_load(code: bool, tokenizer: str | None) -> str:
    trust = ", trust_remote_code=True" if code else ""
    lines = [
        f"from transformers import AutoModelForCausalLM{f', {tokenizer}' if tokenizer else ''}",
        "",
        'folder = "."  # this folder',
        f'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"{trust})',
    ]
    if tokenizer:
        lines += [
            f"tokenizer = {tokenizer}.from_pretrained(folder{trust if tokenizer == 'AutoTokenizer' else ''})",
            'ids = tokenizer("你好", return_tensors="pt", add_special_tokens=False).input_ids',
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))",
        ]
    return "\n".join(["```python", *lines, "```", ""])


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
# license: choose one before you publish
---
# {name}

{origin} with megatron_steel {version}.

| | |
|---|---|
{table}

{warning}{load}"""

_WARNING = """\
**This model's loss sees the future.** It mixes over the whole sequence, so each position was trained with a view of the
tokens it had to predict. The losses above are not language-model losses, and text generated token by token is worse than
they promise.

"""
