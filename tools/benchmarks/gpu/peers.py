"""The peers: what one would write, or start, instead of us. Each gets the same model, weights, batches and clipping.

`HandWritten` and `PlainLoop` have the interface of `runs.Ours`; `trainer_steps` runs transformers' Trainer, which owns
its loop. All use the class's own loss, which shifts its labels itself and so predicts one token a sample fewer than ours.
What only a GPU has (Liger, compile) is left out on a CPU. Knows nothing of what is measured.
"""

import contextlib
import dataclasses
import tempfile
import time
from typing import Any

import torch

from gpu import lines
from gpu.runs import Batch, Step
from megatron_steel import dist
from megatron_steel.model import build
from megatron_steel.recipe import Recipe
from megatron_steel.train import engine as engines


class HandWritten:
    """One file of PyTorch: autocast to bf16 over fp32 weights, torch.compile, torch's fused AdamW.

    It keeps fp32 weights and moments because ours does; all-bf16 training would be another, less exact method.
    """

    kernel = "torch"

    def __init__(self, recipe: Recipe, model: Any, device: torch.device):
        self._model, self._recipe, self._device = model.train(), recipe, device
        groups = build.decay_groups(model, recipe.optim.weight_decay, recipe.optim.weight_decay_on)
        o = recipe.optim
        self._adam = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=True)
        self._call = torch.compile(model, dynamic=False) if device.type == "cuda" else model

    def resize(self, micro_batch: int, accumulation: int) -> None:
        """Nothing here depends on the size; torch compiles again for the new one."""

    def step(self, batches: list[Batch]) -> Step:
        total = torch.zeros((), device=self._device)
        for batch in batches:
            ids = batch["input_ids"].to(self._device, non_blocking=True)
            with self._precision():
                loss = self._call(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / len(batches)).backward()
            total += loss.detach() / len(batches)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._recipe.optim.clip_grad_norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return Step(total, None)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        wanted = self._recipe.train.precision == "bf16"
        return torch.autocast(self._device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


class PlainLoop:
    """The DeepSpeed loop of its tutorial around a transformers model: eager, whole logits, DeepSpeed's own defaults."""

    kernel = "torch"

    def __init__(self, recipe: Recipe, model: Any, device: torch.device):
        deepspeed = engines.quiet_deepspeed(device)
        self._device, size = device, recipe.train.micro_batch_size
        config = {
            **deepspeed_settings(recipe),
            "train_micro_batch_size_per_gpu": size,
            "gradient_accumulation_steps": recipe.train.global_batch_size // size,
            "gradient_clipping": recipe.optim.clip_grad_norm,
            "bf16": {"enabled": recipe.train.precision == "bf16"},
            # torch's AdamW: DeepSpeed's own is compiled at first use.
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True, **adam_settings(recipe)}},
        }
        self._engine = deepspeed.initialize(model=model.train(), model_parameters=model.parameters(), config=config)[0]

    def resize(self, micro_batch: int, accumulation: int) -> None:
        self._engine.set_train_micro_batch_size(micro_batch)
        self._engine.set_train_batch_size(micro_batch * accumulation * dist.world_size())

    def step(self, batches: list[Batch]) -> Step:
        total = torch.zeros((), device=self._device)
        for batch in batches:
            ids = batch["input_ids"].to(self._device, non_blocking=True)
            loss = self._engine(input_ids=ids, labels=ids, use_cache=False).loss
            self._engine.backward(loss)
            self._engine.step()
            total += loss.detach() / len(batches)
        return Step(total, None)


def trainer_steps(
    recipe: Recipe, model: Any, device: torch.device, batches: list[Batch], warm_up: int, steps: int, seconds: float
) -> tuple[list[float], float | None]:
    """Seconds of each step after the `warm_up`, and the first step's loss (None where it was not logged).

    Args:
        batches: the micro-batches of one step; every step sees them again.
        seconds: no further step is begun after this time, once three are timed.
    """
    from transformers import Trainer, TrainerCallback

    ends: list[float] = []

    class Stopwatch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            if len(ends) == warm_up and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # building the model is not training it
            timed = len(ends) - warm_up
            if timed >= 3 and ends[-1] - ends[warm_up - 1] > seconds:
                control.should_training_stop = True

    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch["input_ids"]] * (warm_up + steps)
    engines.quiet_deepspeed(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(recipe, device, folder, warm_up + steps)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Stopwatch()])
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [b - a for a, b in zip(ends[warm_up - 1 :], ends[warm_up:], strict=False)], logged[0] if logged else None


def trainer_arguments(recipe: Recipe, device: torch.device, folder: str, steps: int, fast: bool = True) -> Any:
    """What a user of the Trainer would write for this recipe, as fast as its options go (`fast`, on a GPU)."""
    from transformers import TrainingArguments

    gpu, o, size = device.type == "cuda", recipe.optim, recipe.train.micro_batch_size
    if gpu and fast and recipe.model.type == "steel":
        lines.say("note", text="HF Trainer: Liger has no kernels for the class Steel, so only compile helps it there")
    config = deepspeed_settings(recipe) | {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
    }
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=recipe.train.global_batch_size // size // dist.world_size(),
        bf16=recipe.train.precision == "bf16",
        optim="adamw_torch_fused",
        learning_rate=o.lr,
        adam_beta1=o.betas[0],
        adam_beta2=o.betas[1],
        adam_epsilon=o.eps,
        weight_decay=o.weight_decay,
        max_grad_norm=o.clip_grad_norm,
        lr_scheduler_type="constant",
        use_liger_kernel=gpu and fast,
        torch_compile=gpu and fast,
        use_cpu=not gpu,
        deepspeed=config,
        dataloader_pin_memory=gpu,
        logging_steps=recipe.train.log_every_steps,
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=recipe.run.seed,
    )


def deepspeed_settings(recipe: Recipe) -> dict[str, Any]:
    """The same file of `ds_configs/` that ours runs with."""
    return engines.read_config(recipe.deepspeed.config)


def adam_settings(recipe: Recipe) -> dict[str, Any]:
    wanted = dataclasses.asdict(recipe.optim)
    return {key: wanted[key] for key in ("lr", "betas", "eps", "weight_decay")}
