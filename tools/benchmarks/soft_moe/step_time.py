"""Step time of the mixtures at the published width (h 1792, 32 heads, six senet experts of 448), beside a dense FFN.

    python tools/benchmarks/soft_moe/step_time.py layer --output FILE.json
    deepspeed --num_gpus 2 tools/benchmarks/soft_moe/step_time.py zero3 --output FILE.json

`layer`: one decoder layer, forward and backward of 2,048 tokens in fp32. `zero3`: training steps of a model of some
published layers under ZeRO-3 in bf16. "loop" runs the experts one after another and lets ZeRO-3 fetch each on its own,
which is how it was before they were stacked. Rounds alternate their order; figures are medians of rounds, ratios are
medians of ratios within a round.
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_steel import dist
from megatron_steel.model import experts_steel, modeling_steel
from megatron_steel.model.configuration_steel import SteelConfig

SHAPE = {
    "hidden_size": 1792, "intermediate_size": 1792, "mlp_div_ratio": 4, "num_attention_heads": 32, "vocab_size": 1024,
    "mlp_type": "senet", "n_experts": 6, "num_hidden_layers": 1,
}  # fmt: skip
FIELDS = {
    "dense": {"FFN_type": "raw", "intermediate_size": 2688, "mlp_div_ratio": 1},
    "v1": {"FFN_type": "softmoe_v1"},
    "v3": {"FFN_type": "softmoe_v3"},
    "prefix": {"FFN_type": "softmoe_causal"},
    "lagged": {"FFN_type": "softmoe_causal", "causal_slots": "lagged", "mlp_div_ratio": 8, "n_experts": 4},
}
LOOPED = ("v1", "v3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layer", "zero3"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=2, help="published layers of the zero3 model")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per rank and step of the zero3 model")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "layer":
        steps, setting = layer_steps(), {"layers": 1, "tokens": 2048, "precision": "fp32", "threads": 1}
        torch.set_num_threads(1)
    else:
        steps = zero3_steps(arguments.layers, arguments.tokens)
        setting = {"layers": arguments.layers, "tokens": arguments.tokens, "precision": "bf16", "ranks": 2}
    times = {name: [] for name in steps}
    for round_number in range(arguments.rounds + 1):
        for name in list(steps)[:: 1 if round_number % 2 else -1]:
            seconds = steps[name]()
            if round_number:  # the first round warms up
                times[name].append(seconds)
    if dist.is_main():
        report(times, setting, arguments.output)


def report(times: dict[str, list[float]], setting: dict[str, Any], output: Path) -> None:
    rows = {}
    for name, values in times.items():
        rows[name] = {
            "seconds": statistics.median(values),
            "ratio_to_dense": ratio(values, times["dense"]),
        }
        if f"{name} loop" in times:
            rows[name]["ratio_to_loop"] = ratio(values, times[f"{name} loop"])
    found = {**setting, "torch": torch.__version__, "machine": platform.processor() or platform.machine(), "rows": rows}
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def ratio(ours: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


@contextlib.contextmanager
def looped(wanted: bool) -> Iterator[None]:
    """Experts one after another, as before they were stacked."""
    stacked = experts_steel.run_experts

    def one_by_one(experts: Any, x: torch.Tensor) -> torch.Tensor:
        rows = x if x.dim() == 3 else [x] * len(experts)
        return torch.stack([expert(row) for expert, row in zip(experts, rows, strict=True)])

    if wanted:
        experts_steel.run_experts = one_by_one
    yield
    experts_steel.run_experts = stacked


def layer_steps() -> dict[str, Callable[[], float]]:
    x, grad = torch.randn(2, 1, 2048, 1792)
    rotary = modeling_steel.rotary_tables(torch.arange(2048)[None], 56, 1e6)

    def step_of(name: str, loop: bool) -> Callable[[], float]:
        config = SteelConfig(**{**SHAPE, **FIELDS[name]})
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        layer = modeling_steel.SteelDecoderLayer(config, 0).train()
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)

        def step() -> float:
            layer.zero_grad(set_to_none=True)
            own = x.clone().requires_grad_()
            with looped(loop):
                began = time.perf_counter()
                layer(own, rotary).backward(grad)
                return time.perf_counter() - began

        return step

    return all_steps(step_of)


def all_steps(step_of: Callable[[str, bool], Callable[[], float]]) -> dict[str, Callable[[], float]]:
    steps = {name: step_of(name, False) for name in FIELDS}
    return steps | {f"{name} loop": step_of(name, True) for name in LOOPED}


def zero3_steps(layers: int, tokens: int) -> dict[str, Callable[[], float]]:
    from megatron_steel.model import build
    from megatron_steel.recipe import Optim
    from megatron_steel.train import engine as engines

    device = dist.start()
    ids = torch.randint(1024, (1, tokens), generator=torch.Generator().manual_seed(dist.rank())).to(device)
    file = engines.read_config("zero3.json")
    config = {
        **file, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 1 << 60,
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    fetched_whole = engines.fetched_whole

    def step_of(name: str, loop: bool) -> Callable[[], float]:
        torch.manual_seed(0)
        model = modeling_steel.SteelForCausalLM(
            SteelConfig(**{**SHAPE, **FIELDS[name], "num_hidden_layers": layers, "use_cache": False})
        )
        model = build.prepare_for_training(model, False)
        groups = build.decay_groups(model, 0.1, "matrices")
        engines.fetched_whole = (lambda _: []) if loop else fetched_whole
        engine = engines.start_engine(model, groups, Optim(lr=1e-4, kernel="torch"), config, device)

        def step() -> float:
            dist.barrier()
            with looped(loop):
                began = time.perf_counter()
                engine.backward(engine(input_ids=ids, labels=ids) / tokens)
                engine.step()
                dist.barrier()
                return time.perf_counter() - began

        return step

    return all_steps(step_of)


if __name__ == "__main__":
    main()
