"""A run that is killed again and again ends with the adapter of one that never was."""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from typing import Any

import pytest

from mistral_ft.training.checkpoints import fault, newest_first
from tests.conftest import TINY, read_rows

TRAIN = (
    "--per_device_train_batch_size", 1, "--max_steps", 40, "--save_steps", 1, "--save_total_limit", 3,
    "--lora_dropout", 0.1, "--learning_rate", "2e-3",
)  # fmt: skip


def train_in_a_process(arguments: list, log: str) -> None:
    """What a process of its own does: train, its output added to a file."""
    with contextlib.suppress(BaseException), open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["train.py", *map(str, arguments)]
        import train
        from mistral_ft.cli import run_step

        try:
            run_step(train.main)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)
    os._exit(99)


def server_of_forks() -> Any:
    """Makes processes with torch imported already: otherwise most kills would hit that.

    Not forks of this one, whose other tests have used torch's threads, which no fork inherits.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mistral_ft.training.trainer", "mistral_ft.training.preflight", __name__])
    return context


# Here checkpoints of best steps come and go beside those that are due.
EVALUATE = (
    "--save_steps", 7, "--eval_steps", 3, "--eval_generate", 2, "--load_best_model_at_end", True, "--eval_dataset",
)  # fmt: skip


def evaluations(run) -> list[dict]:
    return [line for line in read_rows(run / "metrics.jsonl") if "eval_loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(("more", "most_kills"), [((), 25), (EVALUATE, 12)])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(pages, train_tiny, tmp_path, more, most_kills):
    data, output = pages / "train.jsonl", tmp_path / "killed"
    more = (*TRAIN, *more, data) if more else TRAIN
    train_tiny(data, *TRAIN[:2], "--max_steps", 1)  # what is slow the first time
    started = time.monotonic()
    whole_run = train_tiny(data, *more)
    expected = (whole_run / "adapter_model.safetensors").read_bytes()
    seconds = time.monotonic() - started
    arguments = ["--model_id", TINY, "--dataset", data, "--output_dir", output, *more]
    arguments += ["--resume_from_checkpoint", "auto"]
    rng, kills, finished, steps = random.Random(11), 0, 0, set()
    forks, log = server_of_forks(), tmp_path / "log.txt"
    while kills < most_kills or not finished:
        process = forks.Process(target=train_in_a_process, args=(arguments, str(log)))
        process.start()
        if kills < most_kills:
            time.sleep(rng.uniform(0.1, 0.5) * seconds)
            with contextlib.suppress(ProcessLookupError):  # it has finished before
                os.kill(process.pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        process.join()
        code = process.exitcode
        runs = list(output.iterdir()) if output.exists() else []
        whole = [checkpoint for run in runs for checkpoint in newest_first(run)]
        assert [checkpoint for checkpoint in whole if fault(checkpoint)] == []
        steps.add(max((int(checkpoint.name.split("-")[1]) for checkpoint in whole), default=0))
        if code == 0:
            adapters = [path.read_bytes() for path in output.glob("*/adapter_model.safetensors")]
            assert adapters == [expected]
            assert evaluations(runs[0]) == evaluations(whole_run)
            finished += 1
            os.rename(output, tmp_path / f"finished-{finished}")
        else:
            assert code in (-signal.SIGKILL, -signal.SIGTERM, 130)
            kills += 1
    text = log.read_text()
    assert "Traceback" not in text
    assert "passed over" not in text  # a checkpoint has its name when it is whole
    assert len(steps) > 5  # the moments were not all the same
    print(f"{kills} kills after {sorted(steps)} steps, {finished} runs finished, all with the same adapter")
