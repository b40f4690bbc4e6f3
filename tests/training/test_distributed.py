"""Several processes give what one gives, and none of them is waited for in vain. CPU, gloo."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mistral_ft.data.collators import PackBatches
from tests.conftest import ROOT, TINY, make_pages, read_rows, write_jsonl

TRAIN = ("--model_id", TINY, "--learning_rate", "2e-3", "--lora_dropout", 0)


def together(module: str, *arguments) -> subprocess.CompletedProcess:
    """Run a step in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", module]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip


def losses(run: Path) -> list[float]:
    state = json.loads((run / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def run_folder(output: str) -> Path:
    return Path(output.split("Adapter saved in ")[1].splitlines()[0])


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("packs", "batch_size", "drop_last", "turns"), [(7, 1, False, 4), (7, 2, True, 1), (8, 2, False, 2)]
)
def test_every_pack_has_one_turn(monkeypatch, packs, batch_size, drop_last, turns):
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = PackBatches(packs, batch_size, seed=3)
    alone.epoch = 2
    order = [pack for batch in alone for pack in batch]
    assert sorted(order) == list(range(packs))
    monkeypatch.setenv("WORLD_SIZE", "2")
    by_rank = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        batches = PackBatches(packs, batch_size, seed=3, drop_last=drop_last)
        batches.epoch = 2
        assert len(batches) == turns
        by_rank.append(list(batches))
        assert batches.turns(1, 99) == by_rank[-1][1:]
    assert [len(batches) for batches in by_rank] == [turns, turns]
    dealt = [pack for turn in zip(*by_rank, strict=True) for batch in turn for pack in batch]
    assert dealt == (order[: turns * 2 * batch_size] if drop_last else order)


# Seven records on two processes: in each epoch one of them gets an empty batch at the end.
@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ((), ()),
        pytest.param((), ("--shard_base", True, "--gradient_checkpointing", True), marks=pytest.mark.slow),
        pytest.param(("--pack_length", 40), (), marks=pytest.mark.slow),
        pytest.param(("--pack_length", 40), ("--shard_base", True, "--compile", True), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_what_one_does(pages, train_tiny, tmp_path, layout, more):
    data = write_jsonl(pages / "seven.jsonl", read_rows(pages / "train.jsonl")[1:])
    common = ("--num_train_epochs", 2, "--vision_lora", True, "--save_strategy", "no", *layout)
    one = train_tiny(data, "--gradient_accumulation_steps", 4, *common)
    done = together(
        "train", *TRAIN, "--dataset", data, "--output_dir", tmp_path / "two", "--gradient_accumulation_steps", 2,
        *common, *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = run_folder(done.stdout)
    assert done.stdout.count("Run folder") == done.stdout.count("parameters learn") == 1
    assert len(list((tmp_path / "two").iterdir())) == 1
    assert len(losses(one)) == 4
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    ours, theirs = load_file(one / "adapter_model.safetensors"), load_file(two / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (theirs[name] - tensor).norm() <= 2e-3 * tensor.norm(), name


@pytest.mark.slow
def test_two_processes_answer_what_one_does(pages, run_cli, tmp_path):
    rows = read_rows(pages / "train.jsonl")
    rows[3]["messages"][-1]["content"][1]["image"] = "gone.png"
    data = write_jsonl(pages / "test.jsonl", rows)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    common = (data, TINY, "--batch_size", 3, "--max_new_tokens", 4)
    assert run_cli("predict", *common, "-o", one)[0] == 1
    done = together("predict", *common, "-o", two)
    assert done.returncode == 1  # a row has an error, in both
    assert [line.partition(": image ")[0] for line in errors(done)] == [f"error: {data}:4"]
    assert two.read_bytes() == one.read_bytes()
    assert not Path(f"{two}.partial").exists()


@pytest.mark.slow
def test_two_processes_go_on_with_the_batches_that_are_left(pages, run_cli, tmp_path, monkeypatch):
    from mistral_ft.data import predictions

    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    common = (pages / "train.jsonl", TINY, "--batch_size", 2, "--max_new_tokens", 4)
    assert run_cli("predict", *common, "-o", one)[0] == 0
    add = predictions.Predictions.add

    def stop_after_one(self, batch):
        add(self, batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(predictions.Predictions, "add", stop_after_one)
    assert run_cli("predict", *common, "-o", two)[0] == 130
    done = together("predict", *common, "-o", two)
    assert done.returncode == 0, done.stderr
    assert "Continuing: 2 of 8 rows are done" in done.stderr
    assert two.read_bytes() == one.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(more arguments) -> the adapter of a run of two processes that nothing stopped."""

    @functools.cache
    def train(more: tuple) -> bytes:
        folder = tmp_path_factory.mktemp("whole")
        data = make_pages(folder) / "train.jsonl"
        done = together("train", *FAULTY, *more, "--dataset", data, "--output_dir", folder / "output")
        return (run_folder(done.stdout) / "adapter_model.safetensors").read_bytes()

    return train


FAULTY = (*TRAIN, "--max_steps", 6, "--save_steps", 2, "--ddp_timeout", 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "line", "more"),
    [
        ("error", "error: page 7 is gone", ()),
        ("kill", "error: another process of this run has ended; is it killed, or out of memory?", ()),
        (
            "hang",
            "error: process 1 of 2 (numbered from 0) has kept the others waiting for 10 s; look at its machine and its "
            "GPU, or raise --ddp_timeout",
            (),
        ),
        ("term", "error: stopped after step 4, which is saved", ("--shard_base", True)),
    ],
)
def test_one_process_that_ends_ends_all_with_one_line(pages, tmp_path, whole, fault, line, more):
    output = tmp_path / "output"
    arguments = (*FAULTY, *more, "--dataset", pages / "train.jsonl", "--output_dir", output)
    done = together("tests.helpers.faulty", fault, 1, 4, *arguments)
    assert done.returncode == 1  # torchrun's
    assert errors(done) == [line]
    (run,) = output.iterdir()
    assert f"Continue with --resume_from_checkpoint {run}" in done.stderr
    saved = sorted(path.name for path in run.glob("checkpoint-*"))
    assert saved == ["checkpoint-2", *(["checkpoint-4"] if fault == "term" else [])]
    assert not list(run.glob(".*"))

    # The same command goes on, with the random state of both.
    again = together("train", *arguments, "--resume_from_checkpoint", "auto")
    assert f"Continuing from {run / saved[-1]}" in again.stdout
    assert (run_folder(again.stdout) / "adapter_model.safetensors").read_bytes() == whole(more)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--shard_base", True)])
def test_a_signal_to_one_process_ends_the_evaluation_of_all(pages, tmp_path, more):
    data, output = pages / "train.jsonl", tmp_path / "output"
    arguments = (*TRAIN, "--max_steps", 3, "--eval_steps", 2, "--eval_dataset", data, "--load_best_model_at_end", True)
    arguments = (*arguments, *more, "--dataset", data, "--output_dir", output)
    done = together("tests.helpers.faulty", "evaluation", 1, 2, *arguments)
    assert done.returncode == 1  # torchrun's
    assert errors(done) == ["error: stopped after step 2, which is saved"]
    assert "eval loss" not in done.stdout
    whole = together("train", *arguments[:-1], tmp_path / "whole")
    again = together("train", *arguments, "--resume_from_checkpoint", "auto")
    assert [line for line in again.stdout.splitlines() if "eval loss" in line] == [
        line for line in whole.stdout.splitlines() if "eval loss" in line
    ]
    ours, theirs = (run_folder(done.stdout) / "adapter_model.safetensors" for done in (again, whole))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_a_bad_record_is_named_once(pages, tmp_path):
    (pages / "1.png").write_bytes(b"no page")
    done = together("train", *TRAIN, "--dataset", pages / "train.jsonl", "--output_dir", tmp_path)
    (line,) = errors(done)
    assert line.startswith(f"error: {pages / 'train.jsonl'}:2: image ")
    assert line.endswith("(and 1 more bad rows, on lines 6)")


@pytest.mark.slow
def test_a_run_of_two_processes_is_not_continued_by_one(pages, run_cli, tmp_path):
    arguments = (
        *TRAIN,
        "--dataset",
        pages / "train.jsonl",
        "--output_dir",
        tmp_path,
        "--max_steps",
        2,
        "--save_steps",
        1,
    )
    run = run_folder(together("train", *arguments).stdout)
    code, _, err = run_cli("train", *arguments, "--resume_from_checkpoint", run)
    assert code == 2
    assert "cannot be continued with another number of processes (2)" in err


@pytest.mark.slow
def test_a_sharded_base_holds_a_share_and_computes_the_same():
    done = together("tests.helpers.sharded")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as the whole") == 2
