"""Everything that can be wrong is found here, before a rank starts: model, data, settings, the place of the output.

1. The output: free, an unfinished run of the same plan (it goes on), or a finished one.
2. The model: configuration, tokenizer and template; its size, from a copy without weights.
3. The rows become tokens in the work folder; the plan is written last, so that a folder with a plan is ready to train.

Must not know trainers.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_steel import dist
from megatron_steel.data.reserve import sha256
from megatron_steel.errors import SteelError
from megatron_steel.model.verdict import read_verdict, sees_future
from megatron_steel.post.load import load_tokenizer_and_config, require_vocabulary
from megatron_steel.post.tune import lora, settings
from megatron_steel.post.tune.mask import Supervision
from megatron_steel.post.tune.plan import FILE, WHOLE, Plan, newest_whole, work_folder
from megatron_steel.post.tune.rows import data_files
from megatron_steel.post.tune.tokens import write_tokens

_DIGESTED = 1 << 20  # larger files of a model are known by their size and time alone


def prepare(plan: Plan, data: str, output: Path) -> Path | None:
    """Make a work folder ready to train; None where the run is complete already.

    Raises SteelError: bad model, data or settings (nothing is left behind), or an output that holds something else.
    """
    files = data_files(data)
    model = Path(plan.model)
    plan = replace(plan, identity=_identity(model, files))
    work = work_folder(output)
    if output.exists() or output.is_symlink():
        _require_same(plan, output, output)
        dist.log.info("%s is complete already", output)
        return None
    begun = (work / FILE).is_file()
    if begun and (newest_whole(work) or (work / "result.json").is_file()):
        found = _require_same(plan, work, output)
        replace(found, starter=plan.starter).write(work)
        _resume(work)
        return work
    if begun:
        Plan.read(work)  # ours, and nothing came of it: it is made anew
    elif work.exists() and not {file.name for file in work.iterdir()} <= {"tokens"}:  # what a killed preparation leaves
        raise SteelError(
            "the place where the run would be made holds something else", work, "move it away, or name another --output"
        )
    plan = replace(plan, counts=_facts(plan, model))
    shutil.rmtree(work, ignore_errors=True)
    try:
        plan = _tokenize(plan, files, work)
        plan.write(work)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise SteelError(f"cannot write: {error.strerror or error}", work, "mend it and repeat") from error
        raise
    return work


def _identity(model: Path, files: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = {f"data {side}": sha256(file) for side, file in files.items()}
    for file in sorted(model.iterdir()) if model.is_dir() else []:
        if file.is_file():
            size = file.stat().st_size
            found[f"model {file.name}"] = (
                sha256(file) if size <= _DIGESTED else f"{size} bytes, {file.stat().st_mtime_ns}"
            )
    return found


def _require_same(plan: Plan, folder: Path, output: Path) -> Plan:
    if not (folder / FILE).is_file():
        raise SteelError(
            "the output exists already and is never overwritten", folder, "name another --output, or move this one away"
        )
    found = Plan.read(folder)
    differs = plan.differs(replace(found, settings=found.settings | _resolved(plan, found)))
    if differs:
        raise SteelError(f"{output} was begun as another run:" + "".join(f"\n    {line}" for line in differs), folder,
                         "give the same command as then, or name another --output")  # fmt: skip
    return found


def _resolved(plan: Plan, found: Plan) -> dict[str, Any]:
    """`max_length` is None in a plan until the model was read; nobody said it then and nobody says it now."""
    asked = found.counts.get("max_length_asked")
    return {
        "max_length": plan.settings["max_length"]
        if plan.settings["max_length"] == asked
        else found.settings["max_length"]
    }


def _resume(work: Path) -> None:
    whole = newest_whole(work)
    for folder in (work / "checkpoints").glob("checkpoint-*"):
        if not (folder / WHOLE).is_file():
            dist.log.warning("%s was not written to its end and is left out", folder)
            shutil.rmtree(folder)
    dist.log.info("going on from %s", whole or "the beginning")


def _facts(plan: Plan, model: Path) -> dict[str, Any]:
    """The model's size; what its adapter would be; how far it reaches. Raises SteelError where it cannot be tuned."""
    from megatron_steel.post.tune.batches import keep_apart

    tokenizer, config = load_tokenizer_and_config(plan.model, plan.trust_code)
    if tokenizer is None:
        raise SteelError(
            "the folder has no Hugging Face tokenizer", model, "put the tokenizer's files beside the model"
        )
    if not any(file.suffix in (".safetensors", ".bin") for file in model.iterdir()):
        raise SteelError("the folder has no weights", model, "name a folder that `megatron-steel export` wrote")
    text = config.get_text_config()
    require_vocabulary(model, tokenizer, text.vocab_size)
    if sees_future(config, read_verdict(model)):
        dist.log.warning(
            "this model sees the future (%s): its training loss is no language-model loss, what it learns here is worth "
            "less than the loss says, and its replies are written without what training showed it",
            getattr(text, "FFN_type", "its audit says so"),
        )
    hollow = _hollow(config)
    if plan.packing:
        keep_apart(hollow)
    facts = {"parameters": hollow.num_parameters(), "max_length_asked": plan.settings["max_length"]}
    if plan.lora:
        names = set(lora.targets(hollow))
        if not names:
            lora.config(hollow, plan.lora)  # says so
        sizes = [part.weight.shape for name, part in hollow.named_modules() if name in names]
        facts |= {"adapters": len(names), "trained": sum(plan.lora["r"] * sum(shape) for shape in sizes),
                  "left_out": len(lora.linears(hollow)) - len(names)}  # fmt: skip
    return facts | {"reach": getattr(text, "max_position_embeddings", None)}


def _hollow(config: Any) -> Any:
    """The model without weights."""
    import torch

    from megatron_steel.model.build import construct

    try:
        with torch.device("meta"):
            return construct(config, torch.float32)
    except (ValueError, ImportError, OSError) as error:
        raise SteelError(f"this is no causal language model: {error}", "MODEL_DIR",
                         "name a folder that `megatron-steel export` wrote") from error  # fmt: skip


def _tokenize(plan: Plan, files: dict[str, Path], work: Path) -> Plan:
    reach, asked = plan.counts["reach"], plan.settings["max_length"]
    if asked is not None and reach is not None and asked > reach:
        raise SteelError(
            f"max_length={asked} is longer than the {reach} tokens that the model reaches",
            "max_length",
            f"at most {reach}",
        )
    longest = asked or min(settings.LONGEST, reach or settings.LONGEST)
    tokenizer, _ = load_tokenizer_and_config(plan.model, plan.trust_code)
    supervision, counts = Supervision(tokenizer, plan.model), dict(plan.counts)
    for side, file in files.items():
        counts[side] = write_tokens(
            work / "tokens" / f"{side}.arrow", file, plan.kind, supervision, longest, plan.packing
        )
    counts["forged"] = supervision.forged
    micro = plan.settings["per_device_train_batch_size"]
    cut = settings.accumulation(plan.global_batch, micro, plan.ranks)
    counts["steps"], counts["warm_up"] = settings.steps(counts["train"]["sequences"], plan.settings, cut, plan.ranks)
    return replace(plan, counts=counts, settings=plan.settings | {"max_length": longest})
