"""LoRA by peft: which weights get an adapter, and an adapter joined with the model it was trained on.

Every linear layer but the head, except those that the model reads without calling them: Steel multiplies the weights of
all experts of a mixture at once, so an adapter there would never be used. Must not know data or trainers.
"""

from pathlib import Path
from typing import Any

from megatron_steel.errors import SteelError

_DEFAULT_RANK = 16


def read_lora(text: str | None) -> dict[str, Any] | None:
    """`r=8,lora_alpha=16` (either may be absent; alpha is twice the rank) to a rank and an alpha; None for None."""
    if text is None:
        return None
    given: dict[str, int] = {}
    for word in filter(None, text.split(",")):
        key, _, value = word.partition("=")
        if key not in ("r", "lora_alpha") or not value.isdecimal() or int(value) < 1:
            raise SteelError(
                f"{word!r} is no setting of --lora", "--lora", "write r=16 or r=16,lora_alpha=32, whole numbers from 1"
            )
        given[key] = int(value)
    rank = given.get("r", _DEFAULT_RANK)
    return {"r": rank, "lora_alpha": given.get("lora_alpha", 2 * rank)}


def config(model: Any, settings: dict[str, Any]) -> Any:
    """A LoraConfig for this model. Raises SteelError where no layer can have an adapter."""
    from peft import LoraConfig

    names = targets(model)
    if not names:
        raise SteelError(
            "no linear layer of this model can have an adapter", "--lora", "leave --lora out: train all weights"
        )
    return LoraConfig(task_type="CAUSAL_LM", target_modules=names, lora_dropout=0.0, bias="none", **settings)


def linears(model: Any) -> dict[str, Any]:
    """The linear layers but the head, by name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name: part for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D)) and part is not head
    }


def targets(model: Any) -> list[str]:
    """Names of those that get an adapter."""
    from megatron_steel.model.build import fetched_whole

    read_whole = {
        id(part) for mixture in fetched_whole(model) for expert in _experts(mixture) for part in expert.modules()
    }
    return [name for name, part in linears(model).items() if id(part) not in read_whole]


def _experts(mixture: Any) -> list[Any]:
    return [part for name, part in mixture.named_children() if name in ("experts", "shared")]


def merge(model: Any, adapter: Path) -> Any:
    """The model with an adapter's weights added, as a plain model again."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
