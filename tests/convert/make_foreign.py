"""Not a test: run by `make_checkpoints` under the launcher. Trains small models as others do, without this package, and writes
beside each checkpoint the fp32 weights that DeepSpeed's own converter finds in it (at stage 0, which it does not know, the
optimizer's own).

A case is {by: "trainer" | "loop", stage, precision, type, config, groups, frozen, wrapped}. `by: trainer` is transformers' Trainer,
which saves at steps 1 and 2 into `OUTPUT/NAME`; `by: loop` calls the engine itself and saves into `OUTPUT/NAME/saved`.
"""

from pathlib import Path

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def sharding(case: dict) -> dict:
    switch = {"bf16": {"enabled": case["precision"] == "bf16"}, "fp16": {"enabled": case["precision"] == "fp16"}}
    if case["precision"] == "fp16":
        switch["fp16"]["initial_scale_power"] = 4
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    zero = {"stage": case["stage"], "stage3_param_persistence_threshold": 100}
    return {"zero_optimization": zero, "optimizer": optimizer, **switch}


def fresh_model(case: dict) -> torch.nn.Module:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case["type"], **case["config"]), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in case.get("frozen", [])))
    return model


def ids(rank: int, step: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, 16), generator=torch.Generator().manual_seed(100 * rank + step))


def by_trainer(case: dict, tokenizer: str, output: Path) -> torch.nn.Module:
    from accelerate.state import AcceleratorState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    model = fresh_model(case)
    rows = [{"input_ids": (i := ids(0, n, model.config.vocab_size)[0].tolist()), "labels": i} for n in range(16)]
    config = sharding(case) | {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    arguments = TrainingArguments(
        str(output), max_steps=2, save_steps=1, per_device_train_batch_size=2, deepspeed=config, report_to=[], seed=1,
        learning_rate=1e-2, bf16=case["precision"] == "bf16", fp16=case["precision"] == "fp16", use_cpu=True,
        save_only_model=False, disable_tqdm=True, lr_scheduler_type="constant", weight_decay=0.0, warmup_steps=0,
        adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(tokenizer)).train()
    unset_hf_deepspeed_config()  # or the next model would be built in shards
    AcceleratorState._reset_state()
    PartialState._reset_state()
    return model


def by_loop(case: dict, tokenizer: str, output: Path) -> torch.nn.Module:
    rank = torch.distributed.get_rank()
    model = fresh_model(case)
    if rank == 0:
        model.config.save_pretrained(output / "model")
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(output / "model")
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained}]
    if case.get("groups") == 2:
        groups = [{"params": [p for p in trained if (p.ndim > 1) is matrix]} for matrix in (True, False)]
    config = sharding(case) | {"train_micro_batch_size_per_gpu": 2}
    wrapped = torch.nn.ModuleDict({"model": model}) if case.get("wrapped") else model
    engine, *_ = deepspeed.initialize(model=wrapped, model_parameters=groups, config=config)
    for step in range(2):
        batch = ids(rank, step, model.config.vocab_size)
        engine.backward(model(input_ids=batch, labels=batch).loss)
        engine.step()
    engine.save_checkpoint(str(output / "saved"))
    if not case["stage"] and rank == 0:
        torch.save(masters(engine), output / "reference.pt")
    return wrapped


def reference(saved: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in get_fp32_state_dict_from_zero_checkpoint(str(saved)).items()}


def masters(engine) -> dict[str, torch.Tensor]:
    found = {name: p.detach() for name, p in engine.module.named_parameters()}
    for low, high in zip(
        getattr(engine.optimizer, "fp16_groups", []), getattr(engine.optimizer, "fp32_groups", []), strict=True
    ):
        found |= {engine.param_names[p]: master.detach() for p, master in zip(low, high, strict=True)}
    return found


def make(cases: dict, tokenizer: str, output: Path) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles a library for minutes
    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, and works
    for name, case in cases.items():
        folder = output / name
        trained = (by_trainer if case["by"] == "trainer" else by_loop)(case, tokenizer, folder)
        torch.distributed.barrier()
        if case["stage"] and torch.distributed.get_rank() == 0:
            found = reference(folder / ("checkpoint-2" if case["by"] == "trainer" else "saved"))
            if case["stage"] == 1:  # the converter leaves frozen weights out there
                frozen = {name: p.detach() for name, p in trained.named_parameters() if not p.requires_grad}
                assert not set(frozen) & set(found)
                found |= frozen
            torch.save(found, folder / "reference.pt")
