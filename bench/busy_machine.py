"""Training and prediction of the sample on the CPU, idle and beside other work, with settings of OpenMP side by side.

    python -m bench.busy_machine as-it-is OMP_WAIT_POLICY=ACTIVE OMP_NUM_THREADS=1 --cores 0 1

Each setting is variables for the steps, joined by commas; `as-it-is` gives none, as a user's shell does. The other work
is `--loops` busy loops on the same cores. Of a machine with other load the ratios tell more than the figures.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import steps


def measure(setting: str, steps_of_training: int, rows: int) -> tuple[float, float]:
    """Tokens per second of training, of the second half of the steps, and rows per second of prediction."""
    own = {} if setting == "as-it-is" else dict(pair.split("=", 1) for pair in setting.split(","))
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **own}
    with tempfile.TemporaryDirectory() as folder:
        trained = run(
            environment, "train", "--model_id", "models/tiny", "--dataset", "dataset/train.jsonl", "--output_dir",
            folder, "--per_device_train_batch_size", 4, "--lora_dropout", 0, "--max_steps", steps_of_training,
            "--logging_steps", steps_of_training // 2, "--save_strategy", "no",
        )  # fmt: skip
        model, answers = steps.run_folder(trained), Path(folder) / "answers.jsonl"
        answered = run(
            environment, "predict", "dataset/test.jsonl", model, "-o", answers, "--limit", rows, "--max_new_tokens", 16
        )
        rate = steps.said(answered, rf"predicting: row {rows}/{rows}.*, ([\d.e+]+) rows/s")
        return steps.tokens_per_second(model), float(rate)


def run(environment: dict[str, str], module: str, *arguments) -> list[str]:
    """A step's lines; ends the bench if it fails."""
    step = steps.run(module, *arguments, environment=environment, shown=False)
    return step.lines if not step.code else sys.exit(f"{module} ended with {step.code}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=["as-it-is"])
    parser.add_argument("--cores", type=int, nargs="+", help="cores to run on (default: all)")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1], help="busy loops to run beside the steps")
    parser.add_argument("--steps", type=int, default=40, help="steps of training")
    parser.add_argument("--rows", type=int, default=40, help="rows to answer")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.cores:
        os.sched_setaffinity(0, args.cores)
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_"))]:
        del os.environ[name]

    for loops in args.loops:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
        try:
            for setting in args.settings:
                trained, answered = measure(setting, args.steps, args.rows)
                print(f"{loops} busy loops: {trained:8,.0f} tokens/s {answered:6.2f} rows/s  {setting}", flush=True)
        finally:
            for other in others:
                other.kill()


if __name__ == "__main__":
    main()
