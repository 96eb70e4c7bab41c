"""A trained run to a folder that loads: weights in the model's own dtype beside its own files, unchanged.

The tokenizer, the configuration and Steel's code are copied byte for byte from the folder that was tuned: nothing about
them has changed, and saving a tokenizer again under transformers 5 breaks it for 4. With LoRA the weights are those of
the model with the adapter in it, and the adapter lies beside them. Must not know trainers or data.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_steel.checkpoint.commit import sync
from megatron_steel.data.checksums import write_checksums
from megatron_steel.model.folder import refuse_outside
from megatron_steel.post.tune import lora
from megatron_steel.post.tune.plan import Plan
from megatron_steel.post.tune.trainers import RESULT, WEIGHTS
from megatron_steel.post.tune.writing import writing

ADAPTER = "adapter"
# Not copied: weights, and what speaks of them.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".index.json", ".onnx")
_OF_WEIGHTS = ("readme.md", "run.json", "result.json")


def publish(plan: Plan, work: Path, output: Path) -> None:
    """Put the model's files into the work folder and give it its final name, in one step.

    Raises SteelError where the disk does not take it; then nothing has the final name.
    """
    with writing(work):
        if (work / WEIGHTS).is_dir():  # else it was killed between the last two lines
            _assemble(plan, work)
        for file in [*work.iterdir(), work]:
            sync(file)
        os.replace(work, output)
        sync(output.parent)


def _assemble(plan: Plan, work: Path) -> None:
    """Model files to the top of the work folder; what only training needed goes."""
    made = work / "model"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    weights = _merged(plan, work, made) if plan.lora else work / WEIGHTS
    _cast(weights, made, _dtype_of(Path(plan.model)), _tied_names(work))
    copy_companions(Path(plan.model), made)
    write_checksums(made)  # of the model alone
    for file in made.iterdir():
        place = work / file.name
        shutil.rmtree(place) if place.is_dir() else None
        os.replace(file, place)
    for rest in ("model", "merged", "tokens", "outcomes", WEIGHTS):
        shutil.rmtree(work / rest, ignore_errors=True)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy whatever lies in a model's folder and is not weights or about them, unchanged."""
    refuse_outside(source)
    for file in sorted(source.iterdir()):
        name = file.name.lower()
        if (
            file.is_file()
            and not name.endswith(_WEIGHTS)
            and name not in _OF_WEIGHTS
            and "sha256" not in name
            and name[0] != "."
        ):
            shutil.copyfile(file, folder / file.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates")


def _merged(plan: Plan, work: Path, made: Path) -> Path:
    import torch

    from megatron_steel.post.load import load_as

    (made / ADAPTER).mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(work / WEIGHTS / name, made / ADAPTER / name)
    base, _ = load_as(plan.model, plan.trust_code, torch.float32)
    lora.merge(base, made / ADAPTER).save_pretrained(work / "merged")
    return work / "merged"


def _dtype_of(folder: Path) -> Any:
    """The dtype that a folder's config.json promises; fp32 where it promises none."""
    import torch

    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return getattr(torch, str(tree.get("dtype") or tree.get("torch_dtype") or "float32"), torch.float32)


def _tied_names(work: Path) -> list[str]:
    """Weights that are another weight by another name: ZeRO-1 and 2 hand them out as copies."""
    return json.loads((work / RESULT).read_text(encoding="utf-8"))["tied"]


def _cast(source: Path, target: Path, dtype: Any, tied: list[str]) -> None:
    """Copy safetensors but the tied names, floating-point tensors in `dtype`; a shard at a time."""
    from safetensors.torch import load_file, save_file

    size = 0
    for file in sorted(source.glob("*.safetensors")):
        read = {name: t for name, t in load_file(file).items() if name not in tied}
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in read.items()}
        size += sum(t.numel() * t.element_size() for t in tensors.values())
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    for file in source.glob("*.safetensors.index.json"):
        index = json.loads(file.read_text(encoding="utf-8"))
        index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if name not in tied}
        index.setdefault("metadata", {})["total_size"] = size
        (target / file.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
