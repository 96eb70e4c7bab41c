"""Which models the suite measures, at their real size or as toys for a CPU, and what is asked of them. Knows recipes only."""

from dataclasses import dataclass

from megatron_steel.recipe import Recipe, load_recipe, recipe_names


@dataclass(frozen=True)
class Asked:
    """What one recipe is to show on one H200. Shares are of the nominal dense bf16 peak, in the hw convention."""

    samples_per_step: int
    """One rank's share of the real global batch, so that the optimizer weighs as much as it does in the real run."""
    floor: float | None = None
    aim: float | None = None


# 64 samples of 2,048 are what one of eight GPUs takes of a million tokens a step; GPT-2's half a million are one GPU's.
# In the order of worth: what is measured first when time is short.
RECIPES = {
    "tinyllama-1.1b": Asked(64, 0.50, 0.60),
    "zh-1b": Asked(64, 0.50, 0.60),
    "steel-1b": Asked(64, 0.50, 0.60),
    "qwen1.5-0.5b": Asked(64, 0.50, 0.60),
    "nanogpt-124m": Asked(512, 0.50, 0.60),
    "steel-1b-causal": Asked(64),
}
TOY_RECIPES = ("zh-1b",)
# Its dense twin: the same attention, head and number of parameters, an MLP where the mixture was (docs/soft_moe.md).
DENSE_TWIN = ("model.config.FFN_type=raw", "model.config.intermediate_size=2688", "model.config.mlp_div_ratio=1")
CAUSAL_TO_DENSE = 1.3
"""steel-1b-causal may take so many times the step time of its dense twin."""

_SMALL = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_SMALL_QWEN = {"head_dim": 16, "num_key_value_heads": 2}
# For parity on a GPU: small enough for an fp32 twin, large enough to use the kernels that a real model uses.
_MIDDLE = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "max_position_embeddings": 256,
}  # fmt: skip
_MIDDLE_QWEN = {"head_dim": 64, "num_key_value_heads": 4}


def missing_recipes(names: list[str]) -> list[str]:
    """Those of `names` that this tree does not ship."""
    return [name for name in names if name not in recipe_names()]


def asked(name: str) -> Asked:
    """What is asked of a recipe; of one that the suite does not know, nothing."""
    return RECIPES.get(name, Asked(64))


def speed_recipe(name: str, toy: bool, overrides: list[str]) -> Recipe:
    """A recipe at its own size, or shrunk to a toy."""
    return load_recipe(name, (_shrunk(name, _SMALL, _SMALL_QWEN, 32) if toy else []) + overrides)


def parity_recipe(name: str, toy: bool, overrides: list[str]) -> Recipe:
    """The architecture of a recipe, small enough to compare step by step; no warm-up, constant rate."""
    sizes = _shrunk(name, _SMALL, _SMALL_QWEN, 32) if toy else _shrunk(name, _MIDDLE, _MIDDLE_QWEN, 256)
    training = ["schedule.name=constant", "schedule.warmup_steps=0", "optim.lr=1e-3", "optim.kernel=torch"]
    return load_recipe(name, sizes + training + overrides)


def samples_per_step(name: str, toy: bool) -> int:
    return 4 if toy else asked(name).samples_per_step


def first_micro_batch(toy: bool, sequence_length: int) -> int:
    """Where doubling begins: 16,384 tokens, enough to fill a large GPU's products."""
    return 1 if toy else max(1, 16_384 // sequence_length)


def _shrunk(name: str, sizes: dict[str, int], qwen: dict[str, int], length: int) -> list[str]:
    chosen = sizes | (qwen if name == "zh-1b" else {})
    return [f"model.config.{key}={value}" for key, value in chosen.items()] + [f"data.sequence_length={length}"]
