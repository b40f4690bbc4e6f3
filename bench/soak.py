"""Train and predict over and over in one process, and watch what grows: memory and open files.

    python -m bench.soak --minutes 30

models/tiny on the sample's pages, on the CPU. After each round it prints the resident memory, the open file handles and
the threads. It fails if, after the first rounds, handles or threads grow, or memory grows by more than 2 % and 20 MiB
from the first half of the rounds to the second.
"""

import argparse
import contextlib
import gc
import io
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import predict
import train
from bench import steps
from mistral_ft.cli import run_step

WARM_UP = 3  # rounds in which libraries set themselves up


def run(step, *arguments) -> str:
    """Call a step as its command line would; what it prints on stdout."""
    sys.argv = [f"{step.__name__}.py", *map(str, arguments)]
    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))  # as a step's own can be set up
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            run_step(step.main)
    except SystemExit as end:
        if end.code:
            sys.exit(f"{step.__name__} ended with {end.code}: {text(errors)}")
    return text(output)


def text(stream: io.TextIOWrapper) -> str:
    """What was written."""
    stream.flush()
    return stream.buffer.getvalue().decode()


def resident_mib() -> float:
    """Memory of this process in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=6, help="of training in a round")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    data, base = steps.ROOT / "dataset", steps.ROOT / "models/tiny"
    end = time.monotonic() + 60 * args.minutes
    memory, handles, threads = [], [], []
    while not memory or time.monotonic() < end:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            trained = run(
                train, "--model_id", base, "--dataset", data / "train.jsonl", "--output_dir", folder,
                "--max_steps", args.steps, "--save_steps", 2, "--save_total_limit", 1, "--learning_rate", "2e-3",
            )  # fmt: skip
            run(
                predict, data / "test.jsonl", steps.run_folder(trained.splitlines()), "--limit", 8,
                "--max_new_tokens", 24, "-o", Path(folder) / "answers.jsonl",
            )  # fmt: skip
        gc.collect()
        memory.append(resident_mib())
        handles.append(len(os.listdir("/proc/self/fd")))
        threads.append(threading.active_count())
        print(
            f"round {len(memory)}: {memory[-1]:.1f} MiB, {handles[-1]} handles, {threads[-1]} threads, "
            f"{time.monotonic() - started:.1f} s",
            flush=True,
        )

    judge(memory[WARM_UP:], handles[WARM_UP:], threads[WARM_UP:])


def judge(memory: list[float], handles: list[int], threads: list[int]) -> None:
    """Say whether something grows in these rounds; ends the bench if so, or if they are too few."""
    if len(memory) < 4:
        sys.exit("too few rounds to tell; give it more --minutes")
    half = len(memory) // 2
    before, after = statistics.median(memory[:half]), statistics.median(memory[half:])
    print(f"{len(memory)} rounds after {WARM_UP}: memory {before:.1f} → {after:.1f} MiB (medians of the halves), "
          f"handles {min(handles)} to {max(handles)}, threads {min(threads)} to {max(threads)}")  # fmt: skip
    if handles[-1] > handles[0] or threads[-1] > threads[0] or after - before > max(20, 0.02 * before):
        sys.exit("it grows")
    print("flat")


if __name__ == "__main__":
    main()
