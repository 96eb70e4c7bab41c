"""One DeepSpeed dict from the recipe and a file of `ds_configs/`, and the engine made from it.

1. `read_config` finds the file and refuses keys that the recipe owns and values of "auto".
2. `engine_config` adds what the recipe owns: batch sizes, precision, clipping.
3. `start_engine` builds the optimizer and hands the model to DeepSpeed.
4. `apply_step` steps it.

The file owns sharding, offload and communication; the recipe owns everything else; no key has two owners.
"""

import difflib
import json
import logging
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_steel import dist
from megatron_steel.errors import SteelError
from megatron_steel.model.build import fetched_whole
from megatron_steel.model.states import rank_states
from megatron_steel.recipe import Optim, Recipe, accumulation_steps
from megatron_steel.train import elastic, optimizer
from megatron_steel.train.muon import Muon

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

# DeepSpeed's key -> the recipe's key that decides it.
RECIPE_OWNS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "optimizer": "optim",
    "scheduler": "schedule",
    "gradient_clipping": "optim.clip_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "steps_per_print": "train.log_every_steps",
    "tensorboard": "run.dir",
    "wandb": "run.dir",
    "csv_monitor": "run.dir",
    "checkpoint": "train.resume",
}
# What a file may set: sharding, offload, communication and its diagnosis.
FILE_OWNS = ("zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "aio",
             "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "compile")  # fmt: skip


def shipped_configs() -> list[str]:
    """Names of the files in `ds_configs/` that the wheel packs."""
    return sorted(file.name for file in config_folder().glob("*.json"))


def read_config(name_or_path: str) -> dict[str, Any]:
    """A file of `ds_configs/`, by path or shipped name.

    Raises SteelError: no such file, not JSON, a key that the recipe owns, or a value of "auto".
    """
    path = config_path(name_or_path)
    if not path.is_file():
        raise SteelError(f"there is no DeepSpeed file {name_or_path!r}", "deepspeed.config",
                         f"use a path, auto, or one of: {', '.join(shipped_configs())}")  # fmt: skip
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SteelError(f"the DeepSpeed file is not JSON: {error}", name_or_path, "mend the file") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise SteelError(
            "the DeepSpeed file is no object with an object zero_optimization", name_or_path, "see zero3.json"
        )
    for key in config:
        if key not in (*RECIPE_OWNS, *FILE_OWNS):
            near = difflib.get_close_matches(key, FILE_OWNS, n=1)
            raise SteelError(f"the DeepSpeed file sets {key!r}, which is not known to be its to set", name_or_path,
                             f"did you mean {near[0]}?" if near else f"known: {', '.join(FILE_OWNS)}")  # fmt: skip
        if key in RECIPE_OWNS:
            raise SteelError(f"the DeepSpeed file sets {key!r}, which the recipe decides", name_or_path,
                             f"delete it there and set {RECIPE_OWNS[key]} in the recipe")  # fmt: skip
    _refuse_auto(config, name_or_path)
    _check_sharding(config.get("zero_optimization", {}), name_or_path)
    return config


def engine_config(recipe: Recipe, file: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The whole dict for `deepspeed.initialize`: the file plus what the recipe owns.

    Raises SteelError when the global batch cannot be cut into micro-batches on this many ranks, or when this sharding
    cannot carry the precision or the optimizer.
    """
    stage = zero_stage(file)
    if recipe.train.precision == "fp16" and stage == 0:
        what = "at stage 0 DeepSpeed adds up gradients in fp16"
        raise SteelError(what, "train.precision=fp16", "use deepspeed.config=zero1.json or above, or bf16")
    optimizer.refuse_sharding(recipe.optim, stage, offloads_optimizer(file))
    config = {
        **file,
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(recipe.train, world_size),
        # Written out also when it is 0, because DeepSpeed clips at 1 by default. At stage 0 in fp32 the loop clips.
        "gradient_clipping": recipe.optim.clip_grad_norm if stage > 0 or recipe.train.precision != "fp32" else 0.0,
        "steps_per_print": 1 << 60,  # the loop prints
        "timers": {"throughput": {"enabled": False}},  # on by default, it waits for the device twice a micro-batch
        "zero_allow_untested_optimizer": recipe.optim.name != "adamw",  # tested here, where it is not refused above
        "zero_force_ds_cpu_optimizer": False,  # offload runs on torch's AdamW where no compiler is
    }
    if recipe.train.precision != "fp32":
        config[recipe.train.precision] = {"enabled": True}  # fp16: with DeepSpeed's dynamic loss scale, from 2^16
        if stage > 0:  # stage 0 has no fp32 gradient buffer and refuses the key
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(config: dict[str, Any]) -> bool:
    device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return device not in ("none", None)


def smallest_stage_that_fits(parameters: int, activation_bytes: int, device_bytes: int, world_size: int) -> str:
    """`deepspeed.config: auto`: the first of zero1, zero2, zero3, zero3_offload whose states and activations fit.

    States per rank as `model.states` counts them; a tenth of the device stays free. Stage 0 is left out because it adds
    gradients up in bf16 and refuses an fp32 sum; on one rank stage 1 takes the same memory.
    """
    for name in ("zero1.json", "zero2.json", "zero3.json"):
        zero = json.loads((config_folder() / name).read_text(encoding="utf-8"))["zero_optimization"]
        if rank_states([parameters], zero, world_size).device + activation_bytes <= 0.9 * device_bytes:
            return name
    return "zero3_offload.json"


def start_engine(
    model: "torch.nn.Module", groups: list[dict[str, Any]], optim: Optim, config: dict[str, Any], device: "torch.device"
) -> "DeepSpeedEngine":
    """Shard the model and start DeepSpeed.

    Args:
        model: the full fp32 model, the same on every rank.
        groups: its parameters, each group with its own `weight_decay`.
        config: the whole dict of `engine_config`.
    """
    deepspeed = quiet_deepspeed(device)
    offload = offloads_optimizer(config)
    sub_groups = zero_stage(config) == 3
    kernel = dist.together(lambda: optimizer.choose(optim.kernel, device.type, offload, sub_groups, optim.name))
    assert kernel is not None
    dist.log.info(
        "optimizer: %s by %s%s", optim.name, kernel, " (optim.kernel: auto)" if optim.kernel == "auto" else ""
    )
    inner = optimizer.build(kernel, groups, optim, device.type, offload)
    fetch_mixtures_whole(model)
    engine = deepspeed.initialize(model=model, optimizer=inner, config=config)[0]
    if hasattr(engine.optimizer, "fp32_groups") and zero_stage(config) == 0:
        # At stage 0 in bf16 DeepSpeed steps once over zeros at start and leaves Adam's counters at 1, which would
        # spoil the bias correction of every later step.
        engine.optimizer.optimizer.state.clear()
    if isinstance(inner, Muon):
        inner.lay_out(elastic.places(engine), {engine.param_names[p]: p.shape for p in engine.module.parameters()})
    return engine


def set_accumulation(engine: "DeepSpeedEngine", micro_batches: int) -> None:
    """From the next micro-batch on a step has so many a rank.

    It sets what DeepSpeed divides by. Where a step ends must be said for every micro-batch
    (`set_gradient_accumulation_boundary`): DeepSpeed's own count runs over the whole run, modulo the number of now.
    """
    if micro_batches != engine.gradient_accumulation_steps():
        engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * dist.world_size())


def apply_step(engine: "DeepSpeedEngine", clip_grad_norm: float) -> float | None:
    """`engine.step()`. Returns the gradient norm only where DeepSpeed does not keep it: fp32 at stage 0.

    There DeepSpeed neither measures the norm nor leaves out a step with non-finite gradients, so both, and the
    clipping, are done here (`engine_config` switches DeepSpeed's off).
    """
    import torch

    norm = None
    if is_plain(engine) and engine.is_gradient_accumulation_boundary():
        trained = [p for p in engine.module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in trained])
        norm = float(total)
        if not math.isfinite(norm):
            for p in trained:
                p.grad = None
        elif clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, clip_grad_norm, total)
    engine.step()
    return norm


def is_plain(engine: "DeepSpeedEngine") -> bool:
    """True where DeepSpeed steps the optimizer itself, without a wrapper of its own."""
    return engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled()


def refuse_precision(precision: str, device: "torch.device") -> None:
    """Raise SteelError where DeepSpeed has no arithmetic for it."""
    if precision == "fp16" and device.type == "cpu":
        what = "fp16 with a loss scale needs a GPU: DeepSpeed does not train in it on this CPU"
        raise SteelError(what, "train.precision=fp16", "use train.precision=bf16 or fp32")


def fetch_mixtures_whole(model: "torch.nn.Module") -> None:
    """Tell ZeRO-3, before it cuts a model, which modules read the weights of their children themselves."""
    from deepspeed.utils import set_z3_leaf_module

    for module in fetched_whole(model):
        set_z3_leaf_module(module, True)


def quiet_deepspeed(device: "torch.device") -> Any:
    """Import DeepSpeed so that it neither compiles anything on a CPU nor talks about its internals."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it warns when it finds this out by itself
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, per step
    if device.type == "cpu":
        # Its shared-memory collectives are compiled at start and need a C++ compiler; gloo does the same work.
        # The table is internal to DeepSpeed, hence the pin in pyproject.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def config_path(name_or_path: str) -> Path:
    """Of a DeepSpeed file, by path or shipped name; it may not be there."""
    path = Path(name_or_path)
    shipped = not path.is_file() and str(path.parent) in (".", "ds_configs")
    return config_folder() / path.name if shipped else path


def config_folder() -> Path:
    """`ds_configs/` of a checkout, or the copy inside an installed wheel."""
    package = Path(__file__).parent.parent
    packed = package / "ds_configs"
    return packed if packed.is_dir() else package.parent / "ds_configs"


def _check_sharding(zero: dict[str, Any], where: str) -> None:
    """Let DeepSpeed's own schema judge the section before anything is built."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise SteelError(f"zero_optimization.{key}: {first['msg']}", where, "see DeepSpeed's documentation") from None


def _refuse_auto(value: Any, where: str, key: str = "") -> None:
    if value == "auto":
        raise SteelError(f"the DeepSpeed file leaves {key!r} to 'auto', which only the Hugging Face Trainer fills in",
                         where, "write a number, or delete the key for DeepSpeed's default")  # fmt: skip
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_auto(inner, where, f"{key}.{name}".lstrip("."))


def to_device(batch: dict[str, "torch.Tensor"], device: "torch.device") -> dict[str, "torch.Tensor"]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
