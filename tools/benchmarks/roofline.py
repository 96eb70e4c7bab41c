"""What a training step costs on a device, piece by piece, from counts and a few rates. A model, not a measurement.

Seconds per token of one GPU, added up (nothing overlaps):

    products      6 x multiplied weights, at the share of the nominal peak that a large bf16 product reaches
    attention     half of 12 L N d T (causal), at a share of the peak
    elementwise   norms, residuals, rotary positions and the activation: each tensor read and written once where fused
    head          the logits' way through memory between the head's three products
    accumulation  every micro-batch adds the gradients of all weights to fp32 sums
    optimizer     36 bytes a weight and step: fp32 weight and two moments read and written, gradient, bf16 weight

Shapes are read from a configuration; nothing is run.
"""

from dataclasses import dataclass

from megatron_steel.model.flops import flops_per_token, parameters


@dataclass(frozen=True)
class Device:
    name: str
    peak: float
    """Nominal dense bf16 FLOP/s."""
    bandwidth: float
    """Nominal bytes/s."""
    gib: float
    attention: tuple[float, float]
    """Share of the peak that causal attention reaches, forward and backward together: low, high."""


@dataclass(frozen=True)
class Shape:
    """What of a model the roofline needs."""

    name: str
    hw: float
    """FLOPs per token, attention without a mask."""
    attention: float
    """The part of `hw` that is attention."""
    head: float
    """The part of `hw` that is the language-model head."""
    weights: int
    layers: int
    hidden: int
    inner: int
    """Width of the FFN that every token passes; 0 where none does."""
    heads_width: int
    """Query and key values that are rotated, per token and layer."""
    words: int


@dataclass(frozen=True)
class Way:
    """How it is computed."""

    name: str
    elementwise: float
    """Passes through memory, as a multiple of the fused ones."""
    logit_bytes: float
    """Bytes that move per logit."""
    micro_tokens: int
    fast_attention: bool


# 789.9 TFLOP/s and 4.3 TB/s were measured on an H200 of 989.5 and 4.8: taken for every device.
PRODUCT_SHARE, COPY_SHARE = 790 / 989.5, 4.3 / 4.8
OPTIMIZER_BYTES, ACCUMULATION_BYTES = 36, 10
# 2.5: eager norms work in fp32 and in five kernels (0.6 and 1.5 us a token for Steel in facts that were estimates too).
# Logits: product 2, softmax statistics 2, slope 4, two products 4; in eager torch each of ten kernels reads or writes fp32.
FUSED = Way("everything fused", 1.0, 12, 32_768, True)
EAGER = Way("nothing fused", 2.5, 50, 16_384, False)


def shape_of(name: str, config: object, length: int) -> Shape:
    """A configuration's shape, with this project's FLOPs per token. Raises ValueError where they are not known."""
    flops = flops_per_token(config, length)  # type: ignore[arg-type]
    if flops is None:
        raise ValueError(f"the FLOPs of {name} are not known")
    get = lambda key, other=0: getattr(config, key, None) or other  # noqa: E731
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    head_dim = get("head_dim", hidden // heads)
    inner = get("intermediate_size", get("n_inner", 4 * hidden))
    if get("FFN_type", "") in ("softmoe_v2", "softmoe_v3"):
        inner = 0
    rotated = (heads + get("num_key_value_heads", heads)) * head_dim
    return Shape(name, flops.hw, 2 * (flops.hw - flops.causal), flops.head, parameters(config).total, get("num_hidden_layers"),
                 hidden, inner, rotated, get("vocab_size"))  # type: ignore[arg-type]  # fmt: skip


def pieces(
    shape: Shape, device: Device, way: Way, tokens_per_step: int, checkpointing: bool = False
) -> dict[str, float]:
    """Microseconds per token of each piece; with activation checkpointing the layers' forward pass is done twice."""
    again = 4 / 3 if checkpointing else 1.0
    memory = COPY_SHARE * device.bandwidth
    low, high = device.attention
    # Forward: two norms (read, write), two residual sums (two read, one written), rotation, and the activation of a gated
    # FFN (two read, one written). Backward: twice as much.
    values = 2 * 2 * shape.hidden + 2 * 3 * shape.hidden + 2 * shape.heads_width + 3 * shape.inner
    seconds = {
        "products": ((shape.hw - shape.attention - shape.head) * again + shape.head) / (PRODUCT_SHARE * device.peak),
        "attention": again * shape.attention / 2 / ((high if way.fast_attention else low) * device.peak),
        "elementwise": again * way.elementwise * 3 * 2 * shape.layers * values / memory,
        "head": way.logit_bytes * shape.words / memory,
        "accumulation": ACCUMULATION_BYTES * shape.weights / memory / way.micro_tokens,
        "optimizer": OPTIMIZER_BYTES * shape.weights / memory / tokens_per_step,
    }
    return {name: 1e6 * value for name, value in seconds.items()}


def tokens_per_second(
    shape: Shape, device: Device, way: Way, tokens_per_step: int, checkpointing: bool = False
) -> float:
    return 1e6 / sum(pieces(shape, device, way, tokens_per_step, checkpointing).values())


def share_of_peak(shape: Shape, device: Device, rate: float) -> float:
    """The `hw` share of a rate in tokens/s."""
    return rate * shape.hw / device.peak
