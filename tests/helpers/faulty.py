"""Runs train with a fault in one process: python -m tests.helpers.faulty FAULT RANK STEP arguments of train…

FAULT: `error` a user's mistake, `bug` an exception, `hang` no more answer, `kill` as `kill -9` does, `term` SIGTERM.
It happens in the process of that RANK at its training step number STEP, from 1; `evaluation` is SIGTERM at its batch
number STEP of evaluations.
"""

import os
import signal
import sys
import time

from mistral_ft.cli import run_step
from mistral_ft.errors import UserError
from mistral_ft.training import trainer as training


def happen(fault: str) -> None:
    if fault == "error":
        raise UserError("page 7 is gone")
    if fault == "bug":
        raise KeyError("a bug")
    if fault == "hang":
        time.sleep(1000)
    os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGTERM)


def main() -> None:
    fault, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    method = "compute_loss" if fault == "evaluation" else "training_step"
    original, calls = getattr(training.FinetuneTrainer, method), [0]

    def faulty(self, *args, **kwargs):
        calls[0] += fault != "evaluation" or not self.model.training
        if calls[0] == step and int(os.environ.get("RANK", 0)) == rank:
            happen(fault)
        return original(self, *args, **kwargs)

    setattr(training.FinetuneTrainer, method, faulty)
    import train

    sys.argv = ["train.py", *sys.argv[4:]]
    run_step(train.main)


if __name__ == "__main__":
    main()
