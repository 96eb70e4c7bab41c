"""What a run is: written to its work folder before a rank starts, read by every rank, compared when it is resumed.

    OUTPUT.partial/run.json                    this plan
                   tokens/{train,heldout}.arrow  rows of ids and labels, mapped by every rank
                   checkpoints/checkpoint-N    transformers' own; `whole` in it says that all of it is there
                   tensorboard/                scalars
                   model/                      weights, while they are written

Must not know how any of it is made.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_steel.errors import SteelError

FILE = "run.json"
WHOLE = "whole"
STOP = "stop"  # a file of this name in the work folder asks every rank to save and leave
# What may differ when a run goes on: what was found in model and data, and who started it.
_FREE = ("counts", "starter")


@dataclass(frozen=True)
class Plan:
    kind: str
    """sft or dpo"""
    model: str
    """the folder that is tuned"""
    trust_code: bool
    settings: dict[str, Any]
    """arguments of SFTConfig or DPOConfig"""
    global_batch: int
    ranks: int
    deepspeed: dict[str, Any] | None
    lora: dict[str, Any] | None
    """rank and alpha"""
    packing: bool
    identity: dict[str, Any]
    """of the model's files and of the data: what they were when the run began"""
    counts: dict[str, Any] = field(default_factory=dict)
    starter: int = 0
    """process that supervises the ranks; 0: none"""

    def write(self, work: Path) -> None:
        (work / FILE).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(work: Path) -> "Plan":
        """Raises SteelError where the file is none of ours."""
        try:
            tree = json.loads((work / FILE).read_text(encoding="utf-8"))
            return Plan(**tree)
        except (OSError, ValueError, TypeError) as error:
            raise SteelError(f"this is no run of sft or dpo: {error}", work, "name another --output") from None

    def differs(self, other: "Plan") -> list[str]:
        """What is another run, one line each."""
        found = []
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name in _FREE or mine == theirs:
                continue
            if isinstance(mine, dict) and isinstance(theirs, dict):
                keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
                found += [f"{key}: {theirs.get(key)}, now {mine.get(key)}" for key in keys]
            else:
                found.append(f"{item.name}: {theirs}, now {mine}")
        return found


def work_folder(output: Path) -> Path:
    """Where a run lives until it is complete."""
    return output.with_name(f"{output.name}.partial")


def newest_whole(work: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    found = [folder for folder in (work / "checkpoints").glob("checkpoint-*") if (folder / WHOLE).is_file()]
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
