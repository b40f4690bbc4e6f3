"""Say what a training run is doing, or how it ended.

    python -m train_status <name>

<name> is a run in output/, or a path. Prints one line; with --json what status.json holds, its state `dead` if the
run's process is no more. The exit code is 0 while it runs and when it is done, 1 if it failed, was stopped, or is dead,
2 if there is no such run: train leaves none that failed without a checkpoint. With --wait it returns when the run ends.
"""

import argparse
import json
import time
from pathlib import Path

from tqdm import tqdm

from mistral_ft.cli import ArgumentParser, run_step
from mistral_ft.errors import UserError
from mistral_ft.files import JsonObject
from mistral_ft.folders import locate
from mistral_ft.html import visible
from mistral_ft.status import RUNNING, STATUS_FILE, read_status


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train_status", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="a run in output/, or the path of its folder")
    parser.add_argument("--json", action="store_true", help="print the status as JSON")
    parser.add_argument("--wait", action="store_true", help="wait until the run has ended")
    return parser.parse_args()


def describe(status: JsonObject) -> str:
    """A status as one line."""
    parts = [status["state"]]
    if "step" in status:
        parts.append(f"step {status['step']}/{status['steps']}")
    parts += [f"{name.replace('_', ' ')} {status[name]:.4f}" for name in ("loss", "eval_loss") if name in status]
    if "tokens_per_second" in status:
        parts.append(f"{status['tokens_per_second']:,.0f} tokens/s")
    if status["state"] in RUNNING and "seconds_left" in status:
        parts.append(f"{tqdm.format_interval(status['seconds_left'])} left")
    if "error" in status:
        parts.append(status["error"])
    text = ", ".join([*parts, f"updated {status['updated']}"])
    return visible(text, len(text))


def main() -> int:
    args = parse_arguments()
    folder = locate(args.run)
    status = read_status(folder)
    while args.wait and status["state"] in RUNNING:
        time.sleep(1)
        status = read_status(folder)
    try:
        print(json.dumps(status, allow_nan=False) if args.json else describe(status))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise UserError(f"{Path(folder, STATUS_FILE)}: broken: what should be a number is none") from None
    return 0 if status["state"] in (*RUNNING, "done") else 1


if __name__ == "__main__":
    run_step(main)
