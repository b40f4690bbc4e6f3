"""A run that is killed again and again ends with the adapter of one that never was."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mistral_ft.training.checkpoints import fault, newest_first
from tests.conftest import ROOT, TINY, read_rows

# Checkpoints of best steps come and go beside those that are due.
TRAIN = (
    "--model_id", TINY, "--per_device_train_batch_size", 1, "--max_steps", 40, "--save_steps", 2,
    "--save_total_limit", 3, "--lora_dropout", 0.1, "--learning_rate", "2e-3", "--eval_steps", 3, "--eval_generate", 2,
    "--load_best_model_at_end", True,
)  # fmt: skip
MOST_KILLS = 8
MOST_SECONDS = 300  # of one process


def start(output: Path, *arguments) -> tuple[subprocess.Popen, float]:
    """Begin to train; returns once the run has its folder, and when that was."""
    log = output.with_suffix(".log")
    before = log.read_text().count("Run folder") if log.exists() else 0
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "train", "--output_dir", output, *map(str, arguments)],
            cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=file, stderr=file,
        )  # fmt: skip
    limit = time.monotonic() + MOST_SECONDS
    while log.read_text().count("Run folder") == before and process.poll() is None:  # or it was over already
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.02)
    return process, time.monotonic()


def evaluations(run: Path) -> list[dict]:
    return [line for line in read_rows(run / "metrics.jsonl") if "eval_loss" in line]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(pages, tmp_path):
    data = pages / "train.jsonl"
    arguments = ("--dataset", data, "--eval_dataset", data, *TRAIN)
    process, begun = start(tmp_path / "whole", *arguments)
    assert process.wait(MOST_SECONDS) == 0
    seconds = time.monotonic() - begun
    (whole_run,) = (tmp_path / "whole").iterdir()
    expected = (whole_run / "adapter_model.safetensors").read_bytes()

    output, rng, kills, finished, steps = tmp_path / "killed", random.Random(11), 0, 0, set()
    while kills < MOST_KILLS or not finished:
        process, _ = start(output, *arguments, "--resume_from_checkpoint", "auto")
        if kills < MOST_KILLS:
            time.sleep(rng.uniform(0, 0.5) * seconds)
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        code = process.wait(MOST_SECONDS)
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
    text = output.with_suffix(".log").read_text()
    assert "Traceback" not in text
    assert "passed over" not in text  # a checkpoint has its name when it is whole
    assert len(steps) > MOST_KILLS // 3  # the moments were not all the same
    print(f"{kills} kills after {sorted(steps)} steps, {finished} runs finished, all with the same adapter")
