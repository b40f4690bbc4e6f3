"""What a run leaves while it goes: its metrics, its plot, its status, and what a tracker gets."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from mistral_ft.plots import loss_plot
from mistral_ft.status import Status, read_status
from tests.conftest import TINY, read_rows


@pytest.fixture
def run(pages, train_tiny):
    return train_tiny(
        pages / "train.jsonl", "--max_steps", 4, "--save_steps", 2, "--eval_dataset", pages / "train.jsonl",
        "--eval_steps", 2,
    )  # fmt: skip


def test_the_files_of_a_run(run, run_cli):
    metrics = read_rows(run / "metrics.jsonl")
    assert metrics == json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [(m["step"], "eval_loss" in m) for m in metrics[:-1]] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True),
    ]  # fmt: skip
    status = read_status(run)
    assert (status["state"], status["step"], status["steps"], status["seconds_left"]) == ("done", 4, 4, 0)
    assert status["loss"] == metrics[4]["loss"]
    assert status["eval_loss"] == metrics[5]["eval_loss"]
    assert status["pid"] == os.getpid()
    ElementTree.fromstring((run / "loss.svg").read_bytes())

    code, out, _ = run_cli("train_status", run)
    assert code == 0
    assert out.startswith(f"done, step 4/4, loss {status['loss']:.4f}, eval loss {status['eval_loss']:.4f}, ")
    assert json.loads(run_cli("train_status", run, "--json", "--wait")[1]) == status


def test_lines_of_steps_that_are_made_again_are_dropped(pages, run, run_cli):
    before = read_rows(run / "metrics.jsonl")
    for name in ("adapter_config.json", "checkpoint-4/manifest.json"):
        (run / name).unlink()
    code, _, err = run_cli(
        "train", "--model_id", TINY, "--dataset", pages / "train.jsonl", "--learning_rate", "2e-3", "--lora_dropout", 0,
        "--max_steps", 4, "--save_steps", 2, "--eval_dataset", pages / "train.jsonl", "--eval_steps", 2,
        "--resume_from_checkpoint", run,
    )  # fmt: skip
    assert code == 0, err
    after = read_rows(run / "metrics.jsonl")
    assert [(m["step"], m.get("loss"), m.get("eval_loss")) for m in after] == [
        (m["step"], m.get("loss"), m.get("eval_loss")) for m in before
    ]


def test_a_process_that_is_gone_is_dead_whatever_it_wrote_last(tmp_path, run_cli):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    Status(tmp_path).update("training", step=3, steps=9)
    assert read_status(tmp_path)["state"] == "training"
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(status | {"pid": gone.pid}))
    assert read_status(tmp_path)["state"] == "dead"
    code, out, _ = run_cli("train_status", tmp_path)
    assert code == 1
    assert out.startswith("dead, step 3/9, updated 20")
    # On another machine the number says nothing.
    (tmp_path / "status.json").write_text(json.dumps(status | {"pid": gone.pid, "host": "elsewhere"}))
    assert read_status(tmp_path)["state"] == "training"


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt("stopped after step 3"), "stopped"), (ValueError("bad\nnews"), "failed")]
)
def test_how_a_run_ended_is_told(tmp_path, run_cli, error, state):
    status = Status(tmp_path)
    status.update("training", step=3, steps=9)
    with pytest.raises(type(error)), status.ended():
        raise error
    code, out, _ = run_cli("train_status", tmp_path)
    assert code == 1
    assert out.startswith(f"{state}, step 3/9, {' '.join(str(error).split())}, updated ")


def test_a_folder_without_status(tmp_path, run_cli):
    code, _, err = run_cli("train_status", tmp_path)
    assert code == 2
    assert err == f"error: {tmp_path / 'status.json'}: missing; is {tmp_path} the folder of a run?\n"


@pytest.mark.parametrize("change", [{"loss": "low"}, {"step": 3, "steps": None, "loss": None}, {"seconds_left": []}])
def test_a_status_that_someone_broke_is_one_line(change, tmp_path, run_cli):
    Status(tmp_path).update("training", **change)
    code, _, err = run_cli("train_status", tmp_path)
    assert (code, err) == (2, f"error: {tmp_path / 'status.json'}: broken: what should be a number is none\n")


@pytest.mark.parametrize("text", ["[" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "9" * 5000, "\0", '"\\ud800"'])
def test_a_status_that_is_no_object_is_one_line(text, tmp_path, run_cli):
    (tmp_path / "status.json").write_text(text)
    code, out, err = run_cli("train_status", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'status.json'}: broken: ")
    assert err.count("\n") == 1


def test_nothing_of_a_status_acts_on_the_terminal(tmp_path, run_cli):
    status = Status(tmp_path)
    status.update("training", step="\x1b[2J", steps="\u202e\r")
    with pytest.raises(FileNotFoundError), status.ended():
        raise FileNotFoundError(2, "no such file", os.fsdecode(b"a\xff\x1b[2J.jsonl"))
    code, out, _ = run_cli("train_status", tmp_path)
    assert code == 1
    assert out.startswith(r"failed, step \x1b[2J/\u202e\r, [Errno 2] no such file: 'a\udcff\x1b[2J.jsonl', updated 20")
    (tmp_path / "status.json").read_bytes().decode("utf-8")
    assert json.loads(run_cli("train_status", tmp_path, "--json")[1])["steps"] == "\u202e\r"


def test_a_loss_that_is_no_number_is_left_out(tmp_path, run_cli):
    status = Status(tmp_path)
    status.update("training", step=1, steps=2, loss=1.5, eval_loss=2.0)
    status.update("evaluating", loss=float("nan"), eval_loss=float("inf"))
    assert run_cli("train_status", tmp_path)[1].startswith("evaluating, step 1/2, updated 20")
    assert "NaN" not in (tmp_path / "status.json").read_text()
    (tmp_path / "status.json").write_text((tmp_path / "status.json").read_text().replace("1,", "1e999,", 1))
    assert run_cli("train_status", tmp_path, "--json")[0] == 2


def test_a_plot_shows_what_there_is():
    losses = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    plain = loss_plot(losses, None)
    assert "loss in training" in plain
    assert "evaluation" not in plain.split("aria-label")[1].split(">", 1)[1]
    full = loss_plot([*losses, {"step": 4, "eval_loss": 0.5, "eval_exact_match": 0.5}], 4)
    assert all(text in full for text in ("loss in evaluation", "best evaluation, step 4", "answers that are right"))
    assert ">0.2</text>" in full
    assert "mathdefault" not in full
    assert "var(" not in full  # it is a file of its own, without a page's colours
    ElementTree.fromstring(full)
