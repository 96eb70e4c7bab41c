#!/usr/bin/env bash
# Ten minutes that show what this machine does: bash launch/check_node.sh [--gpus N] [--out FILE.md]
# Ceilings (matrix products, exchange between GPUs), ZeRO 0, 1, 3 beside fp32, a killed rank and the resume, the time of a
# save, tokens per second beside `megatron-steel plan`: one report to paste, and rows for docs/proven.md. Without a GPU:
# two ranks and toy sizes. Needs 40 GB where it is started (without a GPU 1 GB), and gives them back.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$home/.venv/bin:$PATH"
exec python "$home/tools/check_node.py" "$@"
