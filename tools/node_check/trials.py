"""What is tried on this machine, one after another; a trial that fails says why and the others go on."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_steel.node import free_port
from megatron_steel.supervise import ranks_options
from megatron_steel.train.state import versions

from . import runs

STAGES = ("zero0.json", "zero1.json", "zero3.json")
KILL_AT = 14
REAL = "zh-1b"  # whose speed is measured, at its own size on GPUs
# The real recipe at a size for two cores.
_TOY = ("model.config.vocab_size=512", "model.config.hidden_size=64", "model.config.num_hidden_layers=2",
        "model.config.intermediate_size=128", "model.config.head_dim=16", "model.config.num_attention_heads=4",
        "model.config.num_key_value_heads=2", "data.sequence_length=64")  # fmt: skip
Results = dict[str, Any]


def run_all(folder: Path, ranks: int | None) -> Results:
    """Every trial, in `folder`, on so many ranks: one per GPU where it is None, or two without one."""
    machine = _machine()
    ranks = ranks or len(machine["gpus"]) or 2
    gpu = bool(machine["gpus"])
    results: Results = {"machine": machine, "ranks": ranks, "began": time.time()}

    def trial(name: str, action: Callable[[], Any]) -> None:
        begin = time.monotonic()
        print(f"{name} ...", flush=True)
        try:
            results[name] = action()
        except Exception as error:  # one trial must not cost the others
            results[name] = {"failed": f"{type(error).__name__}: {error}"[-600:]}
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)

    trial("ceilings", lambda: _ceilings(folder, ranks))
    # For a step of the real recipe 64 samples a rank; twice what the runs read, since some of it is cut away.
    runs.prepare(folder, tokens=2 * (14 * 64 * 2048 * ranks if gpu else 40 * 8 * 64 * ranks))
    small = str(runs.recipe(folder, ranks, gpu))
    done: dict[str, runs.Run] = {}
    trial("stages", lambda: _stages(folder, ranks, small, done))
    trial("kill", lambda: _kill(folder, ranks, small, done))
    words = _real_words(ranks, machine["gpu_gib"]) if gpu else [*_TOY, f"train.global_batch_size={8 * ranks}"]
    trial("speed", lambda: _speed(folder, ranks, gpu, words))
    trial("plan", lambda: _plan(folder, machine, ranks, words))
    results["seconds"] = time.time() - results["began"]
    return results


def _ceilings(folder: Path, ranks: int) -> dict[str, Any]:
    out = folder / "ceilings.json"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *ranks_options(ranks), "--master_port", free_port(),
               str(Path(__file__).with_name("ceilings.py")), str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if not out.is_file():
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-400:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def _stages(folder: Path, ranks: int, small: str, done: dict[str, runs.Run]) -> list[dict[str, Any]]:
    """bf16 at each stage beside fp32 at stage 0: the largest difference of a step's loss."""
    settings = [("fp32", "zero0.json"), *(("bf16", stage) for stage in STAGES)]
    for precision, stage in settings:
        name = f"{precision}-{stage.removesuffix('.json')}"
        words = (f"train.precision={precision}", f"deepspeed.config={stage}", "train.save_every_steps=100")
        done[name] = runs.train(folder, name, ranks, small, *words)
    expected = done["fp32-zero0"].rows
    return [
        {"name": name, "code": run.code, "steps": len(run.rows), "milliseconds": _times(run.median("seconds_step"), 1000),
         "loss": [run.rows[s]["loss"] for s in sorted(run.rows)][-1:], "said": "" if run.code == 0 else run.said[-400:],
         "from_fp32": _largest_difference(run.rows, expected)}
        for name, run in done.items()
    ]  # fmt: skip


def _kill(folder: Path, ranks: int, small: str, done: dict[str, runs.Run]) -> dict[str, Any]:
    """The last rank is killed in mid-run; the supervisor starts again, and the run must end like the one nobody disturbed."""
    words = ("train.precision=bf16", "deepspeed.config=zero3.json")
    killed = runs.train(folder, "killed", ranks, small, *words, kill_at=KILL_AT)
    straight = done["bf16-zero3"].rows
    return {"code": killed.code, "resumed_after": killed.resumed_after, "steps": len(killed.rows),
            "difference": _largest_difference(killed.rows, straight), "said": "" if killed.code == 0 else killed.said[-400:]}  # fmt: skip


def _real_words(ranks: int, gib: float) -> list[str]:
    """The real recipe's settings on GPUs of so much memory: 64 samples a rank and step, as eight GPUs have in its own run."""
    micro = 8 if gib > 70 else 2 if gib > 38 else 1
    stage = "zero3.json" if gib < 38 and ranks > 1 else "zero1.json"
    return [f"train.global_batch_size={64 * ranks}", f"train.micro_batch_size={micro}", f"deepspeed.config={stage}",
            f"train.activation_checkpointing={str(gib < 38).lower()}"]  # fmt: skip


def _speed(folder: Path, ranks: int, gpu: bool, words: list[str]) -> dict[str, Any]:
    """Tokens per second and a save of the recipe at its own size (without a GPU: a toy of it)."""
    short = ["train.tokens=null", "train.steps=14", "train.log_every_steps=1", "train.save_every_steps=8",
             "schedule.name=constant", "schedule.warmup_steps=2", f"tokenizer.path={folder}/tokenizer",
             f"data.train={folder}/data", "data.validation=null"]  # fmt: skip
    run = runs.train(folder, "speed", ranks, REAL, *words, *short)
    saves = [row["seconds_save"] for row in run.rows.values() if row.get("seconds_save")]
    manifests = sorted((folder / "speed" / "checkpoints").glob("step-*/manifest.json"))
    entries = json.loads(manifests[-1].read_text(encoding="utf-8"))["files"].values() if manifests else []
    return {"code": run.code, "said": "" if run.code == 0 else run.said[-400:], "toy": not gpu, "settings": words,
            "tokens_per_second": run.median("tokens_per_second"), "share_of_peak": run.median("share_of_peak"),
            "memory_gib": run.median("memory_gib"), "save_seconds": saves[0] if saves else None,
            "save_bytes": sum(entry["size"] for entry in entries)}  # fmt: skip


def _plan(folder: Path, machine: dict[str, Any], ranks: int, words: list[str]) -> dict[str, Any]:
    """What `megatron-steel plan` says of the same recipe and settings on these GPUs."""
    if not machine["gpus"]:
        return {"not run": "no GPU here"}
    gpus, out = f"{ranks}x{_plan_name(machine['gpus'][0], machine['gpu_gib'])}", folder / "plan.json"
    command = ["megatron-steel", "plan", REAL, "--gpus", gpus, *words]
    asked = [sys.executable, "-m", "megatron_steel.cli", *command[1:], "--json", str(out)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300, cwd=runs.ROOT)
    if done.returncode != 0:
        return {"not run": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
    as_it_is = json.loads(out.read_text(encoding="utf-8")).get("recipe_as_it_is") or {}
    return {"command": " ".join(command), "tokens_per_second": as_it_is.get("tokens_per_second")}


def _plan_name(device: str, gib: float) -> str:
    """A device as `plan` calls it: `NVIDIA A100-SXM4-80GB` is A100-80G."""
    family = re.search(r"(A100|A800|H100|H800|H200|L40S|V100|RTX \d{4})", device)
    name = family[1].replace(" ", "-") if family else device.removeprefix("NVIDIA ").replace(" ", "-")
    return f"{name}-{'80' if gib > 60 else '40'}G" if name == "A100" else name


def _machine() -> dict[str, Any]:
    """Hardware and versions; no names of hosts, users or folders. Asked in a process that ends, and holds no device."""
    code = ("import json, torch; n = torch.cuda.device_count(); p = [torch.cuda.get_device_properties(i) for i in range(n)];"
            "print(json.dumps([[d.name for d in p], p[0].total_memory / 2**30 if p else 0, torch.version.cuda]))")  # fmt: skip
    gpus, gib, cuda = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=runs.ROOT)
    return {
        "gpus": gpus, "gpu_gib": gib, "cuda": cuda, "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(), "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "versions": versions(), "commit": commit.stdout.strip() or "no checkout",
    }  # fmt: skip


def _largest_difference(rows: dict[int, dict[str, Any]], expected: dict[int, dict[str, Any]]) -> float | None:
    """Of the losses of all steps; None where a step lacks."""
    if not rows or rows.keys() != expected.keys():
        return None
    return max(abs(rows[step]["loss"] - expected[step]["loss"]) for step in rows)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
