#!/usr/bin/env bash
# Make .venv and install the project into it: bash launch/install.sh [EXTRA ...]
# Safe to run again: it does nothing while pyproject.toml and the extras are the same.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=$(IFS=,; echo "$*")
stamp=".venv/installed-${extras:-plain}"
if [ -e "$stamp" ] && [ "$stamp" -nt pyproject.toml ]; then exit 0; fi

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: python3 is $(python3 --version 2>&1); 3.10 or newer is needed" >&2; exit 78; }
[ -x .venv/bin/pip ] || python3 -m venv .venv || {
  echo "error: python3 cannot make a virtual environment with pip (Debian: install python3-venv)" >&2; exit 78; }
pip=(.venv/bin/pip --disable-pip-version-check)

# torch first. PyPI's Linux wheel carries gigabytes of CUDA; without a GPU take the CPU build: from the package
# index in use if it has one, else from PyTorch's own.
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  echo "installing torch ..."
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    "${pip[@]}" install -q 'torch>=2.10,<2.14'
  else
    "${pip[@]}" install -q 'torch==2.13.0+cpu' 2>/dev/null ||
      "${pip[@]}" install -q 'torch>=2.10,<2.14' --index-url https://download.pytorch.org/whl/cpu
  fi
fi
echo "installing megatron_steel${extras:+ with extras $extras} ..."
# DeepSpeed comes as source: its CUDA operators are not built now, and not at run time unless you ask (optim.kernel).
DS_BUILD_OPS=0 "${pip[@]}" install -q -e ".${extras:+[$extras]}"
touch "$stamp"
