#!/usr/bin/env bash
# Make data-juicer's own environment, beside .venv's packages: bash launch/clean_environment.sh [FOLDER]
set -euo pipefail
case ${1:-} in "" | /*) ;; *) set -- "$PWD/$1" ;; esac # relative to where the caller stands
cd "$(dirname "$0")/.."

folder=${1:-.venv/clean-venv}
if [ -x "$folder/bin/dj-process" ]; then echo "$folder is there already"; exit 0; fi
python3 -m venv "$folder"
pip=("$folder/bin/pip" --disable-pip-version-check install -q)
# A CPU build of torch, so that no operator brings gigabytes of CUDA (as in launch/install.sh).
if ! "${pip[@]}" 'torch==2.13.0+cpu'; then
  echo "the index in use gave none (its error is above): trying PyTorch's own" >&2
  "${pip[@]}" torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
fi
# Everything the shipped chains import: data-juicer would otherwise install it while it runs.
"${pip[@]}" torch==2.13.0 py-data-juicer==1.6.1 'ray[default]==2.60.0' aiohttp opencc selectolax ftfy \
  simhash-pybind scipy sentencepiece
echo "megatron-steel clean finds it in .venv/clean-venv; elsewhere: --python $folder/bin/python"
