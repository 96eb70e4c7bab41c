#!/usr/bin/env bash
# Every node of a host file, supervised: bash launch/multi_node.sh HOSTFILE RECIPE [key.path=value ...]
# The host file has one line a node, "HOSTNAME slots=GPUS". ssh must reach each without a password; the project, its
# environment and the run folder must lie under the same paths everywhere (docs/launch.md).
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$home/.venv/bin:$PATH"
if [ $# -lt 2 ]; then echo "usage: multi_node.sh HOSTFILE RECIPE [key.path=value ...]" >&2; exit 78; fi
hostfile=$1
shift
exec megatron-steel launch --hostfile "$hostfile" "$@"
