#!/usr/bin/env bash
# All GPUs of this machine (two ranks without one): bash launch/single_node.sh RECIPE [key.path=value ...]
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$home/.venv/bin:$PATH"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
exec deepspeed --num_gpus "$((gpus > 0 ? gpus : 2))" --module megatron_steel.pretrain "$@"
