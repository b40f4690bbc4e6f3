#!/usr/bin/env bash
# The steps themselves at full size, on one GPU limited to what an 80 GB card has: random weights, 64 pages.
#     bench/loop_24b.sh WORK_FOLDER [TEKKEN_FILE]      (needs 50 GB of disk)
#     TINY=1 bench/loop_24b.sh WORK_FOLDER             (tries it out on a CPU: a small model, four small pages)
set -euo pipefail
cd "$(dirname "$0")/.."
work=$1
pages=64 steps=32 scale=1 limit="--gpu_memory_gib 78.5" tf32="--tf32 True"
if [ -n "${TINY:-}" ]; then pages=4 steps=2 scale=0.1 limit="" tf32=""; fi
python3 -m bench.random_24b "$work/24b" ${TINY:+--tiny} ${2:+--tekken "$2"}
python3 -m bench.make_pages "$work/pages" --count "$pages" --scale "$scale"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# shellcheck disable=SC2086 # $limit and $tf32 are two words, or none
time python3 -m train --model_id "$work/24b" --dataset "$work/pages/pages.jsonl" --output_dir "$work/output" \
    $limit $tf32 --max_steps "$steps" --learning_rate 1e-4 --save_strategy no --dataloader_num_workers 4
time python3 -m predict "$work/pages/pages.jsonl" "$work"/output/* -o "$work/predictions.jsonl" \
    $limit --max_new_tokens 20
