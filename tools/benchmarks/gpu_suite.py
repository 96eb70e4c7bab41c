"""What a GPU is to show: every fused piece equals its plain twin, how fast recipes train beside the peers, and why.

    python tools/benchmarks/gpu_suite.py --part correctness
    python tools/benchmarks/gpu_suite.py --part throughput [--recipes NAME ...]
    python tools/benchmarks/gpu_suite.py --part ablation [--recipes NAME ...]
    python tools/benchmarks/gpu_suite.py --part all --toy --out DIR      tiny sizes, also on a CPU: does it run?

Each part takes less than 9 minutes on one GPU and needs no network. What there was no time for is left for the next call
of the same part: call it until it says that nothing is left (exit code 75 until then). Exit code 1 when a check failed.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from gpu import parts, sizes, ways  # noqa: E402
from gpu.store import Store  # noqa: E402

PARTS = ("correctness", "throughput", "ablation")
PART_SECONDS = 520


def main() -> int:
    options = _parser().parse_args()
    if options.child:
        from gpu.child import answer

        return answer(json.loads(options.child))
    if not options.part:
        _parser().error(f"ask for a part: --part {'|'.join(PARTS)}")
    device, driver = gpu()
    if device is None and not options.toy:
        print("error: no GPU here (nvidia-smi finds none)\n  do: use --toy for tiny sizes on a CPU", file=sys.stderr)
        return 78
    store = Store(options.out or default_folder(device), options.toy, driver, options.again)
    left_out = 0
    for part in PARTS if options.part == "all" else (options.part,):
        suite = parts.Suite(store, options.toy, options.seconds, options.largest_micro_batch)
        suite.common = {"build_deepspeed_adam": options.build_deepspeed_adam}
        parts.build_apex(suite, options.apex)  # in every part, so that `optim.kernel: auto` is the same in all
        _run(suite, part, options.recipes)
        left_out += suite.left_out
    store.write()
    print(f"results: {store.out / 'README.md'}")
    failed = any(c["status"] == "fail" for c in store.results["checks"])
    if left_out:
        print(f"{left_out} measurements are left: the same command goes on with them")
    return 1 if failed else 75 if left_out else 0


def _run(suite: parts.Suite, part: str, recipes: list[str] | None) -> None:
    if part == "correctness":
        parts.correctness(suite)
    elif part == "throughput":
        parts.throughput(suite, recipes or list(sizes.TOY_RECIPES if suite.toy else sizes.RECIPES))
    else:
        parts.ablation(suite, recipes or list(sizes.TOY_RECIPES if suite.toy else ways.ABLATION_RECIPES))


def default_folder(device: str | None) -> Path:
    """One folder a kind of device, so that a later call goes on in it."""
    named = re.sub(r"[^a-z0-9]+", "-", (device or "cpu").lower()).strip("-")
    return ROOT / "docs" / "benchmarks" / f"gpu-{named}"


def gpu() -> tuple[str | None, str | None]:
    """Name and driver of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        first = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None, None
    name, _, driver = first.partition(",")
    return name.strip(), driver.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--part", choices=(*PARTS, "all"), help="what to measure")
    add("--recipes", nargs="+", metavar="NAME", help=f"instead of {', '.join(sizes.RECIPES)}")
    add("--toy", action="store_true", help="tiny sizes, also on a CPU; no figure to quote")
    add("--out", type=Path, help="folder (default docs/benchmarks/gpu-DEVICE)")
    add("--seconds", type=float, default=PART_SECONDS, help="of one part")
    add("--again", action="store_true", help="measure also what this code has been measured with")
    add("--largest-micro-batch", type=int, default=64, help="where doubling ends")
    add("--apex", type=Path, metavar="DIR", help="a checkout of NVIDIA's apex: its Adam is built from there")
    add("--build-deepspeed-adam", action="store_true", help="compile DeepSpeed's FusedAdam for its check")
    add("--child", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
