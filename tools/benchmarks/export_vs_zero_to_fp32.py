"""`megatron-steel export` beside the usual way: DeepSpeed's `zero_to_fp32.py`, then `from_pretrained` and `save_pretrained`.

    python tools/benchmarks/export_vs_zero_to_fp32.py [--size 0.5b|small] [--pairs 5] [--tokenizer DIR] [--work DIR] [--json FILE]

Both read the same checkpoint, of a Qwen2 model (0.5b: the sizes of Qwen1.5-0.5B, tied) that the real engine made on two
ranks, ZeRO-3, bf16, after one step; `--work` keeps it. Each way runs in fresh processes, in turn, each first in every
second pair, the checkpoint in the page cache; first both give the same tensors by name, bit for bit.

Times are wall time with start-up, and CPU time of all threads; ours also compares the weights with their sums, and
hashes and syncs what it wrote. Memory is the peak of one process: `rss` counts the pages of mapped files too, which
the kernel drops when others need them; `anonymous` does not (sampled every 10 ms).
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SIZES = {
    "0.5b": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
             "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True},
    "small": {"vocab_size": 16384, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8,
              "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
}  # fmt: skip
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder; ours loads, checks and copies it (default: a tiny one)"
    )
    parser.add_argument("--work", type=Path, help="keep the checkpoint here (12 bytes a parameter)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    arguments = parser.parse_args(words)
    if arguments.make:
        make(json.loads(arguments.make[0]), Path(arguments.make[1]))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        run = (arguments.work or Path(scratch)) / f"run-{arguments.size}"
        if not (run / "checkpoints").is_dir():
            start(arguments, run, Path(scratch))
        result = compare(run, Path(scratch), arguments.pairs)
    result = {"size": arguments.size, "pairs": arguments.pairs, **result, "machine": machine()}
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def start(arguments: argparse.Namespace, run: Path, scratch: Path) -> None:
    """Have the checkpoint made by two ranks."""
    tokenizer = arguments.tokenizer.absolute() if arguments.tokenizer else tiny_tokenizer(run.absolute() / "tokenizer")
    recipe = {
        "run": {"seed": 1}, "tokenizer": {"path": str(tokenizer)},
        "model": {"type": "qwen2", "config": SIZES[arguments.size]},
        "data": {"train": "none", "sequence_length": 16}, "optim": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 1, "precision": "bf16"},
        "deepspeed": {"config": "zero3.json"},
    }  # fmt: skip
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port)]
    subprocess.run([*launcher, __file__, "--make", json.dumps(recipe), str(run)], check=True)


def tiny_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return folder


def make(tree: dict[str, Any], run: Path) -> None:
    """Under the launcher: a model in bf16 from the start, one step, one checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_steel import dist
    from megatron_steel.model import build
    from megatron_steel.recipe import from_dict
    from megatron_steel.train import engine as engines
    from megatron_steel.train import state

    device = dist.start()
    recipe = from_dict(tree)
    torch.manual_seed(1)
    config = AutoConfig.for_model("qwen2", **recipe.model.config)
    model = build.prepare_for_training(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    groups = build.decay_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    group_names = [[names[id(p)] for p in group["params"]] for group in groups]
    settings = engines.engine_config(recipe, engines.read_config(recipe.deepspeed.config), dist.world_size())
    engine = engines.start_engine(model, groups, recipe.optim, settings, device)
    ids = torch.randint(0, config.vocab_size, (1, 17), generator=torch.Generator().manual_seed(dist.rank()))
    engine.backward(engine(input_ids=ids[:, :-1], labels=ids[:, 1:]) / 16)
    for group in engine.optimizer.param_groups:
        group["lr"] = recipe.optim.lr
    engine.step()
    facts = {"recipe": recipe.to_dict(), "parameters": 1}
    state.save(engine, run / "checkpoints", state.Progress(1, 32, {}), facts, group_names, keep_last=2)
    state.wait_until_tidy()
    dist.barrier()


def compare(run: Path, scratch: Path, pairs: int) -> dict[str, Any]:
    (checkpoint,) = (path for path in (run / "checkpoints").iterdir() if path.name.startswith("step-"))
    for file in checkpoint.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass
    (run / "audit.json").write_text(json.dumps({"causal": True, "verdict": "not asked here"}), encoding="utf-8")
    ways = {
        "ours": [[sys.executable, "-m", "megatron_steel.cli", "export", str(run), "OUT"]],
        "usual": [
            [sys.executable, str(checkpoint / "zero_to_fp32.py"), str(checkpoint), "OUT.fp32", "-t", "engine"],
            [sys.executable, "-c", RELOAD, "OUT.fp32", "OUT"],
        ],
    }
    rows: list[dict[str, Any]] = []
    equal = ""
    for pair in range(pairs + 1):  # the first is for equality, and warms everything
        row = {}
        for name in ("ours", "usual") if pair % 2 else ("usual", "ours"):
            out = scratch / f"{name}-{pair}"
            row[name] = timed(
                [[word.replace("OUT", str(out)) for word in command] for command in ways[name]], out, checkpoint
            )
        if pair:
            rows.append(row)
        else:
            equal = same(scratch / "ours-0", scratch / "usual-0")
        for path in scratch.glob(f"*-{pair}*"):
            shutil.rmtree(path)
    medians = {n: {k: statistics.median(row[n][k] for row in rows) for k in rows[0][n]} for n in ways} if rows else {}
    ratios = {k: [row["usual"][k] / row["ours"][k] for row in rows] for k in rows[0]["ours"]} if rows else {}
    return {"equal": equal, "checkpoint_bytes": size_of(checkpoint), "medians": medians, "ratios": ratios, "rows": rows}


def timed(commands: list[list[str]], out: Path, checkpoint: Path) -> dict[str, float]:
    """Seconds of all commands together, and the highest peak of one, in MB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    seconds = cpu = rss = anonymous = 0.0
    for command in commands:
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        peak = {"VmHWM": 0.0, "RssAnon": 0.0}
        watcher = threading.Thread(target=watch, args=(process.pid, peak))
        watcher.start()
        problems = process.stderr.read() if process.stderr else b""
        _, status, usage = os.wait4(process.pid, 0)
        seconds += time.perf_counter() - begin
        cpu += usage.ru_utime + usage.ru_stime
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.join()
        if process.returncode:
            raise SystemExit(f"{command} failed:\n{problems.decode()[-3000:]}")
        rss, anonymous = max(rss, peak["VmHWM"]), max(anonymous, peak["RssAnon"])
        if str(out) + ".fp32" in command:
            write_config(checkpoint, Path(f"{out}.fp32"))
    return {"seconds": seconds, "cpu_seconds": cpu, "rss_mb": rss, "anonymous_mb": anonymous}


def watch(pid: int, peak: dict[str, float]) -> None:
    """Note the highest of these fields until the process ends. (Its `ru_maxrss` would begin with what this one holds.)"""
    status = Path(f"/proc/{pid}/status")
    while True:
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            return
        if "RssAnon" not in fields:
            return  # it has ended
        for name in peak:
            peak[name] = max(peak[name], int(fields[name].split()[0]) / 1024)
        time.sleep(0.01)


def write_config(checkpoint: Path, folder: Path) -> None:
    """`zero_to_fp32.py` writes weights alone; a person copies the model's config.json beside them (not timed)."""
    from transformers import AutoConfig

    fields = json.loads((checkpoint / "manifest.json").read_text())["recipe"]["model"]["config"]
    AutoConfig.for_model("qwen2", **fields, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)


def same(ours: Path, usual: Path) -> str:
    import torch
    from safetensors import safe_open

    found = []
    for folder in (ours, usual):
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened = safe_open(str(file), "pt")
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        found.append(tensors)
    assert set(found[0]) == set(found[1]), set(found[0]) ^ set(found[1])
    for name, tensor in found[0].items():
        other = found[1][name]
        assert tensor.dtype == other.dtype == torch.bfloat16, name
        assert torch.equal(tensor.view(torch.int16), other.view(torch.int16)), name
    return f"{len(found[0])} tensors, {sum(t.numel() for t in found[0].values()):,} numbers in bf16, bit for bit"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def machine() -> dict[str, Any]:
    import torch
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {"date": datetime.date.today().isoformat(), "commit": commit, "cpus": os.cpu_count(),
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = [f"equal: {result['equal']}; checkpoint {result['checkpoint_bytes'] / 1e9:.2f} GB", "",
             "| | ours | zero_to_fp32 + save_pretrained | ratio (range) |", "|---|---|---|---|"]  # fmt: skip
    if not result["rows"]:
        return lines[0]
    for key, unit in (("seconds", "s"), ("cpu_seconds", "s"), ("rss_mb", "MB"), ("anonymous_mb", "MB")):
        ratios = result["ratios"][key]
        ours, usual = (result["medians"][name][key] for name in ("ours", "usual"))
        lines.append(f"| {key} | {ours:,.1f} {unit} | {usual:,.1f} {unit} | "
                     f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
