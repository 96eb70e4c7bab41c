"""From the command to the end of the first step: ours beside a script around HF Trainer + DeepSpeed, same model, same tokens.

    python tools/benchmarks/cpu/start_up.py --out docs/benchmarks/cpu/start_up

Ours checks data, tokenizer and recipe, takes the run folder, audits the model for causality and opens TensorBoard before step 1;
the script does none of that. Interpreter start and imports are in both figures. Files are in the page cache after round one,
which warms up and is not counted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]

from cpu import step_overhead  # noqa: E402
from cpu.pairs import Measured, alternate, median, ratio_text, table, write  # noqa: E402

DEEPSPEED = {
    "zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "zero_allow_untested_optimizer": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json and STEM.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = step_overhead.recipe_file(folder, "zero1.json")
        script_files(folder)
        ways = {"ours": lambda: ours(recipe, folder), "trainer": lambda: trainer(folder)}
        found = {way: rows[1:] for way, rows in alternate(ways, options.rounds + 1).items()}
    write(options.out, "start_up", {"recipe": step_overhead.RECIPE, "ranks": 1}, found, report(found))


def report(found: dict[str, list[Measured]]) -> str:
    names = {"ours": "megatron_steel", "trainer": "HF Trainer + DeepSpeed"}
    rows = [
        [names[way], f"{median(found[way], 'first_step'):.2f}", ratio_text(found[way], found["trainer"], "first_step")]
        for way in names
    ]
    return table(["what", "seconds to the end of step 1", "of HF Trainer's"], rows)


def ours(recipe: Path, folder: Path) -> Measured:
    return _first_step(step_overhead.run("ours", recipe, folder / "ours.json", 1, 1))


def trainer(folder: Path) -> Measured:
    out = folder / "trainer.json"
    command = [sys.executable, str(HERE / "trainer_script.py"), str(folder / "script"), str(out), str(time.time()), "1"]
    # What a launcher would set; ours needs none for one rank.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone |= {"MASTER_PORT": str(step_overhead.free_port()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | alone)
    shutil.rmtree(out.with_suffix(".run"), ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"the script ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found = json.loads(out.read_text(encoding="utf-8"))
    return _first_step({"began": found["began"], "marks": [[mark] for mark in found["marks"]]})


def _first_step(found: dict) -> Measured:
    return {"first_step": found["marks"][0][0] - found["began"]}


def script_files(folder: Path) -> None:
    """What the script reads: the same configuration, tokens and sharding."""
    from transformers import AutoConfig

    model = step_overhead.RECIPE["model"]
    AutoConfig.for_model(model["type"], **model["config"]).save_pretrained(folder / "script")
    shutil.copyfile(folder / "data" / "train.bin", folder / "script" / "tokens.bin")
    (folder / "script" / "deepspeed.json").write_text(json.dumps(DEEPSPEED), encoding="utf-8")


if __name__ == "__main__":
    main()
