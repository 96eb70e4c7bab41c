"""Whole runs on this device through `pretrain`: a resumed run repeats the straight one, an export equals its checkpoint.

Knows nothing of speed.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import toy_data

from gpu import sizes
from gpu.checks import Check, compare
from megatron_steel.convert import sources
from megatron_steel.convert.hf import export
from megatron_steel.pretrain import run

STEPS, HALF = 6, 3
BAND = 2e-3
"""How far losses may lie apart where kernels add up in no fixed order; the band measured between two straight runs
stands beside it."""
Curve = dict[int, list[float]]


def resume(device: torch.device, toy: bool) -> Iterator[Check]:
    """Losses and norms of a run that goes on from step 3, against the straight run's."""
    with tempfile.TemporaryDirectory() as folder:
        for sharding in ("zero1",) if toy else ("zero1", "zero3"):
            straight, resumed = _pair(Path(folder) / f"{sharding}-exact", sharding, toy, exact=True)
            differences = sum(straight[step] != resumed[step] for step in straight)
            yield compare(f"resume {sharding} bf16, train.deterministic: steps that differ in any bit", differences, 0)
        if device.type == "cpu":
            yield Check("resume zero1 bf16, not deterministic", "not run", None, BAND, "a CPU is always deterministic")
            return
        first, resumed = _pair(Path(folder) / "first", "zero1", toy, exact=False)
        again = _run(Path(folder) / "again", "zero1", toy, exact=False)
        band = _apart(first, again)
        yield Check("two straight runs, not deterministic: the band of losses", "pass", band, None, "shown, not judged")
        yield compare("resume zero1 bf16, not deterministic: loss", _apart(first, resumed), BAND)


def exported(device: torch.device, toy: bool) -> Iterator[Check]:
    """Every weight of an fp32 export against the checkpoint's; on a GPU its logits too, in a fresh process."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        place, out = Path(folder) / "run", Path(folder) / "hf"
        _run(place, "zero3", toy, exact=False)
        export(place, out, dtype="float32", verify=device.type == "cuda")
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
        worst, count = 0.0, 0
        for name, weight in sources.find(place).weights():
            trained = torch.cat([piece.float().flatten() for piece in weight.pieces])
            apart = (loaded[name].flatten() - trained).abs().max()
            worst, count = max(worst, float(apart)), count + 1
        yield compare(f"export: {count} tensors against the checkpoint, fp32", worst if count else float("nan"), 0.0)


def _pair(folder: Path, sharding: str, toy: bool, exact: bool) -> tuple[Curve, Curve]:
    """The straight run, and one that finds what a kill after step 3 leaves."""
    straight = _run(folder, sharding, toy, exact)
    cut = folder.with_name(folder.name + "-cut")
    shutil.copytree(folder, cut)
    shutil.rmtree(cut / "checkpoints" / f"step-{STEPS:08d}")
    return straight, _run(cut, sharding, toy, exact)


def _run(folder: Path, sharding: str, toy: bool, exact: bool) -> Curve:
    recipe = _recipe(folder.parent, toy)
    run(str(recipe), [f"run.dir={folder}", f"deepspeed.config={sharding}.json", f"train.deterministic={exact}"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: [row["loss"], row["grad_norm"]] for row in rows if "loss" in row}


def _recipe(folder: Path, toy: bool) -> Path:
    """The parity size of zh-1b on tokens of no meaning, as a YAML file."""
    import yaml

    file = folder / "whole.yaml"
    if not file.is_file():
        words = 384 if toy else 8192
        tokenizer = toy_data.write_tokenizer(folder / "tokenizer", words)
        data = toy_data.write_data(folder / "data", 200_000 if not toy else 20_000, words)
        train = ["train.global_batch_size=4", "train.micro_batch_size=2", f"train.steps={STEPS}",
                 f"train.save_every_steps={HALF}", "train.log_every_steps=1", "train.keep_last=9"]  # fmt: skip
        paths = [f"tokenizer.path={tokenizer}", f"data.train={data}", "data.validation=null"]
        file.write_text(yaml.safe_dump(sizes.parity_recipe("zh-1b", toy, [*train, *paths]).to_dict()), encoding="utf-8")
    return file


def _apart(a: Curve, b: Curve) -> float:
    return max(abs(a[step][0] - b[step][0]) for step in a)
