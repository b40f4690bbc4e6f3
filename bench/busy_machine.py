"""Training and prediction of the sample on the CPU, idle and beside other work, with settings of OpenMP side by side.

    python -m bench.busy_machine --cores 0 1 as-it-is OMP_WAIT_POLICY=ACTIVE OMP_NUM_THREADS=1

Each setting is variables for the steps, joined by commas; `as-it-is` gives none, as a user's shell does. The other work
is `--loops` busy loops on the same cores. Of a machine with other load the ratios tell more than the figures.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(environment: dict[str, str], module: str, *arguments: object) -> str:
    """What a step prints, on stdout and stderr."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{module} ended with {done.returncode}: {done.stderr}")
    return done.stdout + done.stderr


def measure(setting: str, steps: int, rows: int) -> tuple[float, float]:
    """Tokens per second of training, of the second half of the steps, and rows per second of prediction."""
    own = {} if setting == "as-it-is" else dict(pair.split("=", 1) for pair in setting.split(","))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **own}
    with tempfile.TemporaryDirectory() as folder:
        printed = run(
            environment, "train", "--model_id", "models/tiny", "--dataset", "dataset/train.jsonl", "--output_dir",
            folder, "--per_device_train_batch_size", 4, "--lora_dropout", 0, "--max_steps", steps, "--logging_steps",
            steps // 2, "--save_strategy", "no",
        )  # fmt: skip
        trained = Path(re.search(r"Adapter saved in (.+)", printed)[1])
        logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        rates = [entry["tokens_per_second"] for entry in logged if "tokens_per_second" in entry]
        answers = Path(folder) / "answers.jsonl"
        printed = run(
            environment, "predict", "dataset/test.jsonl", trained, "-o", answers, "--limit", rows,
            "--max_new_tokens", 16,
        )  # fmt: skip
    rate = re.search(rf"row {rows}/{rows}.* ([\d.e+]+) rows/s", printed)
    return rates[-1], float(rate[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=["as-it-is"])
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="cores to run on")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1], help="busy loops to run beside the steps")
    parser.add_argument("--steps", type=int, default=40, help="steps of training")
    parser.add_argument("--rows", type=int, default=40, help="rows to answer")
    args = parser.parse_args()
    os.sched_setaffinity(0, args.cores)

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
