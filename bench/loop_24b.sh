#!/usr/bin/env bash
# The steps themselves at full size, on one GPU limited to what an 80 GB card has: random weights, 64 pages.
#     bench/loop_24b.sh WORK_FOLDER [TEKKEN_FILE]      (needs 50 GB of disk)
set -euo pipefail
cd "$(dirname "$0")/.."
work=$1
python3 -m bench.random_24b "$work/24b" ${2:+--tekken "$2"}
python3 -m bench.make_pages "$work/pages" --count 64
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
time python3 -m train --model_id "$work/24b" --dataset "$work/pages/pages.jsonl" --output_dir "$work/output" \
    --gpu_memory_gib 78.5 --max_steps 32 --learning_rate 1e-4 --tf32 True --save_strategy no --dataloader_num_workers 4
time python3 -m predict "$work/pages/pages.jsonl" "$work"/output/* -o "$work/predictions.jsonl" \
    --gpu_memory_gib 78.5 --max_new_tokens 20
