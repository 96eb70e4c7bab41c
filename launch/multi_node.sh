#!/usr/bin/env bash
# Every node of a host file, supervised: bash launch/multi_node.sh HOSTFILE RECIPE [key.path=value ...]
# The host file has one line a node, "hostname slots=GPUS"; ssh (pdsh) must reach each without a password, and the
# project, its environment and the data must lie under the same paths everywhere.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$home/.venv/bin:$PATH"
hostfile=${1:?usage: multi_node.sh HOSTFILE RECIPE [key.path=value ...]}
[ -r "$hostfile" ] || { echo "error: cannot read the host file $hostfile" >&2; exit 78; }
shift
exec megatron-steel launch --hostfile "$hostfile" "$@"
