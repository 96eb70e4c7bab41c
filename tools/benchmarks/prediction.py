"""Write `docs/benchmarks/prediction.md`: what the six recipes are expected to reach, before any GPU has measured them.

    python tools/benchmarks/prediction.py --output docs/benchmarks/prediction.md

The model is `roofline.py`; published rows of other trainers say how much of it real programs get. Needs no GPU, builds nothing.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from cpu.pairs import table  # noqa: E402
from gpu import sizes  # noqa: E402
from roofline import EAGER, FUSED, Device, Shape, pieces, shape_of, share_of_peak, tokens_per_second  # noqa: E402

from megatron_steel.model.build import build_config  # noqa: E402
from megatron_steel.model.flops import parameters  # noqa: E402
from megatron_steel.model.memory import activation_bytes_per_sample, head_bytes  # noqa: E402
from megatron_steel.recipe import Recipe, load_recipe  # noqa: E402

# Peaks and bandwidths: NVIDIA's data sheets. Attention: FlashAttention-2's paper (arXiv 2307.08691) reports 50 to 73 % of the
# peak on an A100 without a causal mask's losses, forward; published H100 forward rates at head dimension 64, causal, 2k tokens
# are 262 (FlashAttention 2), 334 (cuDNN) and 371 (3) TFLOP/s; the backward pass is slower. Taken for both passes together:
_AMPERE, _HOPPER = (0.40, 0.55), (0.25, 0.37)
DEVICES = (
    Device("A100 SXM 80 GB", 312e12, 2.039e12, 80, _AMPERE),
    Device("H100 SXM 80 GB", 989.5e12, 3.35e12, 80, _HOPPER),
    Device("H200 SXM 141 GB", 989.5e12, 4.8e12, 141, _HOPPER),
    Device("RTX 4090 24 GB", 165.2e12, 1.008e12, 24, _AMPERE),
)
_A100_40 = Device("A100 40 GB", 312e12, 1.555e12, 40, _AMPERE)
STATE_BYTES = 18
"""A weight under ZeRO-1 on one card: bf16 weight, fp32 gradient sum, fp32 weight, two moments."""


@dataclass(frozen=True)
class Published:
    """Another trainer's tokens/s of one GPU."""

    source: str
    shape: Shape
    device: Device
    rate: float
    tokens_per_step: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = document()
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


def document() -> str:
    rows = published()
    reached = {name: _reached(rows, name) for name in ("A100", "H100")}
    parts = [
        _OPENING,
        "## How much of the model real programs get\n\n" + _PUBLISHED + _published_table(rows),
        "## H200: what is asked, and what is expected\n\n" + _ASKED + _asked_table(reached["H100"]),
        "## All devices\n\n" + _ALL + _devices_table(reached),
        "## Where the time is expected to go\n\n" + _PIECES + _pieces_table(),
        _RATES,
    ]
    return "\n\n".join(parts) + "\n"


def published() -> list[Published]:
    """Rows whose model can be written down exactly. Tokens of a step: where a source gives none, 131,072 a GPU."""
    from transformers import GPT2Config, LlamaConfig

    wide = LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
                       num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)  # fmt: skip
    llama = shape_of("Llama-3.2-1B's shape", wide, 4096)
    gpt = shape_of("GPT-2 124M", GPT2Config(vocab_size=50304), 1024)
    # MPT's layer is GPT-2's at this count: two norms, four attention matrices, a plain FFN of four times the width.
    mpt_config = GPT2Config(vocab_size=50368, n_embd=2048, n_layer=24, n_head=16, n_positions=2048)
    mpt = shape_of("MPT-1B", mpt_config, 2048)
    tiny = shape_of("TinyLlama 1.1B", build_config(load_recipe("tinyllama-1.1b").model), 2048)
    a100, h100 = DEVICES[0], DEVICES[1]
    return [
        Published("TinyLlama README", tiny, _A100_40, 24_000, 131_072),
        Published("llm-foundry, 8 GPUs", mpt, a100, 20_513, 114_688),
        Published("llm.c #481, 8 GPUs", gpt, a100, 231_000, 65_536),
        Published("llm-foundry, 8 GPUs", mpt, h100, 45_455, 114_688),
        Published("Smol Training Playbook, nanotron, 8 GPUs", llama, h100, 42_000, 131_072),
        Published("llm.c #481 and modded-nanogpt, 8 GPUs", gpt, h100, 468_000, 65_536),
    ]


def _reached(rows: list[Published], family: str) -> tuple[float, float]:
    """Least and largest share of the fused model that the published rows of a family of devices reach."""
    shares = [
        r.rate / tokens_per_second(r.shape, r.device, FUSED, r.tokens_per_step) for r in rows if family in r.device.name
    ]
    return min(shares), max(shares)


def _published_table(rows: list[Published]) -> str:
    cells = []
    for r in rows:
        fused, eager = (tokens_per_second(r.shape, r.device, way, r.tokens_per_step) for way in (FUSED, EAGER))
        share = share_of_peak(r.shape, r.device, r.rate)
        cells.append([r.source, r.shape.name, r.device.name, f"{r.rate:,.0f}", _percent(share), f"{fused:,.0f}",
                      f"{r.rate / fused:.2f}", f"{eager:,.0f}"])  # fmt: skip
    titles = ["source", "model", "device", "published tokens/s", "hw share", "model, everything fused", "published / it",
              "model, nothing fused"]  # fmt: skip
    return table(titles, cells)


def _asked_table(reached: tuple[float, float]) -> str:
    device, cells = DEVICES[2], []
    for name, wanted in sizes.RECIPES.items():
        if sizes.missing_recipes([name]):
            cells.append([name, "", "", "this tree ships no such recipe", "", "not run"])
            continue
        shape, tokens = _recipe(name)
        rate = tokens_per_second(shape, device, FUSED, tokens)
        full = share_of_peak(shape, device, rate)
        floor, aim = (
            ("" if share is None else f"{_percent(share)} ({share * device.peak / shape.hw / 1000:.0f}k)")
            for share in (wanted.floor, wanted.aim)
        )
        if wanted.floor is None:
            floor, aim = f"<= {sizes.CAUSAL_TO_DENSE} x the dense step", "equal"
        expected = " to ".join(f"{share * rate / 1000:.0f}k" for share in reached)
        expected += f" ({_percent(reached[0] * full)} to {_percent(reached[1] * full)})"
        cells.append([name, floor, aim, f"{rate / 1000:.0f}k ({_percent(full)})", expected, "not run"])
    titles = ["recipe", "floor", "aim", "model, everything fused", "**prediction**", "measured"]
    return table(titles, cells)


def _devices_table(reached: dict[str, tuple[float, float]]) -> str:
    cells = []
    for device in DEVICES:
        family = reached["A100" if device.attention == _AMPERE else "H100"]
        for name in sizes.RECIPES:
            if sizes.missing_recipes([name]):
                continue
            shape, tokens = _recipe(name)
            memory, checkpointing = _memory(name, device)
            rate = tokens_per_second(shape, device, FUSED, tokens, checkpointing)
            expected = " to ".join(f"{share * rate:,.0f}" for share in family)
            shares = " to ".join(_percent(share * share_of_peak(shape, device, rate)) for share in family)
            cells.append([device.name, name, f"{rate:,.0f}", expected, shares, memory, "not run"])
    titles = [
        "device",
        "recipe",
        "model, everything fused",
        "**prediction**, tokens/s",
        "hw share",
        "memory, one card",
        "measured",
    ]
    return table(titles, cells)


def _memory(name: str, device: Device) -> tuple[str, bool]:
    """Whether one sample trains on one card under ZeRO-1, in words; and whether only with activation checkpointing."""
    recipe = load_recipe(name)
    config, length = build_config(recipe.model), recipe.data.sequence_length
    for checkpointing in (False, True):
        sample = activation_bytes_per_sample(config, length, "bf16", checkpointing) + head_bytes(config, length)
        need = (STATE_BYTES * parameters(config).total + sample) / 2**30
        if need <= 0.9 * device.gib:
            return ("with activation checkpointing, counted in" if checkpointing else "fits"), checkpointing
    return f"does not fit ({need:.0f} GiB): two cards, or zero3_offload; figures as if it did", False


def _pieces_table() -> str:
    cells = []
    for name in sizes.RECIPES:
        if sizes.missing_recipes([name]):
            continue
        shape, tokens = _recipe(name)
        for way in (FUSED, EAGER):
            parts = pieces(shape, DEVICES[2], way, tokens)
            total = sum(parts.values())
            cells.append([name, way.name, *(f"{value:.2f}" for value in parts.values()), f"{total:.2f}"])
    return table(["recipe", "how", *pieces(*_recipe_on_h200()), "sum"], cells)


def _recipe_on_h200() -> tuple:
    shape, tokens = _recipe("tinyllama-1.1b")
    return shape, DEVICES[2], FUSED, tokens


def _recipe(name: str) -> tuple[Shape, int]:
    """A recipe's shape, and the tokens that one GPU takes of a step."""
    recipe: Recipe = load_recipe(name)
    length = recipe.data.sequence_length
    return shape_of(name, build_config(recipe.model), length), length * sizes.asked(name).samples_per_step


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


_OPENING = """# A prediction, not a measurement

**No figure on this page was measured with this project.** No GPU was at hand; issue and suite ask for an ablation on one, and that
ablation has not run. What stands here is computed by `tools/benchmarks/prediction.py` from counts (`model/flops.py`,
`tools/benchmarks/roofline.py`), published rates of components, and published tokens/s of other trainers. It will be replaced by
the measured ablation (`tools/benchmarks/gpu_suite.py --part ablation`) when a GPU is at hand; every cell under *measured* says
`not run` until then.

The model adds up, per token: matrix products at the share of the peak that a large bf16 product was measured to reach on an H200
(790 of 989.5 TFLOP/s); causal attention; the passes of norms, residuals, rotary positions and activation through memory (4.3 of
4.8 TB/s, measured there too); the logits' way through memory; the gradient sums of each micro-batch; and the optimizer. *Everything
fused* is one pass through memory a tensor, the faster attention and micro-batches of 32,768 tokens; *nothing fused* is eager torch at
16,384. Nothing overlaps, and the host, communication, clipping and the memory allocator cost nothing: what programs reach lies below it, but
for one published row below."""

_PUBLISHED = """The same model beside what others have published (no row is ours, none was run again). Newer cards leave more of it unused: their
memory, host and attention have not grown with their products.

"""
_ASKED = """Shares of 989.5 TFLOP/s in the *hw* convention. The prediction is the fused model times the least and the largest share that the
published H100 rows above reach; an H200 differs from an H100 in its memory alone. **A floor of 50 % lies inside or above these ranges: it
asks for more than most public trainers get out of the same chip**, so it is a goal and not an expectation.

"""
_ALL = """An RTX 4090 is read with the A100's shares for want of published rows; its power limit and its bandwidth make that the weakest guess.

"""
_PIECES = """Microseconds per token on an H200. The largest differences between the two rows of a recipe are what is to be won: the logits of a
vocabulary of 152,000 words, then norms and activations.

"""
_RATES = """## What was assumed

- Products reach 80 % of the nominal peak on every device (measured on the H200 alone), copies 90 % of the nominal bandwidth.
- Attention: 25 to 37 % of the peak on Hopper, 40 to 55 % on Ampere and Ada, forward and backward together; the lower with nothing fused.
- A logit moves 12 bytes where softmax and slope are one pass, 50 in eager torch (ten kernels, most of them in fp32).
- Eager norms and activations pass 2.5 times through memory.
- AdamW moves 36 bytes a weight and step; each micro-batch moves 10 for its gradient sums."""


if __name__ == "__main__":
    main()
