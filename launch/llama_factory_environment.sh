#!/usr/bin/env bash
# Make LLaMA-Factory's own environment: its versions exclude this package's. bash launch/llama_factory_environment.sh [FOLDER]
set -euo pipefail
case ${1:-} in "" | /*) ;; *) set -- "$PWD/$1" ;; esac # relative to where the caller stands
cd "$(dirname "$0")/.."

folder=${1:-.venv/llama-factory-venv}
if "$folder/bin/llamafactory-cli" version >/dev/null 2>&1; then echo "$folder is there already"; exit 0; fi
python3 -m venv "$folder"
pip=("$folder/bin/pip" --disable-pip-version-check install -q)
if nvidia-smi >/dev/null 2>&1; then
  # The newest three that fit each other: torchaudio has no release for a later torch.
  "${pip[@]}" torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0 llamafactory==0.9.5 tensorboard
else
  # A CPU build of torch, so that nothing brings gigabytes of CUDA (as in launch/install.sh).
  if ! "${pip[@]}" 'torch==2.13.0+cpu'; then
    echo "the index in use gave none (its error is above): trying PyTorch's own" >&2
    "${pip[@]}" torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
  fi
  "${pip[@]}" torch==2.13.0 llamafactory==0.9.5 tensorboard
  # Beside it the CUDA builds of these two fail as soon as they are imported. Text needs no torchvision. LLaMA-Factory
  # imports torchaudio, which runs as plain Python where its compiled part is missing.
  "$folder/bin/pip" --disable-pip-version-check uninstall -qy torchvision
  rm -f "$folder"/lib/python3*/site-packages/torchaudio/lib/*.so
fi
"$folder/bin/llamafactory-cli" version
echo "start it with $folder/bin/llamafactory-cli train DIR/llama_factory_sft.yaml; the tests look in .venv/llama-factory-venv"
