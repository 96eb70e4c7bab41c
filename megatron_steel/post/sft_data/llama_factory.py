"""What LLaMA-Factory needs to train on the mixture: `dataset_info.json` and a YAML file that is ready to start.

The recipe is that of the Steel-LLM paper (learning rate 2e-5, 256 conversations a step, 4 epochs, cosine; for
preferences beta 0.1, 5e-6, 128, 3 epochs). Only assistant turns are trained on, which is LLaMA-Factory's own default,
written out. Must not know how the mixture was made.
"""

import json
from pathlib import Path
from typing import Any

from megatron_steel.data.chatml import SYSTEM
from megatron_steel.post.sft_data.spec import Spec

_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
         "system_tag": "system"}  # fmt: skip


def hand_over(folder: Path, spec: Spec, report: dict[str, Any], published: Path) -> None:
    """Write both files for supervised data; nothing for other kinds, which go to TRL or verl.

    Args:
        folder: where the mixture lies now. published: where it will lie.
    """
    if spec.kind != "sft":
        return
    names = {"steel_sft": "train.jsonl", **({"steel_sft_heldout": "heldout.jsonl"} if report["heldout"] else {})}
    info = {
        name: {"file_name": file, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": _TAGS}
        for name, file in names.items()
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    export = Path(spec.tokenizer).resolve()
    model = export if (export / "config.json").is_file() else "EXPORTED_MODEL_FOLDER"
    (folder / "llama_factory_sft.yaml").write_text(
        _YAML.format(
            model=json.dumps(str(model), ensure_ascii=False),
            folder=json.dumps(str(published.resolve()), ensure_ascii=False),
            system=json.dumps(spec.system or SYSTEM, ensure_ascii=False),
            cutoff=spec.max_tokens,
            heldout=_HELDOUT if report["heldout"] else "",
        ),
        encoding="utf-8",
    )


_HELDOUT = """
eval_dataset: steel_sft_heldout
per_device_eval_batch_size: 8
eval_strategy: steps
eval_steps: 500
"""
_YAML = """\
# Start with: llamafactory-cli train llama_factory_sft.yaml
# (LLaMA-Factory needs an environment of its own: its versions exclude those of this package.)
model_name_or_path: {model}
trust_remote_code: true             # the Steel classes travel with the export; a Llama or Qwen2 export needs none

stage: sft
do_train: true
finetuning_type: full

dataset: steel_sft
dataset_dir: {folder}
template: qwen                      # ChatML, as in pretraining ...
default_system: {system}            # ... with this system line, not Qwen's own
cutoff_len: {cutoff}
train_on_prompt: false              # the loss is of assistant turns alone,
mask_history: false                 # of all of them
{heldout}
learning_rate: 2.0e-5
lr_scheduler_type: cosine
weight_decay: 0.0
num_train_epochs: 4
per_device_train_batch_size: 8
gradient_accumulation_steps: 32     # 8 x 32 = 256 conversations a step on one GPU: divide by the number of GPUs
bf16: true

output_dir: outputs/steel_sft
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: tensorboard              # LLaMA-Factory does not bring it: pip install tensorboard, or write none
"""
