"""The model classes that are this package's own, because transformers has none: one line each.

Their files import nothing of ours but each other, and travel with every export. Must not know training or exports.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from megatron_steel.model.configuration_nanogpt import NanoGPTConfig
from megatron_steel.model.configuration_openelm import OpenELMConfig
from megatron_steel.model.configuration_steel import SteelConfig
from megatron_steel.model.modeling_nanogpt import NanoGPTForCausalLM
from megatron_steel.model.modeling_openelm import OpenELMForCausalLM
from megatron_steel.model.modeling_steel import SteelForCausalLM


@dataclass(frozen=True)
class OwnClass:
    """A configuration, the model with its head, and the names of the files that are its code."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    file_names: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        """The modelling code that travels with an export."""
        return [Path(__file__).with_name(name) for name in self.file_names]


OWN = {
    "steel": OwnClass(SteelConfig, SteelForCausalLM, (
        "configuration_steel.py", "experts_steel.py", "mixture_steel.py", "modeling_steel.py")),
    "nanogpt": OwnClass(NanoGPTConfig, NanoGPTForCausalLM, ("configuration_nanogpt.py", "modeling_nanogpt.py")),
    "openelm": OwnClass(OpenELMConfig, OpenELMForCausalLM, ("configuration_openelm.py", "modeling_openelm.py")),
}  # fmt: skip
"""By `model_type`."""


def own_class(config: PretrainedConfig) -> OwnClass | None:
    """What this package has for a configuration of its own; None for a class of transformers or of a stranger."""
    return next((own for own in OWN.values() if type(config) is own.config), None)
