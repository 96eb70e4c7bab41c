"""TRL's trainers over rows that are tokens already: supervised fine-tuning and DPO.

The loss, the steps and the checkpoints are TRL's and transformers'. What differs: the rows come from `tokens`, held-out
loss is a mean over tokens (transformers' own is one over micro-batches), and a stop that is asked for saves first. Must
not know where the rows came from, or what becomes of the model.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, get_scheduler
from transformers.integrations import TensorBoardCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from megatron_steel import dist
from megatron_steel.checkpoint.commit import sync
from megatron_steel.errors import SteelError, Stopped
from megatron_steel.post.load import load_as
from megatron_steel.post.tune import lora
from megatron_steel.post.tune.batches import Collator, keep_apart
from megatron_steel.post.tune.plan import STOP, WHOLE, Plan, newest_whole
from megatron_steel.post.tune.settings import accumulation
from megatron_steel.post.tune.writing import writing
from megatron_steel.signals import stop_signals

RESULT = "result.json"
WEIGHTS = "weights"


class _Saves:
    """Names what the disk does not take of a checkpoint."""

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> Any:
        with writing(self.args.output_dir):  # type: ignore[attr-defined]
            return super()._save_checkpoint(*arguments, **named)  # type: ignore[misc]


class Supervised(_Saves, SFTTrainer):
    """SFT whose held-out loss is the mean over all supervised tokens, on any number of ranks."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        model, sums = self.model_wrapped, torch.zeros(2, dtype=torch.float64)
        model.eval()
        for batch in self.get_eval_dataloader(eval_dataset):
            with torch.no_grad(), self.compute_loss_context_manager():
                out = model(**self._prepare_inputs(batch), use_cache=False, fused_lm_head=True)
            # Row by row, so that rows which fill the last batch of a rank up do not count twice.
            rows = torch.stack((-out.log_probs.double().sum(1), out.label_mask.double().sum(1)), dim=1)
            sums += self.accelerator.gather_for_metrics(rows).sum(0).cpu()
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1]), f"{metric_key_prefix}_tokens": float(sums[1])}
        self._metrics["eval"].clear()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Preferences(_Saves, DPOTrainer):
    """DPO over `prompt_ids`, `chosen_ids`, `rejected_ids`."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # made by `tokens`


class Keeper(TrainerCallback):
    """Marks checkpoints that are whole, and stops with one when asked: by a signal, by a file, or by the supervisor's death.

    Args:
        work: the run's folder. starter: the supervising process; 0 for none.
    """

    def __init__(self, work: Path, starter: int):
        self._file, self._starter, self._asked, self.stopped = work / STOP, starter, False, False

    def ask(self, number: int, *_: Any) -> None:
        """A signal's handler; the second Ctrl-C means now."""
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if dist.any_rank(self._asked or self._file.exists() or self._is_orphan()):
            self.stopped = control.should_training_stop = control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        dist.barrier()  # every rank has written its part
        if dist.is_main():
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for file in folder.rglob("*"):
                sync(file)
            (folder / WHOLE).touch()
            sync(folder)

    def _is_orphan(self) -> bool:
        if not self._starter:
            return False
        try:
            os.kill(self._starter, 0)
        except ProcessLookupError:
            return True
        return False


def train(work: Path, ready: Callable[[Any], None] = lambda model: None) -> None:
    """Train one rank from a plan, from its newest whole checkpoint, to the end; leave weights and result in `work`.

    Args:
        ready: called with each model before DeepSpeed may cut it.

    Raises:
        Stopped: asked to stop; a checkpoint is saved.
        SteelError: what only TRL or the model can know is wrong.
    """
    plan = Plan.read(work)
    keeper = Keeper(work, plan.starter)
    handlers = {number: signal.signal(number, keeper.ask) for number in stop_signals()}
    try:
        _train(plan, work, keeper, ready)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _train(plan: Plan, work: Path, keeper: Keeper, ready: Callable[[Any], None]) -> None:
    gpu = torch.cuda.is_available()
    if dist.world_size() > 1 or plan.deepspeed:
        dist.start()
    # Whole on every rank and in fp32: DeepSpeed cuts and rounds it afterwards, so every rank starts with the same weights.
    model, tokenizer = load_as(plan.model, plan.trust_code, torch.float32)
    if plan.packing:
        keep_apart(model)
    reference = None
    if plan.kind == "dpo" and not plan.lora:
        reference, _ = load_as(plan.model, plan.trust_code, torch.float32)
    for one in (model, reference):
        if one is not None and plan.deepspeed:
            ready(one)
    resume = newest_whole(work)
    trainer = _trainer(plan, work, _arguments(plan, work, gpu), model, reference, tokenizer, [keeper])
    if dist.is_main():
        trainer.add_callback(_tensorboard(work, resume))
    with writing(work, whole=False):  # the curves
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    state = trainer.state
    if keeper.stopped and state.global_step < state.max_steps:
        raise Stopped(
            f"stopped on request at step {state.global_step} of {state.max_steps}; the same command goes on from there"
        )
    with writing(work):
        trainer.save_model(str(work / WEIGHTS))  # collective: ZeRO-3 gathers
        if dist.is_main():
            tied = list(getattr(model, "all_tied_weights_keys", None) or {})  # none where they are not tied
            result = {"steps": state.global_step, "tied": tied, "log": state.log_history}
            aside = work / f"{RESULT}.partial"
            aside.write_text(json.dumps(result), encoding="utf-8")
            aside.replace(work / RESULT)
    dist.barrier()


def _arguments(plan: Plan, work: Path, gpu: bool) -> dict[str, Any]:
    """Of SFTConfig or DPOConfig."""
    given = {key: value for key, value in plan.settings.items() if key != "max_length"}
    micro = given["per_device_train_batch_size"]
    if given.get("activation_offloading") and not gpu:
        what = "activation_offloading moves what a GPU holds to the CPU, and there is no GPU"
        raise SteelError(what, "command line", "leave activation_offloading out")
    fixed: dict[str, Any] = {
        "output_dir": str(work / "checkpoints"),
        "gradient_accumulation_steps": accumulation(plan.global_batch, micro, plan.ranks),
        "report_to": [],
        "max_length": None,  # cut already
        "remove_unused_columns": False,
        "average_tokens_across_devices": True,
        "use_cpu": not gpu and not plan.deepspeed,
        "dataloader_pin_memory": gpu,
        "disable_tqdm": True,
    }
    if not gpu and plan.deepspeed:
        _deepspeed_on_cpus()
        fixed["accelerator_config"] = {"use_configured_state": True}
    elif not gpu:
        fixed["ddp_backend"] = "gloo" if dist.world_size() > 1 else None
    if (work / "tokens" / "heldout.arrow").is_file():
        given.setdefault("eval_strategy", "epoch")
    if not given.get("fp16"):
        given.setdefault("bf16", gpu)  # on a CPU bf16 is slower than fp32, and nothing is gained
    return given | fixed | {"deepspeed": _deepspeed(plan.deepspeed, bool(given.get("bf16")))}


def _deepspeed_on_cpus() -> None:
    """accelerate knows DeepSpeed on GPUs and the like only: its own state of CPU ranks, with DeepSpeed's name on it."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState(cpu=True, backend="gloo")
    state.distributed_type, state._cpu = DistributedType.DEEPSPEED, False


def _deepspeed(file: dict[str, Any] | None, bf16: bool) -> dict[str, Any] | None:
    """A file of `ds_configs/` with what transformers fills in."""
    if file is None:
        return None
    # Gradients of many micro-batches are summed in fp32, as in pretraining; stage 0 has no buffer for that.
    sums = (
        {"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and file.get("zero_optimization", {}).get("stage") else {}
    )
    zero = {**file.get("zero_optimization", {}), "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**file, **dict.fromkeys(auto, "auto"), "zero_optimization": zero, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"},
            "steps_per_print": 1 << 60, **sums, "zero_force_ds_cpu_optimizer": False}  # fmt: skip


def _trainer(
    plan: Plan, work: Path, arguments: dict[str, Any], model: Any, reference: Any, tokenizer: Any, callbacks: list[Any]
) -> Any:
    rows = {
        side: Dataset.from_file(str(file))
        for side in ("train", "heldout")
        if (file := work / "tokens" / f"{side}.arrow").is_file()
    }
    shared: dict[str, Any] = {"train_dataset": rows["train"], "eval_dataset": rows.get("heldout"), "processing_class": tokenizer,
                              "callbacks": callbacks, "peft_config": lora.config(model, plan.lora) if plan.lora else None}  # fmt: skip
    try:
        _require_schedule(plan)
        if plan.kind == "dpo":
            return Preferences(model, reference, DPOConfig(**arguments), **shared)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        config = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
        return Supervised(model, config, data_collator=Collator(pad), **shared)
    except (ValueError, TypeError, ImportError) as error:  # settings that exclude each other
        what = f"TRL refuses these settings: {type(error).__name__}: {error}"
        raise SteelError(what, "command line", "change the key=value words, or leave them out") from error


def _require_schedule(plan: Plan) -> None:
    """Raise ValueError or TypeError for a schedule that cannot be made; Trainer makes it only when it trains."""
    given = plan.settings.get("lr_scheduler_kwargs")
    get_scheduler(plan.settings["lr_scheduler_type"], torch.optim.SGD([torch.zeros(1)], lr=1.0), plan.counts["warm_up"],
                  plan.counts["steps"], given)  # fmt: skip


def _tensorboard(work: Path, resume: Path | None) -> TensorBoardCallback:
    from torch.utils.tensorboard import SummaryWriter

    # Steps after the checkpoint will be made again: what was written of them is hidden.
    purge = {"purge_step": int(resume.name.rpartition("-")[2]) + 1} if resume else {}
    return TensorBoardCallback(SummaryWriter(str(work / "tensorboard"), **purge))
