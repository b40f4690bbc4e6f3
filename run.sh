#!/usr/bin/env bash
# The recipe: train an adapter, answer the test set with it and with the base, score, and say how to merge and how to
# review. Edit the settings and run it again.
. "$(dirname "$0")/setup.sh"

case $#:${1:-} in
0:) ;;
*:-h | *:--help)
    cat <<'END'
usage: [NAME=VALUE …] ./run.sh

Trains an adapter, answers the test set with it and with the untrained base, scores both, and prints the commands that
merge the adapter and show its answers. Makes .venv and installs the pinned packages on first use.

What the environment sets (files: relative to this folder):
  train_file   records to learn (default: dataset/train.jsonl)
  test_file    records to answer and score (default: dataset/test.jsonl)
  base         the model to train, such as base=models/tiny ./run.sh (default: chosen by the GPU's memory)
  PYTHON       the Python that makes .venv, 3.10 to 3.14 (default: python3)

All other settings stand in run.sh, one per line: edit them there. python -m train --help explains them.
END
    exit
    ;;
*) stop "run.sh takes no arguments but got: $* (see ./run.sh --help)" ;;
esac

set_up .installed requirements.txt
. .venv/bin/activate

# All GPUs that are visible, each with a copy of the base (CUDA_VISIBLE_DEVICES=0 for one): an optimizer step then learns
# from that many times more records. The base is the 24B, or the embedded one where there is no GPU; a card that is too
# small or that torch cannot use ends it here. To choose: base=models/tiny ./run.sh
found=$(python -m mistral_ft.model.gpus "${base:-}")
read -r gpus base <<< "$found"

# The task: the titles of letters. The sample holds another, number, date and total of invoices as JSON:
#     train_file=dataset/train-invoices.jsonl test_file=dataset/test-invoices.jsonl ./run.sh
train_file=${train_file:-dataset/train.jsonl}
test_file=${test_file:-dataset/test.jsonl}

if [ "$base" != models/tiny ]; then

# ---- Settings for Mistral-Small-3.1-24B on a card of 80 GB -----------------------------------------------------------
settings=(
    --model_id "$base"
    --dataset "$train_file"
    --output_dir output
    --lora_rank 16
    --lora_alpha 32
    --lora_dropout 0.05
    --vision_lora False
    --train_projector False
    --num_train_epochs 3
    --gradient_accumulation_steps 1
    --learning_rate 1e-4
    --lr_scheduler_type cosine
    --warmup_steps 0.03
    --weight_decay 0.1
    --adam_beta2 0.95
    --seed 42
    --max_seq_length 32768
    --logging_steps 1
    --save_strategy steps
    --save_steps 1000
    --save_total_limit 5
)
# ----------------------------------------------------------------------------------------------------------------------

else
[ "$gpus" -gt 0 ] || export CUDA_VISIBLE_DEVICES=

# ---- Settings for the embedded base ----------------------------------------------------------------------------------
settings=(
    --model_id "$base"
    --dataset "$train_file"
    --output_dir output
    --lora_rank 16
    --lora_alpha 32
    --lora_dropout 0
    --num_train_epochs 2
    --per_device_train_batch_size 4
    --learning_rate 3e-3
    --lr_scheduler_type cosine
    --warmup_steps 0.03
    --weight_decay 0.1
    --adam_beta2 0.95
    --seed 42
    --save_strategy no
)
# ----------------------------------------------------------------------------------------------------------------------

fi

step() {
    if [ "$gpus" -gt 1 ]; then torchrun --standalone --nproc_per_node "$gpus" -m "$@"; else python -m "$@"; fi
}

# Fewer holes between pages of different sizes.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

echo "== Train"
run=$(step train "${settings[@]}" | tee >(cat >&2) | sed -n 's/^Adapter saved in //p')
name=$(basename "$run")

echo "== Predict the test set"
step predict "$test_file" "$run"

echo "== Predict it with the untrained base"
step predict "$test_file" "$base" -o base.jsonl

echo "== Score: the base"
python -m score base.jsonl | sed -n 1p

echo "== Score: trained, against the base"
python -m score "$name.jsonl" --compare base.jsonl -e errors.jsonl --report report.html

echo "== Merge for production"
echo "python -m merge_lora_weights $name merged/$name"

echo "== Review the answers in the browser"
echo "python -m server $name.jsonl -i $(dirname "$test_file") --compare base.jsonl"
