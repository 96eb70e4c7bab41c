#!/usr/bin/env bash
# All GPUs of this machine (two ranks without one), supervised: started again after a crash, nothing left behind.
#   bash launch/single_node.sh RECIPE [key.path=value ...]
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$home/.venv/bin:$PATH"
exec megatron-steel launch "$@"
