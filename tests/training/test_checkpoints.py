"""Checkpoints are whole or not there, the newest sound one is found, and signals save before they end."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess

import pytest
import torch

from mistral_ft.training import checkpoints
from mistral_ft.training import signals as stopping
from mistral_ft.training import trainer as training
from mistral_ft.training.run_folder import Run
from mistral_ft.training.settings import Settings
from tests.conftest import TINY, read_rows, write_jsonl

TRAIN = ("--per_device_train_batch_size", 2, "--save_steps", 2, "--max_steps", 6, "--lora_dropout", 0.1)


@pytest.fixture
def command(pages, tmp_path):
    """Arguments of a run of six steps with checkpoints at 2, 4 and 6."""
    data, output = pages / "train.jsonl", tmp_path / "output"
    return ["--model_id", TINY, "--dataset", data, "--output_dir", output, "--learning_rate", "2e-3", *TRAIN]


@pytest.fixture
def whole(pages, train_tiny):
    """The run, never interrupted."""
    return train_tiny(pages / "train.jsonl", *TRAIN)


def cut(run, *steps):
    """As if the run had died with the checkpoints of these steps only."""
    for path in run.glob("checkpoint-*"):
        if checkpoints.step_of(path) not in steps:
            shutil.rmtree(path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run / name).unlink(missing_ok=True)


def weights(run) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def test_a_manifest_names_every_file(whole):
    checkpoint = whole / "checkpoint-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["step"] == 4
    assert sorted(manifest["files"]) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth",
        "scheduler.pt", "trainer_state.json",
    ]  # fmt: skip
    assert {path.name for path in checkpoint.iterdir()} == {*manifest["files"], "manifest.json"}
    assert checkpoints.fault(checkpoint) is None
    assert not list(whole.glob(".*"))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def garble(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # a single bit
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "spoil", "problem"),
    [
        ("adapter_model.safetensors", truncate, "bytes instead of"),
        ("adapter_model.safetensors", garble, "adapter_model.safetensors is not what was written"),
        ("optimizer.pt", garble, "optimizer.pt is not what was written"),
        ("rng_state.pth", os.unlink, "rng_state.pth is missing"),
        ("trainer_state.json", truncate, "bytes instead of"),
        ("manifest.json", truncate, "manifest.json cannot be read"),
        ("manifest.json", os.unlink, "manifest.json is missing"),
    ],
)
def test_a_spoilt_newest_checkpoint_is_passed_over(whole, name, spoil, problem, capsys):
    spoil(whole / "checkpoint-6" / name)
    assert checkpoints.newest_sound(whole) == whole / "checkpoint-4"
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {whole / 'checkpoint-6'}: passed over, ")
    assert problem in warning


def test_a_run_goes_on_from_the_checkpoint_before_a_spoilt_one(whole, command, run_cli):
    expected = weights(whole)
    cut(whole, 2, 4)
    garble(whole / "checkpoint-4" / "optimizer.pt")
    code, out, err = run_cli("train", *command, "--resume_from_checkpoint", "auto")
    assert code == 0, err
    assert f"Continuing from {whole / 'checkpoint-2'}" in out
    assert f"warning: {whole / 'checkpoint-4'}: passed over, optimizer.pt is not what was written" in err
    assert weights(whole) == expected
    assert checkpoints.fault(whole / "checkpoint-4") is None  # written anew
    code, _, err = run_cli("train", *command, "--resume_from_checkpoint", whole / "checkpoint-9")
    assert code == 2
    assert "checkpoint-9: cannot be continued from, manifest.json is missing" in err


def test_auto_without_a_run_starts_one(command, run_cli, tmp_path):
    code, out, err = run_cli("train", *command, "--resume_from_checkpoint", "auto")
    assert code == 0, err
    assert "Nothing to continue from: a new run" in out
    # With other settings too; and with the same ones it goes on.
    code, out, _ = run_cli("train", *command, "--resume_from_checkpoint", "auto", "--lora_rank", 4)
    assert "Nothing to continue from: a new run" in out
    assert len(list((tmp_path / "output").iterdir())) == 2


def test_auto_leaves_a_run_that_is_over_as_it_is(whole, command, run_cli):
    before = weights(whole)
    code, out, err = run_cli("train", *command, "--resume_from_checkpoint", "auto")
    assert code == 0, err
    assert f"Continuing from {whole / 'checkpoint-6'}" in out
    assert weights(whole) == before
    assert json.loads((whole / "trainer_state.json").read_text())["global_step"] == 6
    assert list(whole.parent.iterdir()) == [whole]


def test_auto_has_nothing_to_do_for_a_run_that_is_over_and_kept_no_checkpoint(pages, command, train_tiny, run_cli):
    run = train_tiny(pages / "train.jsonl", *TRAIN, "--save_strategy", "no")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = (*command, "--save_strategy", "no", "--resume_from_checkpoint", "auto")
    assert run_cli("train", *again) == (0, f"Nothing to do: this run is over\nAdapter saved in {run}\n", "")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert list(run.parent.iterdir()) == [run]
    (run / "adapter_config.json").unlink()  # it was killed before its first checkpoint
    assert "Nothing to continue from: a new run" in run_cli("train", *again)[1]


def test_the_newest_run_is_told_by_numbers_not_by_clocks(whole, command, run_cli):
    second = Run.resume_newest(whole.parent, settings_of(command)).folder
    assert second == whole
    newer = whole.parent / "newer-one"
    shutil.copytree(whole, newer)
    run = json.loads((newer / "run.json").read_text())
    assert run["number"] == 1
    (newer / "run.json").write_text(json.dumps(run | {"number": 2}))
    for age, path in enumerate(
        [newer / "run.json", newer / "checkpoint-6", newer / "checkpoint-4", whole / "run.json"]
    ):
        os.utime(path, (1e9 + age, 1e9 + age))  # clocks that were set back make the newest the oldest
    found = Run.resume_newest(whole.parent, settings_of(command))
    assert found.checkpoint == newer / "checkpoint-6"
    out = run_cli("train", *command, "--lora_rank", 4)[1]
    assert json.loads((whole.parent / out.split("Run folder ")[1].split()[0] / "run.json").read_text())["number"] == 3


def settings_of(command):
    return Settings.parse(list(map(str, command)))


@pytest.mark.parametrize("how", ["auto", "folder"])
def test_data_that_was_edited_meanwhile_is_refused(whole, command, pages, run_cli, how):
    cut(whole, 2)
    data = pages / "train.jsonl"
    write_jsonl(data, [*read_rows(data)[1:], read_rows(data)[0]])
    code, _, err = run_cli("train", *command, "--resume_from_checkpoint", "auto" if how == "auto" else whole)
    assert code == 2
    assert (f"error: {data}: edited since {whole} was stopped; put back what it was" in err) == (how == "auto")
    assert ("cannot be continued with another data; " in err) == (how == "folder")


def test_older_checkpoints_go_when_the_new_one_is_safe(pages, train_tiny, monkeypatch):
    complete, seen = checkpoints._complete, []

    def watch(inner, final, *more):
        before = sorted(path.name for path in final.parent.glob("checkpoint-*"))
        complete(inner, final, *more)
        seen.append((before, checkpoints.fault(final)))

    monkeypatch.setattr(checkpoints, "_complete", watch)
    run = train_tiny(pages / "train.jsonl", *TRAIN, "--save_total_limit", 1)
    assert seen == [([], None), (["checkpoint-2"], None), (["checkpoint-4"], None)]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_disk_that_is_full_during_a_checkpoint(whole, command, run_cli, monkeypatch):
    """No file may grow beyond 2 MB, so that the optimizer's state of step 4 cannot be written."""
    cut(whole, 2)
    writing, limits = checkpoints.writing, resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def on_a_small_disk(run, step, size, *more):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
        return writing(run, step, size, *more)

    monkeypatch.setattr(checkpoints, "writing", on_a_small_disk)
    try:
        code, _, err = run_cli("train", *command, "--resume_from_checkpoint", whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    assert f"error: {whole / 'checkpoint-4'}: cannot be written, the checkpoints before it are kept" in err
    assert f"Continue with --resume_from_checkpoint {whole}" in err
    assert "Traceback" not in err
    assert [path.name for path in whole.glob("checkpoint-*")] == ["checkpoint-2"]
    assert checkpoints.fault(whole / "checkpoint-2") is None
    assert not list(whole.glob(".*"))


def test_a_disk_without_room_is_seen_ahead(command, run_cli, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: usage._replace(free=1_500_000))
    code, _, err = run_cli("train", *command)
    assert code == 2
    assert "checkpoints need 11 MB, but the disk has 1 MB free; make room, or lower --save_total_limit" in err
    assert "training: step" not in err
    assert not any((tmp_path / "output").iterdir())


def test_an_output_folder_that_cannot_be_written(command, run_cli):
    code, _, err = run_cli("train", *command, "--output_dir", "/sys/output")  # not even by root
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: /sys/output: ")


def test_a_disk_that_becomes_read_only(whole, command, run_cli, monkeypatch):
    cut(whole, 2)

    def refuse(source, target):
        raise OSError(errno.EROFS, "Read-only file system", str(source))

    monkeypatch.setattr(checkpoints.os, "replace", refuse)
    code, _, err = run_cli("train", *command, "--resume_from_checkpoint", whole)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith(f"error: {whole}")
    assert "Read-only file system" in err
    assert [path.name for path in whole.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_step(whole, command, run_cli, monkeypatch, number, tmp_path):
    expected = weights(whole)
    shutil.rmtree(whole)
    step, calls = training.FinetuneTrainer.training_step, []

    def signalled_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(training.FinetuneTrainer, "training_step", signalled_step)
    before = signal.getsignal(number)
    code, _, err = run_cli("train", *command, "--save_strategy", "no")
    assert code == 130
    assert f"{number.name}: saving after this step; again ends at once" in err
    assert err.endswith("error: stopped after step 3, which is saved\n")
    assert signal.getsignal(number) == before or number != signal.SIGINT  # run_step sets the others
    (run,) = (tmp_path / "output").iterdir()
    assert f"Continue with --resume_from_checkpoint {run}\n" in err
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]
    code, _, err = run_cli("train", *command, "--save_strategy", "no", "--resume_from_checkpoint", "auto")
    assert code == 0, err
    assert weights(run) == expected


def test_a_signal_to_the_workers_too_saves(command, run_cli, monkeypatch, tmp_path):
    step, calls = training.FinetuneTrainer.training_step, []

    def signalled_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            workers = multiprocessing.active_children()
            assert len(workers) == 1
            # As a scheduler does, which is neither's parent.
            subprocess.run(["kill", "-TERM", str(workers[0].pid), str(os.getpid())], check=True)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(training.FinetuneTrainer, "training_step", signalled_step)
    code, _, err = run_cli("train", *command, "--save_strategy", "no", "--dataloader_num_workers", 1)
    assert code == 130
    assert err.endswith("error: stopped after step 2, which is saved\n")


def test_a_second_signal_ends_at_once(command, run_cli, monkeypatch, tmp_path):
    def impatient_step(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("goes on")

    monkeypatch.setattr(training.FinetuneTrainer, "training_step", impatient_step)
    code, _, err = run_cli("train", *command)
    assert code == 130
    assert err.endswith("error: ended before it could save\n")
    assert not any((tmp_path / "output").iterdir())


def test_a_gpu_without_memory_left_saves_the_last_step(whole, command, run_cli, monkeypatch, tmp_path):
    expected = weights(whole)
    shutil.rmtree(whole)
    loss, calls = training.FinetuneTrainer.compute_loss, []

    def hungry_loss(self, *args, **kwargs):
        calls.append(loss(self, *args, **kwargs))  # it draws dropout first
        if len(calls) == 4:
            raise torch.OutOfMemoryError
        return calls[-1]

    monkeypatch.setattr(training.FinetuneTrainer, "compute_loss", hungry_loss)
    code, _, err = run_cli("train", *command)
    assert code == 2
    assert "error: the GPU's memory is used up: does another program use it too? Lower --gpu_memory_gib" in err
    (run,) = (tmp_path / "output").iterdir()
    assert f"Continue with --resume_from_checkpoint {run}\n" in err
    assert checkpoints.newest_sound(run) == run / "checkpoint-3"
    assert run_cli("train", *command, "--resume_from_checkpoint", "auto")[0] == 0
    assert weights(run) == expected


def test_minutes_save_too(pages, train_tiny, run_cli):
    run = train_tiny(pages / "train.jsonl", "--max_steps", 3, "--save_strategy", "no", "--save_minutes", 1e-9)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    code, _, err = run_cli("train", "--save_minutes", 0)
    assert code == 2
    assert "--save_minutes 0: must be more than 0" in err


def test_the_timer_counts_seconds_that_nobody_sets(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stopping.time, "time", lambda: 1 / 0)  # the clock that jumps is not asked
    timer, never = stopping.Timer(2), stopping.Timer(None)
    now[0] += 119
    assert not timer.due
    now[0] += 1
    assert timer.due
    assert not never.due
    timer.restart()
    assert not timer.due


class Evil:
    def __reduce__(self):
        return os.mkdir, ("opened",)


def test_a_checkpoint_of_a_stranger_runs_no_code(whole, command, run_cli, monkeypatch, tmp_path):
    cut(whole, 4)
    inner = whole / "checkpoint-4"
    (inner / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    (inner / "manifest.json").unlink()
    checkpoints._complete(
        shutil.copytree(inner, tmp_path / "checkpoint-4"), inner, 4, True
    )  # with a manifest that agrees
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli("train", *command, "--resume_from_checkpoint", whole)
    assert code == 2
    assert f"error: {inner}: holds something other than numbers, which is not opened" in err
    assert not (tmp_path / "opened").exists()


def test_tokens_are_written_nowhere(whole, command, run_cli, monkeypatch):
    secret = "hf_" + "S3cret" * 5
    monkeypatch.setenv("HF_TOKEN", secret)
    shutil.rmtree(whole)
    code, out, err = run_cli("train", *command)
    assert code == 0, err
    files = [path for path in whole.parent.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    code, more_out, more_err = run_cli("train", *command, "--hub_token", secret)
    assert code == 2
    assert "--hub_token: a run is uploaded after it was checked" in more_err
    assert secret not in out + err + more_out + more_err


def test_a_model_folder_of_a_stranger_runs_no_code(pages, run_cli, monkeypatch, tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'opened')!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        settings = json.loads((model / name).read_text())
        settings["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor"), "evil.Evil")
        (model / name).write_text(json.dumps(settings))
    code, _, err = run_cli("predict", pages / "train.jsonl", model, "-o", tmp_path / "out.jsonl", "--limit", 1)
    assert code == 0, err
    assert not (tmp_path / "opened").exists()
