"""Worker processes that are taken away from outside: what is said, what is saved, and that nothing waits for ever."""

import errno
import multiprocessing
import os
import pickle
import signal
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

from mistral_ft.data import dataset as data
from mistral_ft.data import workers
from mistral_ft.data.collators import Batch, PackedDataset
from mistral_ft.data.workers import KILLED, Sending, usable_workers
from mistral_ft.prediction import generator as generation
from mistral_ft.status import read_status
from mistral_ft.training import callbacks
from tests.conftest import TINY, read_rows


def test_a_batch_goes_through_shared_memory_or_a_file(monkeypatch):
    ids, none = torch.arange(6)[None], torch.zeros(0, dtype=torch.int64)
    batch = Batch(ids, ids + 1, ids + 2, none, torch.tensor([0, 6]), 6, 5, torch.ones(8, 588), [(28, 56)])
    send = Sending(lambda examples: batch)
    assert send([]) is batch
    assert not batch.input_ids.is_shared()  # no worker, nothing to send
    monkeypatch.setattr(workers, "get_worker_info", lambda: True)
    assert send([]).input_ids.is_shared()

    def full(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    sent = send([])
    assert os.path.getsize(sent.path) > 0
    got = pickle.loads(ForkingPickler.dumps(sent))
    assert not os.path.exists(sent.path)
    assert list(vars(got)) == list(vars(batch))
    for name, value in vars(batch).items():
        received = getattr(got, name)
        assert torch.equal(received, value) if isinstance(value, torch.Tensor) else received == value


def test_where_shared_memory_is_full_the_same_is_learned(command, run_cli, monkeypatch):
    """With 0 bytes for every batch; in containers it is 64 MB for all."""
    adapters = []
    for is_full in (False, True):
        if is_full:
            monkeypatch.setattr(torch.Tensor, "share_memory_", lambda self: exec("raise RuntimeError('no space')"))
        code, out, err = run_cli(*command)
        assert code == 0, err
        adapters.append(Path(out.split("Adapter saved in ")[1].strip(), "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_without_room_for_semaphores_pages_are_read_in_the_main_process(monkeypatch, capsys, pages, train_tiny):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    flags = ("--max_steps", 3, "--per_device_train_batch_size", 2, "--save_strategy", "no", "--logging_steps", 1)
    expected = train_tiny(pages / "train.jsonl", *flags)
    monkeypatch.setattr(multiprocessing, "Lock", full)
    assert usable_workers(0) == 0
    assert capsys.readouterr().out == ""
    assert usable_workers(2) == 0
    assert capsys.readouterr().out == (
        "Reading pages without worker processes, which have no room in /dev/shm: No space left on device\n"
    )
    prefetching = (
        "--dataloader_num_workers",
        2,
        "--dataloader_prefetch_factor",
        3,
        "--dataloader_persistent_workers",
        1,
    )
    run = train_tiny(pages / "train.jsonl", *flags, *prefetching)
    assert (run / "adapter_model.safetensors").read_bytes() == (expected / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def command(pages, tmp_path):
    return (
        "train", "--model_id", TINY, "--dataset", pages / "train.jsonl", "--output_dir", tmp_path / "output",
        "--learning_rate", "2e-3", "--lora_dropout", 0.1, "--max_steps", 8, "--save_strategy", "no",
        "--dataloader_num_workers", 1,
    )  # fmt: skip


def test_a_worker_killed_in_training(command, run_cli, monkeypatch, tmp_path):
    """The last whole step is saved, and the run that goes on ends as if nothing had been."""
    code, out, err = run_cli(*command)
    assert code == 0, err
    expected = out.split("Adapter saved in ")[1].strip()
    with monkeypatch.context() as patch:

        def kill(self, args, state, control, **kwargs):
            if state.global_step == 2:
                (worker,) = multiprocessing.active_children()
                os.kill(worker.pid, signal.SIGKILL)

        patch.setattr(callbacks.GradientCheck, "on_step_end", kill, raising=False)
        code, out, err = run_cli(*command)
    # Some of the next batches had arrived already.
    run = out.split("Run folder ")[1].splitlines()[0]
    (checkpoint,) = [path.name for path in (tmp_path / run).glob("checkpoint-*")]
    step = int(checkpoint.removeprefix("checkpoint-"))
    assert 2 <= step <= 5
    line = f"{KILLED} step {step} is saved, go on with a smaller --dataloader_num_workers, or 0"
    assert (code, err.splitlines()[-1]) == (2, f"error: {line}")
    assert "Traceback" not in err
    status = read_status(tmp_path / run)
    assert (status["state"], status["error"]) == ("failed", line)

    code, _, err = run_cli(*command[:-1], 0, "--resume_from_checkpoint", tmp_path / run)
    assert code == 0, err
    same = [(tmp_path / run / name).read_bytes() for run in (run, expected) for name in ("adapter_model.safetensors",)]
    assert same[0] == same[1]


def dies_in_a_worker(original):
    def read(self, index):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    return read


def test_a_worker_killed_in_an_evaluation(command, run_cli, monkeypatch, pages):
    from mistral_ft.training import evaluation

    class Dies(PackedDataset):
        __getitem__ = dies_in_a_worker(PackedDataset.__getitem__)

    monkeypatch.setattr(evaluation, "PackedDataset", Dies)
    code, _, err = run_cli(*command, "--eval_dataset", pages / "train.jsonl", "--eval_steps", 3)
    assert (code, err.splitlines()[-1]) == (2, f"error: {KILLED}")
    assert "Traceback" not in err


def test_a_worker_killed_in_a_prediction(run_cli, monkeypatch, pages, tmp_path):
    """Rows that were answered stay, and the same command goes on."""
    command = (
        "predict", pages / "train.jsonl", TINY, "-o", tmp_path / "answers.jsonl", "--max_new_tokens", 4,
        "--batch_size", 2,
    )  # fmt: skip
    partial = tmp_path / "answers.jsonl.partial"
    original, seen = data.RecordDataset.__getitem__, multiprocessing.Value("i", 0)

    def read(self, index):
        seen.value += 1
        if seen.value == 5 and get_worker_info() is not None:
            while not partial.exists() or len(partial.read_text().splitlines()) < 1 + 4:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "page_workers", lambda device: 1)
        patch.setattr(data.RecordDataset, "__getitem__", read)
        code, _, err = run_cli(*command)
    done = "4 of 8 rows are done; the same command continues"
    assert (code, err.splitlines()[-1]) == (2, f"error: {KILLED} {done}")
    assert "Traceback" not in err
    code, _, err = run_cli(*command)
    assert code == 0, err
    assert len(read_rows(tmp_path / "answers.jsonl")) == 8


def test_a_batch_that_cannot_be_sent_is_not_waited_for(command, run_cli, monkeypatch):
    """torch's worker would print a traceback and drop it, and the main process would wait for ever."""

    def collate(self, examples):
        return {"no pickle": lambda: None}

    monkeypatch.setattr(workers.Sending, "__call__", collate)
    code, _, err = run_cli(*command)
    line = f"error: {KILLED} go on with a smaller --dataloader_num_workers, or 0"
    assert (code, err.splitlines()[-1]) == (2, line)
    assert "Traceback" not in err
