"""The script one writes for transformers' Trainer with DeepSpeed: nothing of this project is imported.

trainer_script.py FOLDER OUT.json BEGAN STEPS        FOLDER: config.json, tokens.bin (uint16), deepspeed.json
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed.ops
import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at start otherwise, for minutes
MARKS: list[float] = []


class Blocks(torch.utils.data.Dataset):
    def __init__(self, file: Path, length: int):
        self._tokens, self._length = np.memmap(file, np.uint16, "r"), length

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = self._tokens[number * self._length : (number + 1) * self._length].astype(np.int64)
        return {"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)}


class Marks(TrainerCallback):
    def on_step_end(self, *_: object, **__: object) -> None:
        MARKS.append(time.time())


def main() -> None:
    folder, out, began, steps = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    set_seed(1234)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(out.with_suffix(".run")), max_steps=steps, per_device_train_batch_size=4,
        gradient_accumulation_steps=4, bf16=True, optim="adamw_torch_fused", lr_scheduler_type="constant", use_cpu=True,
        deepspeed=str(folder / "deepspeed.json"), save_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = Blocks(folder / "tokens.bin", config.max_position_embeddings)
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Marks()]).train()
    out.write_text(json.dumps({"began": began, "marks": MARKS}), encoding="utf-8")


if __name__ == "__main__":
    main()
