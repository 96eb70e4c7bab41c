#!/usr/bin/env bash
# Set everything up and run every check: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh test eval sft
# megatron-core is the independent reader and writer of .bin/.idx; beside the environment, for tests only.
if ! [ -d .venv/megatron-core ]; then
  .venv/bin/pip install -q --disable-pip-version-check --no-deps --only-binary=:all: --target .venv/megatron-core \
    'megatron-core==0.16.1' || echo "megatron-core has no wheel here: its parity tests will be skipped"
fi
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
shellcheck launch/*.sh launch/slurm.sbatch .ci/run
pytest -m "not slow" -n 2 --dist loadfile "$@"
