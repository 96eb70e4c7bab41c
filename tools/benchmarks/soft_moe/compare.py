"""Soft mixtures beside dense FFNs, trained by the real `pretrain` from one recipe: who predicts better, and whose loss is true?

    python tools/benchmarks/soft_moe/compare.py sweep  --train PREFIX --validation PREFIX --tokenizer DIR --runs DIR
    python tools/benchmarks/soft_moe/compare.py large  (the same arguments)
    python tools/benchmarks/soft_moe/compare.py random --runs DIR

`sweep`: every family at three learning rates (more where the best lies at an edge), then two more seeds at its best.
`large`: the causal candidates and dense at 30 million parameters and the sweep's best rate. `random`: independent
tokens, where no causal model can get below ln V. Every run leaves `result.json` in its folder and is not repeated, so
that the tool can be stopped and started again; `report.py` makes tables and curves of them.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

SMALL_RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (1, 2, 3)
BASE = Path(__file__).with_name("base.yaml")
MIXED = {"mlp_div_ratio": 4}
DENSE = {"FFN_type": "raw", "mlp_div_ratio": 1}
# A family shares its learning rate. Sizes are written for hidden_size 128; `_wider` scales them.
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {**DENSE, "intermediate_size": 192},
    "v1": {"FFN_type": "softmoe_v1", **MIXED},
    "v2": {"FFN_type": "softmoe_v2", **MIXED},
    "v3": {"FFN_type": "softmoe_v3", **MIXED},
    "prefix": {"FFN_type": "softmoe_causal", "causal_slots": "prefix", **MIXED},
    "lagged": {"FFN_type": "softmoe_causal", "causal_slots": "lagged", "mlp_div_ratio": 8, "n_experts": 4},
    "dense, lagged's FLOPs": {**DENSE, "intermediate_size": 0, "like": "lagged"},
    "dense, prefix's FLOPs": {**DENSE, "intermediate_size": 0, "like": "prefix"},
    "dense, v3's FLOPs": {**DENSE, "intermediate_size": 0, "like": "v3"},
    "v3, SwiGLU experts": {"FFN_type": "softmoe_v3", **MIXED, "mlp_type": "raw", "intermediate_size": 172},
}
ASIDE = ("dense, v3's FLOPs", "v3, SwiGLU experts")  # seen for their kind, not for their rank: one seed
FAMILY = {name: name.split(",")[0] for name in VARIANTS}
LARGE = ("dense", "lagged", "prefix", "dense, lagged's FLOPs")
WIDE = {"hidden_size": 512, "num_hidden_layers": 10, "num_attention_heads": 8}
RANDOM = ("dense", "v1", "v2", "v3", "prefix", "lagged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "large", "random"))
    for name in ("train", "validation", "tokenizer"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--runs", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.what == "random":
        for variant in RANDOM:
            random_tokens(variant, arguments.runs)
        return
    data = [f"tokenizer.path={arguments.tokenizer}", f"data.train={arguments.train}"]
    data += [f"data.validation={arguments.validation}"]
    if arguments.what == "sweep":
        sweep(arguments.runs, data)
    else:
        for variant in LARGE:
            large(variant, arguments.runs, data)


def sweep(runs: Path, data: list[str]) -> None:
    best: dict[str, float] = {}
    for family in dict.fromkeys(FAMILY.values()):
        best[family] = best_rate(family, runs, data)
    for seed in SEEDS:
        for variant, family in FAMILY.items():
            if seed == SEEDS[0] or variant not in ASIDE:
                small(variant, best[family], seed, runs, data)


def best_rate(family: str, runs: Path, data: list[str]) -> float:
    """The rate with the lowest honest loss; rates are doubled or halved until the best lies inside."""
    losses = {rate: small(family, rate, SEEDS[0], runs, data)["honest"] for rate in SMALL_RATES}
    while True:
        best = min(losses, key=lambda rate: losses[rate])
        beyond = {min(losses): best / 2, max(losses): best * 2}.get(best)
        if beyond is None:
            return best
        losses[beyond] = small(family, beyond, SEEDS[0], runs, data)["honest"]


def small(variant: str, rate: float, seed: int, runs: Path, data: list[str]) -> dict[str, Any]:
    return train(variant, runs / "small" / slug(variant) / f"{rate:g}-{seed}", rate, seed, {}, data)


def large(variant: str, runs: Path, data: list[str]) -> dict[str, Any]:
    """Wider by four at the same family's rate, scaled down with the width as muP scales Adam's (arXiv 2203.03466)."""
    rate = best_rate(FAMILY[variant], runs, data) / 4
    return train(variant, runs / "large" / slug(variant), rate, SEEDS[0], WIDE, [*data, "train.steps=140"])


def train(variant: str, folder: Path, rate: float, seed: int, sizes: dict, data: list[str]) -> dict[str, Any]:
    """One run of `pretrain` and its honest loss; read from `result.json` where it has been made."""
    from megatron_steel import cli

    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    fields = model_fields(variant, sizes)
    given = [f"model.config.{key}={value}" for key, value in fields.items()]
    began = time.perf_counter()
    code = cli.main(["pretrain", str(BASE), *data, *given, f"run.dir={folder}", f"run.seed={seed}", f"optim.lr={rate}"])
    if code != 0:
        raise SystemExit(f"{folder}: pretrain ended with {code}")
    result = {"variant": variant, "lr": rate, "seed": seed, "fields": fields, **figures(folder, data)}
    result["seconds"] = time.perf_counter() - began
    shutil.rmtree(folder / "checkpoints")
    done.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{variant} lr {rate:g} seed {seed}: honest {result['honest']:.4f}", flush=True)
    return result


def figures(folder: Path, data: list[str]) -> dict[str, Any]:
    """Sizes, and the validation loss as logged (teacher-forced) and as only the prefix allows (honest)."""
    import torch

    from megatron_steel.audit import load_for_audit
    from megatron_steel.audit_figures import losses
    from megatron_steel.data.indexed import IndexedDataset
    from megatron_steel.model.flops import flops_per_token

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    forced = [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
    causal = json.loads((folder / "audit.json").read_text())["causal"]
    model = load_for_audit(folder, trust_code=False)
    flops = flops_per_token(model.config, 256)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": flops.hw if flops else None,
        "teacher_forced": forced,
        "causal": causal,
        "honest": forced,
        "curve": [(row["tokens"], row["validation_loss"]) for row in rows if "validation_loss" in row],
        "training_curve": [(row["tokens"], row["loss"]) for row in rows if "loss" in row],
    }
    if causal:  # then every prefix gives the same loss as the whole sequence, and all of the validation set counts
        return found
    prefix = next(word.split("=")[1] for word in data if word.startswith("data.validation="))
    held_out = IndexedDataset(prefix)
    rows_of_ids = [held_out.read(at * 256, at * 256 + 257).astype("int64") for at in range(64)]
    measured = losses(model, torch.tensor(rows_of_ids), positions=32)
    # The gap is measured at 2,048 positions; the level is that of the whole validation set.
    return {**found, "honest": forced + measured["gap"], "gap_standard_error": measured["gap_standard_error"]}


def model_fields(variant: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The overrides of `model.config` for a variant at a width."""
    fields = {"mlp_type": "senet", **VARIANTS[variant]}
    like = fields.pop("like", None)
    wider = sizes.get("hidden_size", 128) // 128
    if like:
        fields["intermediate_size"] = equal_flops_width(like, sizes)
    else:
        fields["intermediate_size"] = fields.get("intermediate_size", 128) * wider
    return {**sizes, **fields}


def equal_flops_width(like: str, sizes: dict[str, Any]) -> int:
    """Width of a dense FFN whose model takes the FLOPs per token of variant `like`."""
    wanted = flops_of(model_fields(like, sizes))
    width = 4
    while flops_of({**sizes, **DENSE, "intermediate_size": width + 4}) <= wanted:
        width += 4
    return width


def flops_of(fields: dict[str, Any]) -> float:
    import yaml

    from megatron_steel.model.configuration_steel import SteelConfig
    from megatron_steel.model.flops import flops_per_token

    base = yaml.safe_load(BASE.read_text())["model"]["config"]
    found = flops_per_token(SteelConfig(**{**base, **fields}), 256)
    assert found is not None
    return found.hw


def random_tokens(variant: str, runs: Path, steps: int = 1500) -> None:
    """Train on independent uniform tokens (V = T = 32, three layers, SwiGLU experts), where ln V is all there is."""
    import torch

    from megatron_steel.audit_figures import losses
    from megatron_steel.model.configuration_steel import SteelConfig
    from megatron_steel.model.modeling_steel import SteelForCausalLM

    target = runs / "random" / f"{slug(variant)}.json"
    if target.is_file():
        return
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "n_experts": 6}
    sizes |= {"segment_length": 4, "mlp_type": "raw", "max_position_embeddings": 64}
    fields = dict(VARIANTS[variant])
    model = SteelForCausalLM(SteelConfig(**{**sizes, "intermediate_size": 128, **fields}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    curve = []
    for step in range(1, steps + 1):
        ids = torch.randint(32, (64, 32))
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append((step, loss.item()))
    measured = losses(model.eval(), torch.randint(32, (64, 32)), positions=31)
    tail = sum(value for _, value in curve[-100:]) / 100
    result = {
        "variant": variant,
        "ln_vocabulary": math.log(32),
        "last_100_steps": tail,
        **measured,
        "curve": curve[::10],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{variant}: teacher-forced {tail:.3f}, honest {measured['prefix_only']:.3f}", flush=True)


def slug(variant: str) -> str:
    return variant.replace(", ", "-").replace("'s ", "-").replace(" ", "-").lower()


if __name__ == "__main__":
    main()
