"""Going on from the adapter of a finished run, on new or corrected data."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from tests.conftest import TINY, read_rows, write_jsonl


@pytest.fixture
def run(pages, train_tiny):
    """A run that has learned the pages a little, and its loss on them at the end."""
    data = pages / "train.jsonl"
    run = train_tiny(
        data, "--max_steps", 6, "--per_device_train_batch_size", 8, "--lora_rank", 4, "--vision_lora", "True",
        "--save_strategy", "no", "--eval_dataset", data, "--eval_steps", 6, "--eval_generate", 0,
    )  # fmt: skip
    return run, read_rows(run / "metrics.jsonl")[6]["eval_loss"]


def losses(run):
    return [line["loss"] for line in read_rows(run / "metrics.jsonl") if "loss" in line]


def test_it_begins_where_the_other_run_ended(run, pages, train_tiny, tmp_path):
    first, reached = run
    started = load_file(first / "adapter_model.safetensors")
    more = ("--max_steps", 2, "--per_device_train_batch_size", 8, "--eval_generate", 0)
    second = train_tiny(
        pages / "train.jsonl", "--config", first / "config.yaml", "--init_adapter", first, *more, "--eval_steps", 2
    )
    assert losses(first)[0] - reached > 0.5
    assert losses(second)[0] == pytest.approx(reached, abs=1e-4)
    assert losses(second)[1] < losses(second)[0]
    ended = load_file(second / "adapter_model.safetensors")
    assert ended.keys() == started.keys()
    # What it began with is left as it was.
    assert all((started[n] == t).all() for n, t in load_file(first / "adapter_model.safetensors").items())
    assert json.loads((second / "run.json").read_text())["settings"]["lora"]["init_adapter"] == str(first)
    # Text alone moves the text layers and leaves what the vision tower has learned.
    words = write_jsonl(pages / "words.jsonl", read_rows(pages / "train.jsonl")[6:7])
    third = train_tiny(
        words, "--init_adapter", second, "--lora_rank", 4, "--vision_lora", "True", "--max_steps", 1,
        "--weight_decay", 0, "--save_strategy", "no",
    )  # fmt: skip
    after = load_file(third / "adapter_model.safetensors")
    moved = {name for name in after if not (after[name] == ended[name]).all()}
    assert moved == {name for name in after if "vision_tower" not in name}


def test_a_stopped_run_goes_on_from_its_own_checkpoint(run, pages, train_tiny):
    common = (
        pages / "train.jsonl", "--init_adapter", run[0], "--lora_rank", 4, "--vision_lora", "True", "--max_steps", 4,
        "--save_steps", 2,
    )  # fmt: skip
    whole = train_tiny(*common)
    shutil.rmtree(run[0])  # is not needed any more
    again = train_tiny(*common, "--resume_from_checkpoint", whole / "checkpoint-2")
    assert again == whole
    assert losses(again)[2:] == losses(whole)[2:]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--lora_rank", 8], "was made with --lora_rank 4 --vision_lora True; give the same"),
        (["--lora_rank", 4, "--vision_lora", "True", "--use_dora", "True"], "was made with --use_dora False; give"),
        (["--lora_rank", 4, "--vision_lora", "True", "--model_id", "org/other"], f"was made with --model_id {TINY}; "),
    ],
)
def test_an_adapter_of_another_shape_is_refused(run, pages, run_cli, flags, reason):
    code, _, err = run_cli(
        "train", "--dataset", pages / "train.jsonl", "--model_id", TINY, "--init_adapter", run[0], *flags
    )
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: --init_adapter {run[0]}: {reason}")


@pytest.mark.parametrize("written", [None, {}, {"base_model": "b", "settings": []}])
def test_an_adapter_without_its_run_is_refused(run, pages, run_cli, tmp_path, written):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run[0] / name, tmp_path)
    if written is not None:
        (tmp_path / "run.json").write_text(json.dumps(written))
    code, _, err = run_cli("train", "--dataset", pages / "train.jsonl", "--model_id", TINY, "--init_adapter", tmp_path)
    assert code == 2
    assert err == f"error: --init_adapter {tmp_path}: there is no run.json of train's, which says what flags it needs\n"


def test_what_is_no_run_is_refused(pages, run_cli, tmp_path):
    code, _, err = run_cli(
        "train", "--dataset", pages / "train.jsonl", "--model_id", TINY, "--init_adapter", tmp_path / "none"
    )
    assert code == 2
    assert err == f"error: {tmp_path}/none/adapter_config.json: missing; an adapter folder made by train has one\n"
