#!/usr/bin/env bash
# The whole road on an embedded corpus: bash launch/quickstart.sh
# Writes under runs/ only. Safe to run again: what is done is kept, what is not is done.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH"
run=runs/quickstart data=runs/quickstart-data SECONDS=0
step() { printf '\n=== %s (%d s so far)\n' "$1" "$SECONDS"; }
train() { deepspeed --num_gpus "$ranks" --module megatron_steel.pretrain tiny run.dir="$run" 2>&1 | grep -v '^\[' ; }
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=$((gpus == 1 ? 1 : 2))

if ! [ -e $data/done ]; then
  step "1. a corpus, and a sentencepiece tokenizer trained on it"
  python tools/quickstart_corpus.py $data
  rm -rf $data/tokenizer
  megatron-steel train-tokenizer $data/samples.jsonl $data/python.jsonl --output $data/tokenizer --vocab-size 4096
  step "2. text to Megatron's .bin/.idx"
  megatron-steel tokenize $data/samples.jsonl --tokenizer $data/tokenizer --output $data/samples --validation-ratio 0.05
  megatron-steel tokenize $data/python.jsonl --tokenizer $data/tokenizer --output $data/python --validation-ratio 0.02
  touch $data/done
fi

step "3. pretrain recipe tiny on $ranks ranks with ZeRO-3; stopped in mid-run by SIGTERM to one rank"
if ! grep -qs '"step": 150,' $run/metrics.jsonl; then # else an earlier quickstart has been stopped already
  train & job=$!
  until grep -qs '"step": 150,' $run/metrics.jsonl || ! kill -0 $job 2>/dev/null; do sleep 0.5; done
  if kill -0 $job 2>/dev/null; then kill -TERM "$(cut -d' ' -f1 $run/run.lock)"; fi
  wait $job || [ $? = 75 ] || exit 70
fi
step "4. the same command again: it resumes"
train
step "5. export to Hugging Face, and compare its logits with the trained weights"
export_dir=$(python tools/quickstart_summary.py --export-dir $run)
[ -d "$export_dir" ] || megatron-steel export $run "$export_dir" --dtype float32 --verify
step "6. it writes"
for prompt in "问题：" "以下是一道单项选择题。" "def main("; do
  megatron-steel generate "$export_dir" --prompt "$prompt" --max-new-tokens 60
done
step "done"
python tools/quickstart_summary.py $run
