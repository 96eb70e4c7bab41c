"""What the framework costs a step: our pretrain loop beside a raw DeepSpeed loop and HF Trainer + DeepSpeed.

    python tools/benchmarks/cpu/step_overhead.py --ranks 1 --out docs/benchmarks/cpu/step_overhead_1
    python tools/benchmarks/cpu/step_overhead.py --ranks 2 --out docs/benchmarks/cpu/step_overhead_2

The three run the same model, engine configuration and micro-batches (`one_run.py`), each in fresh processes, alternating. The
first steps warm up. CPU time is rank 0's, all threads: on a machine that others use too it is the truer of the two.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]

import toy_data  # noqa: E402

from cpu.pairs import Measured, alternate, median, ratio_text, table, write  # noqa: E402

WORDS, LENGTH, WARM_UP = 4096, 128, 5
# zh-1b's architecture, small enough that the loop's share of a step is far larger than in any real run.
RECIPE = {
    "tokenizer": {"path": ""},
    "model": {"type": "qwen3", "config": {
        "vocab_size": WORDS, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "tie_word_embeddings": True,
    }},
    "data": {"train": "", "sequence_length": LENGTH},
    "optim": {"lr": 1e-3, "kernel": "torch"},
    "schedule": {"name": "constant"},
    "train": {"steps": 1, "global_batch_size": 16, "micro_batch_size": 4, "precision": "bf16", "log_every_steps": 10,
              "save_every_steps": 1_000_000},
    "deepspeed": {"config": "zero1.json"},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=35, help=f"of which {WARM_UP} warm up")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--sharding", default="zero1.json")
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json and STEM.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_file(Path(folder), options.sharding)
        ways = {
            way: lambda way=way: one(way, recipe, Path(folder), options.steps, options.ranks)
            for way in ("ours", "raw", "trainer")
        }
        found = alternate(ways, options.rounds)
    setting = {"ranks": options.ranks, "steps": options.steps, "warm_up": WARM_UP, "recipe": RECIPE,
               "sharding": options.sharding}  # fmt: skip
    write(options.out, "step_overhead", setting, found, report(found))


def report(found: dict[str, list[Measured]]) -> str:
    names = {"ours": "megatron_steel", "raw": "raw DeepSpeed loop", "trainer": "HF Trainer + DeepSpeed"}
    rows = []
    for way, name in names.items():
        times = [f"{1000 * median(found[way], key):.1f}" for key in ("wall", "cpu")]
        over = [ratio_text(found[way], found["raw"], key) for key in ("wall", "cpu")]
        rows.append([name, *times, *over])
    return table(["loop", "ms a step", "CPU ms a step", "wall / raw", "CPU / raw"], rows)


def one(way: str, recipe: Path, folder: Path, steps: int, ranks: int) -> Measured:
    """Seconds a step, wall and CPU: the median over the steps after the warm-up."""
    marks = run(way, recipe, folder / f"{way}.json", steps, ranks)["marks"]
    pairs = list(zip(marks[WARM_UP - 1 :], marks[WARM_UP:], strict=False))
    # CPU time of all of them, since a garbage collection or a log line falls on one step in ten.
    cpu = (marks[-1][2] - marks[WARM_UP - 1][2]) / len(pairs)
    return {"wall": statistics.median(b[1] - a[1] for a, b in pairs), "cpu": cpu}


def run(way: str, recipe: Path, out: Path, steps: int, ranks: int) -> dict:
    """What `one_run.py` noted. Raises RuntimeError with the end of what it said."""
    command = [str(HERE / "one_run.py"), way, str(recipe), str(out), str(time.time()), str(steps)]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    start = [sys.executable] if ranks == 1 else [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port())]
    done = subprocess.run([*start, *command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    shutil.rmtree(out.with_suffix(".run"), ignore_errors=True)
    if done.returncode or not out.is_file():
        raise RuntimeError(f"{way} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def recipe_file(folder: Path, sharding: str) -> Path:
    """The recipe with its tokenizer and data, as a YAML file in `folder`."""
    import yaml

    tokenizer = toy_data.write_tokenizer(folder / "tokenizer", WORDS)
    data = toy_data.write_data(folder / "data" / "train", 400_000, WORDS)
    tree = RECIPE | {"tokenizer": {"path": str(tokenizer)}, "data": {"train": str(data), "sequence_length": LENGTH},
                     "deepspeed": {"config": sharding}}  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
