"""What a whole checkpoint costs beside DeepSpeed's own save made durable: blocking seconds and bytes.

    deepspeed --num_gpus 2 tools/benchmarks/checkpoint_cost.py [--pairs 7] [--sharding zero3.json] [--json FILE]

Both save the same engine (a Steel model in fp32 with AdamW's moments) onto the same disk, in turn, each first in every
second pair: `plain` is `engine.save_checkpoint` and then an fsync by every rank of what it wrote and of the folders;
`ours` is `train.state.save`: written aside, synced, hashed, manifest, rename, old ones renamed out of sight (a thread
deletes them). Before each the disk is idle (deleted, synced). A time runs from when all ranks are ready until the last
one is done, which is what training waits for.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_steel import dist
from megatron_steel.checkpoint import commit
from megatron_steel.recipe import load_recipe
from megatron_steel.train import engine as engines
from megatron_steel.train import loop, state

FIELDS = {"FFN_type": "raw", "mlp_div_ratio": 1, "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 17,
          "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--sharding", default="zero3.json")
    parser.add_argument("--folder", type=Path, help="where to save; the disk that is measured")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    device = dist.start()
    dist.set_up_logging()
    engine, names, parameters = build(asked.sharding, device)
    made = tempfile.mkdtemp(dir=asked.folder, prefix="checkpoint-cost-") if dist.is_main() else ""
    folder = Path(dist.gather(made)[0])
    try:
        result = measure(engine, names, folder, asked.pairs)
    finally:
        state.wait_until_tidy()
        dist.barrier()
        if dist.is_main():
            shutil.rmtree(folder)
    if dist.is_main():
        result = {
            "parameters": parameters, "ranks": dist.world_size(), "sharding": asked.sharding,
            "device": str(device), "cpus": os.cpu_count(), "machine": platform.machine(),
            "date": datetime.date.today().isoformat(), "versions": state.versions(), **result,
        }  # fmt: skip
        if asked.json:
            asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({k: v for k, v in result.items() if k not in ("versions", "pairs")}, indent=1), flush=True)


def build(sharding: str, device: Any) -> tuple[Any, list[list[str]], int]:
    """An engine that has made one step, so that the optimizer has its state."""
    import torch

    from megatron_steel.model import build as models

    config = ["model.config.{}={}".format(*item) for item in FIELDS.items()]
    recipe = load_recipe("tiny", [*config, "train.precision=fp32", f"train.global_batch_size={dist.world_size()}",
                                  "train.micro_batch_size=1"])  # fmt: skip
    model = models.build_model(models.build_config(recipe.model, FIELDS["vocab_size"]), seed=1)
    model = models.prepare_for_training(model, False)
    groups = models.decay_groups(model, 0.1, "matrices")
    by_id = {id(p): name for name, p in model.named_parameters()}
    names = [[by_id[id(p)] for p in group["params"]] for group in groups]
    parameters = sum(p.numel() for p in model.parameters())
    config = engines.engine_config(recipe, engines.read_config(sharding), dist.world_size())
    engine = engines.start_engine(model, groups, recipe.optim, config, device)
    ids = torch.arange(32, device=engine.device)[None] + 3
    engine.backward(engine(input_ids=ids, labels=ids))
    loop.apply_step(engine, 1.0)
    return engine, names, parameters


def measure(engine: Any, names: list[list[str]], folder: Path, pairs: int) -> dict[str, Any]:
    saves = {
        "plain": lambda step: plain(engine, folder / "plain" / f"step-{step}"),
        "ours": lambda step: state.save(
            engine, folder / "ours", state.Progress(step, 0, {}), {"parameters": 1}, names, 2
        ),
    }
    rows = []
    for pair in range(pairs + 1):
        row = {}
        for name in sorted(saves, reverse=bool(pair % 2)):
            state.wait_until_tidy()
            if dist.is_main():
                shutil.rmtree(folder / "plain", ignore_errors=True)
            os.sync()
            dist.barrier()
            began = time.perf_counter()
            saves[name](pair)
            dist.barrier()
            row[name] = round(time.perf_counter() - began, 3)
            if name == "plain":
                row["plain_bytes"] = size_of(folder / "plain")
        row["ours_bytes"] = size_of(commit.published(folder / "ours")[-1])
        dist.barrier()
        dist.log.info("%s", row)
        rows.append(row)
    rows = rows[1:]  # the first also imports
    medians = {name: statistics.median(row[name] for row in rows) for name in saves}
    return {
        "seconds": medians,
        "ratio_of_medians": round(medians["ours"] / medians["plain"], 3),
        "median_ratio_of_pairs": round(statistics.median(row["ours"] / row["plain"] for row in rows), 3),
        "bytes": {name: rows[-1][f"{name}_bytes"] for name in saves},
        "pairs": rows,
    }


def plain(engine: Any, folder: Path) -> None:
    """DeepSpeed's save, on the disk for certain when it returns."""
    engine.save_checkpoint(str(folder), tag=commit.ENGINE, client_state={}, save_latest=False)
    for file in sorted((folder / commit.ENGINE).iterdir()):
        if f"pp_rank_{dist.rank()}_" in file.name or (dist.is_main() and "pp_rank_" not in file.name):
            commit.sync(file)
    dist.barrier()
    if dist.is_main():
        for path in (folder / "zero_to_fp32.py", folder / commit.ENGINE, folder, folder.parent):
            commit.sync(path)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
