"""The settings of a fine-tuning run: the paper's recipe, `key=value` in TRL's own names over it, and what follows from them.

A key is a field of TRL's SFTConfig or DPOConfig, and its value is read as TRL's own command line reads it. Keys that an
option of the verb decides are refused. Must not know data, models or ranks.
"""

import argparse
import difflib
import math
import re
from typing import Any, NoReturn

from megatron_steel.errors import SteelError

PAPER: dict[str, dict[str, Any]] = {
    # Steel-LLM (arXiv 2502.06635): supervised fine-tuning and DPO; weight decay and schedule from its scripts.
    "sft": {"learning_rate": 2e-5, "num_train_epochs": 4.0, "lr_scheduler_type": "cosine", "warmup_steps": 0.0},
    "dpo": {"learning_rate": 5e-6, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "beta": 0.1},
}  # fmt: skip
GLOBAL_BATCH = {"sft": 256, "dpo": 128}
LONGEST = 2048  # tokens of a conversation, where neither the model nor the user says less
_COMMON = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "weight_decay": 0.0, "max_grad_norm": 1.0,
           "logging_steps": 1.0, "save_strategy": "steps", "save_steps": 500.0, "save_total_limit": 2, "seed": 42,
           "max_steps": -1}  # fmt: skip
# TRL's key -> what decides it here.
_OWNED = {
    "output_dir": "--output", "gradient_accumulation_steps": "--global-batch-size", "deepspeed": "--deepspeed",
    "packing": "--packing", "eval_packing": "--packing", "packing_strategy": "--packing", "padding_free": "--packing",
    "resume_from_checkpoint": "--output (the same command goes on)", "trust_remote_code": "--trust-code",
} | dict.fromkeys(
    ("assistant_only_loss", "completion_only_loss", "dataset_kwargs", "dataset_text_field", "chat_template_path", "eos_token",
     "pad_token", "model_init_kwargs", "truncation_mode", "shuffle_dataset", "remove_unused_columns", "use_cpu", "fsdp",
     "fsdp_config", "parallelism_config", "push_to_hub", "auto_find_batch_size", "do_train", "do_eval", "do_predict",
     "average_tokens_across_devices", "dataset_num_proc", "ddp_backend", "run_name", "project", "use_liger_kernel",
     "load_best_model_at_end", "save_only_model", "precompute_ref_log_probs", "sync_ref_model", "accelerator_config",
     "report_to", "disable_tqdm", "dataloader_pin_memory", "dataloader_drop_last"),
    "this verb itself",
)  # fmt: skip


def read_settings(kind: str, overrides: list[str]) -> dict[str, Any]:
    """The recipe with the overrides, as arguments of SFTConfig or DPOConfig; and `max_length`, None where nobody said it.

    Raises SteelError with every wrong word at once: no `=`, an unknown key with the nearest known one, a key that an
    option decides, a value of another type.
    """
    parser, fields = _trl_parser(kind)
    values, problems = {**_COMMON, **PAPER[kind], "max_length": None}, []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            problems.append(f"{word!r} is no key=value")
        elif key in _OWNED:
            problems.append(f"{key} is decided by {_OWNED[key]}")
        elif key not in fields:
            near = difflib.get_close_matches(key, sorted(fields - set(_OWNED)), n=1)
            problems.append(f"{key} is not known" + (f": did you mean {near[0]}?" if near else ""))
        else:
            try:
                values[key] = getattr(parser.parse_args([f"--{key}", *_words(parser, key, text)]), key)
            except _Refused as refused:
                problems.append(f"{key}={text}: {refused}")
    problems += _impossible(values) + _unknown_losses(kind, values)
    if problems:
        raise SteelError("these settings cannot be used:" + "".join(f"\n    {problem}" for problem in problems), "command line",
                         f"keys are those of TRL's {_class_name(kind)}, as learning_rate=1e-5")  # fmt: skip
    return values


def accumulation(global_batch: int, micro_batch: int, ranks: int) -> int:
    """Micro-batches of a rank in one step. Raises SteelError where the global batch is no whole number of them."""
    if global_batch < 1 or global_batch % (micro_batch * ranks):
        raise SteelError(
            f"a global batch of {global_batch} cannot be cut into micro-batches of {micro_batch} on {ranks} rank{'s' * (ranks > 1)}",
            "--global-batch-size", f"take a multiple of {micro_batch * ranks}, or another per_device_train_batch_size")  # fmt: skip
    return global_batch // (micro_batch * ranks)


def steps(rows: int, values: dict[str, Any], accumulated: int, ranks: int) -> tuple[int, int]:
    """Optimizer steps of the run, and of these how many warm up; counted as transformers' Trainer counts."""
    batches = math.ceil(math.ceil(rows / values["per_device_train_batch_size"]) / ranks)
    a_epoch = max(1, math.ceil(batches / accumulated))
    total = int(values["max_steps"]) if values["max_steps"] > 0 else math.ceil(values["num_train_epochs"] * a_epoch)
    warm = values["warmup_steps"]
    return total, int(warm) if warm >= 1 else math.ceil(total * warm)


def require_extra() -> None:
    """Raise SteelError where the extra that holds TRL is not installed."""
    import importlib.util

    missing = [name for name in ("trl", "peft", "accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise SteelError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed", "extra sft",
                         "pip install 'megatron-steel[sft]'")  # fmt: skip


class _Refused(Exception):  # noqa: N818
    """What argparse has against one word."""


def _class_name(kind: str) -> str:
    return f"{kind.upper()}Config"


def _trl_parser(kind: str) -> tuple[argparse.ArgumentParser, set[str]]:
    """TRL's own way of reading a value from a word, and the names of its fields."""
    import dataclasses

    import trl
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise _Refused(message.partition(": ")[2] or message)

    config = getattr(trl, _class_name(kind))
    return Parser(config, allow_abbrev=False, add_help=False), {
        field.name for field in dataclasses.fields(config) if field.init
    }


def _words(parser: argparse.ArgumentParser, key: str, text: str) -> list[str]:
    """One word, or several where the field is a list: a,b."""
    many = any(f"--{key}" in action.option_strings and action.nargs in ("+", "*") for action in parser._actions)
    return text.split(",") if many else [text]


def _impossible(values: dict[str, Any]) -> list[str]:
    least = {"learning_rate": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "warmup_steps": 0,
             "max_length": 8, "weight_decay": 0, "save_total_limit": 1}  # fmt: skip
    found = [
        f"{key}={values[key]} is below {smallest}"
        for key, smallest in least.items()
        if values.get(key) is not None and values[key] < smallest
    ]
    above = ["beta"] if "beta" in values else []
    above += [] if values["max_steps"] > 0 else ["num_train_epochs"]
    found += [f"{key}={values[key]} is not above 0" for key in above if values[key] <= 0]
    numbers = ((key, n) for key, value in values.items() for n in (value if isinstance(value, list) else [value]))
    return found + [
        f"{key}={n} is no finite number" for key, n in numbers if isinstance(n, float) and not math.isfinite(n)
    ]


def _unknown_losses(kind: str, values: dict[str, Any]) -> list[str]:
    """TRL compares a loss of DPO with its list at the first step; here with the list in the field's own help."""
    import dataclasses

    import trl

    if kind != "dpo" or "loss_type" not in values:
        return []
    field = next(field for field in dataclasses.fields(trl.DPOConfig) if field.name == "loss_type")
    known = re.findall(r"`'(\w+)'`", field.metadata.get("help", ""))
    unknown = [name for name in values["loss_type"] if known and name not in known]
    return [f"loss_type={name} is not known (known: {', '.join(known)})" for name in unknown]
