"""Which models the suite measures, at their real size or as toys for a CPU. Knows recipes only."""

from megatron_steel.recipe import Recipe, load_recipe

RECIPES = ("tinyllama-1.1b", "zh-1b", "steel-1b")
TOY_RECIPES = ("zh-1b",)
# One rank's share of the 512 samples a step that zh-1b and steel-1b take on eight GPUs: 131,072 tokens. The optimizer
# so weighs as much as it does in the real run; one micro-batch a step would overstate it eightfold.
SAMPLES_PER_STEP = 64

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


def speed_recipe(name: str, toy: bool, overrides: list[str]) -> Recipe:
    """A recipe at its own size, or shrunk to a toy."""
    return load_recipe(name, (_shrunk(name, _SMALL, _SMALL_QWEN, 32) if toy else []) + overrides)


def parity_recipe(name: str, toy: bool, overrides: list[str]) -> Recipe:
    """The architecture of a recipe, small enough to compare step by step; no warm-up, constant rate."""
    sizes = _shrunk(name, _SMALL, _SMALL_QWEN, 32) if toy else _shrunk(name, _MIDDLE, _MIDDLE_QWEN, 256)
    training = ["schedule.name=constant", "schedule.warmup_steps=0", "optim.lr=1e-3", "optim.kernel=torch"]
    return load_recipe(name, sizes + training + overrides)


def samples_per_step(toy: bool) -> int:
    return 4 if toy else SAMPLES_PER_STEP


def _shrunk(name: str, sizes: dict[str, int], qwen: dict[str, int], length: int) -> list[str]:
    chosen = sizes | (qwen if name == "zh-1b" else {})
    return [f"model.config.{key}={value}" for key, value in chosen.items()] + [f"data.sequence_length={length}"]
