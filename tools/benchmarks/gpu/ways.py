"""What is measured: the implementations of a throughput row, and the rows of the ablation. Names and overrides, no code.

An ablation row changes one thing against the recipe as it is (`kernels.*: auto`, `optim.kernel: auto`, the sharding that
`deepspeed.config: auto` chooses); the last row is everything in plain torch.
"""

from dataclasses import dataclass

from gpu import sizes


@dataclass(frozen=True)
class Way:
    """One implementation of a recipe's training step."""

    name: str
    what: str
    peer: str | None = None
    """The peer's name in every row; None: ours."""
    overrides: tuple[str, ...] = ()
    own_process_per_size: bool = False
    """It cannot change its micro-batch once it runs."""


AUTO = Way("ours auto", "our engine, sharding chosen by deepspeed.config: auto")
ZERO0 = Way("ours zero0", "our engine, zero0.json", overrides=("deepspeed.config=zero0.json",))
ZERO3 = Way("ours zero3", "our engine, zero3.json", overrides=("deepspeed.config=zero3.json",))
DENSE = Way("ours dense twin", "ours, an MLP in the mixture's place", overrides=sizes.DENSE_TWIN)
HAND = Way(
    "hand-written",
    "transformers' model, torch.compile of the whole of it, bf16 autocast over fp32 weights, torch's fused AdamW",
    peer="hand-written PyTorch",
)
TRAINER = Way(
    "hf trainer",
    "transformers' Trainer with DeepSpeed, Liger's kernels, torch_compile, adamw_torch_fused",
    peer="HF Trainer + DeepSpeed + Liger + compile",
    own_process_per_size=True,
)
PLAIN = Way("plain loop", "transformers' model in a DeepSpeed loop, eager, torch's AdamW", peer="HF + DeepSpeed loop")
WAYS = {way.name: way for way in (AUTO, ZERO0, ZERO3, DENSE, HAND, TRAINER, PLAIN)}

# (ours, theirs, least ratio of tokens/s)
RATIOS = ((ZERO0, HAND, 0.97), (ZERO3, ZERO0, 0.90), (AUTO, TRAINER, 1.15), (AUTO, PLAIN, 1.50))


def throughput_order(names: list[str]) -> list[tuple[str, Way]]:
    """(recipe, way), the dearest first: every recipe by us, then by one peer after the other."""
    waves: list[tuple[Way, ...]] = [(AUTO,), (TRAINER,), (HAND, ZERO0), (PLAIN,), (ZERO3,)]
    order = [(name, way) for wave in waves for name in names for way in wave]
    if "steel-1b-causal" in names:
        order.insert(len(names), ("steel-1b-causal", DENSE))
    return order


@dataclass(frozen=True)
class Change:
    """One row of the ablation."""

    group: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join(self.overrides) or "as it is"


def _each(group: str, key: str, *values: str) -> list[Change]:
    return [Change(group, (f"{key}={value}",)) for value in values]


_EAGER = "kernels.compile=false"
AS_IT_IS = Change("", ())
PLAIN_TORCH = Change(
    "all",
    ("kernels.head=plain", "kernels.attention=efficient", "kernels.fused=torch", _EAGER, "optim.kernel=torch"),
)
ABLATION = [
    AS_IT_IS,
    Change("compile, norm", (_EAGER, "kernels.fused=torch")),
    *_each("head", "kernels.head", "plain", "chunked", "liger"),
    *_each("attention", "kernels.attention", "flash", "cudnn", "efficient"),
    *_each("optimizer", "optim.kernel", "torch", "apex", "deepspeed"),
    PLAIN_TORCH,
    Change("compile, norm", (_EAGER, "kernels.fused=liger")),
    *_each("stage", "deepspeed.config", "zero0.json", "zero1.json", "zero2.json", "zero3.json"),
    *_each("attention", "kernels.attention", "flash_attention_2", "flash_attention_3", "flex", "math"),
    Change("compile, norm", (_EAGER, "kernels.fused=apex")),
    Change("memory", ("train.activation_checkpointing=true",)),
]
ABLATION_RECIPES = ("zh-1b", "steel-1b")
TOY_ABLATION = [AS_IT_IS, *_each("head", "kernels.head", "plain"), *_each("stage", "deepspeed.config", "zero3.json")]

# Every fused piece that the correctness part compares with its plain twin.
PIECES = {
    "kernels.head": ("plain", "chunked", "liger"),
    "kernels.attention": ("math", "efficient", "flash", "cudnn", "flash_attention_2", "flash_attention_3", "flex"),
    "kernels.fused": ("torch", "liger", "apex"),
    "kernels.compile": ("false", "true"),
}
TOY_PIECES = {"kernels.head": ("plain",), "kernels.attention": ("math",), "kernels.fused": ("liger",)}
