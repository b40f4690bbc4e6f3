"""Evaluation during training: right numbers, no trace in what is learned, and the best step is the one that is kept."""

import json
import os
import shutil
import signal

import pytest

from mistral_ft.data.dataset import measure_records
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.errors import UserError
from mistral_ft.files import write_json
from mistral_ft.prediction.decoding import GreedyDecoder
from mistral_ft.scoring.metrics import edit_counts
from mistral_ft.training import checkpoints
from mistral_ft.training.arguments import EvaluationArguments
from mistral_ft.training.evaluation import Evaluator, best_evaluation, verdict
from mistral_ft.training.examples import hold_out
from mistral_ft.training.run_folder import Run
from mistral_ft.training.run_log import METRICS_FILE
from mistral_ft.training.trainer import FinetuneTrainer
from tests.conftest import ROOT, TINY, make_page, read_rows, row, write_jsonl
from tests.training.test_distributed import TRAIN, run_folder, together


def history(run) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def evaluations(run) -> list[dict]:
    return [entry for entry in history(run) if "eval_loss" in entry]


def weights(run) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", [("--per_device_train_batch_size", 2), ("--pack_length", 256)])
def test_evaluation_leaves_no_trace_in_what_is_learned(pages, train_tiny, layout):
    data = pages / "train.jsonl"
    settings = ("--max_steps", 4, "--lora_dropout", 0.1, "--vision_lora", True, "--save_strategy", "no", *layout)
    plain = train_tiny(data, *settings)
    run = train_tiny(data, *settings, "--eval_dataset", data, "--eval_steps", 2, "--eval_on_start", True)
    assert [entry["step"] for entry in evaluations(run)] == [0, 2, 4]
    assert weights(run) == weights(plain)
    own = ("loss", "grad_norm", "learning_rate")
    logged = [[entry[name] for name in own] for entry in history(run) if "loss" in entry]
    assert logged == [[entry[name] for name in own] for entry in history(plain) if "loss" in entry]


@pytest.mark.parametrize("several", [False, True])
def test_answers_are_those_of_predict(train_tiny, run_cli, tmp_path, several):
    rows = read_rows(ROOT / "dataset/train.jsonl")
    learned, asked = write_jsonl(tmp_path / "a.jsonl", rows[:32]), write_jsonl(tmp_path / "b.jsonl", rows[32:42])
    processor = Processor.from_folder(TINY)
    sizes = measure_records(read_records([asked], ROOT / "dataset"), processor, 1000)
    longest = max(size.labels for size in sizes)  # an answer is given no more tokens than that
    if several:  # the right answer that is learned is the shorter one
        write_jsonl(asked, [r | {"expected": ["No.", r["expected"]]} for r in rows[32:42]])
    images = ("--images_dir", ROOT / "dataset")
    run = train_tiny(
        learned, *images, "--eval_dataset", asked, "--num_train_epochs", 1, "--learning_rate",
        "3e-3", "--per_device_train_batch_size", 4, "--train_projector", True, "--save_strategy", "no",
    )  # fmt: skip
    (last,) = evaluations(run)
    assert last["epoch"] == 1  # of itself, after each epoch
    predicted = tmp_path / "out.jsonl"
    assert run_cli("predict", asked, run, *images, "-o", predicted, "--max_new_tokens", longest)[0] == 0
    score = json.loads(run_cli("score", predicted, "--json")[1])
    assert last["eval_exact_match"] == score["hits"] / 10 > 0
    assert [row["expected"] for row in read_rows(predicted)] == [row["expected"] for row in read_rows(asked)]
    found = [
        edit_counts(row["actual"], before["expected"])[:2]
        for row, before in zip(read_rows(predicted), rows[32:42], strict=True)
    ]
    assert last["eval_cer"] == sum(edits for edits, _ in found) / sum(count for _, count in found) > 0


@pytest.fixture
def losses(monkeypatch):
    """Have evaluations find these losses at these steps."""

    def set_losses(by_step):
        evaluate, steps = FinetuneTrainer.evaluate, []

        def noting(self, *args, **kwargs):
            steps.append(self.state.global_step)
            return evaluate(self, *args, **kwargs)

        monkeypatch.setattr(FinetuneTrainer, "evaluate", noting)
        monkeypatch.setattr(Evaluator, "measure", lambda self, model, args, how: {"eval_loss": by_step[steps[-1]]})

    return set_losses


STOPPED = ("--max_steps", 12, "--eval_steps", 2, "--save_steps", 3, "--lora_dropout", 0.1)


def test_the_best_step_is_kept_and_restored(pages, train_tiny, losses, capsys):
    data = pages / "train.jsonl"
    losses({2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 1.5})
    run = train_tiny(data, *STOPPED, "--eval_dataset", data, "--early_stopping_patience", 3, "--save_total_limit", 1)
    assert [entry["step"] for entry in evaluations(run)] == [2, 4, 6, 8, 10]
    kept = sorted(path.name for path in run.glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-9"]
    assert weights(run) == weights(run / "checkpoint-4") != weights(run / "checkpoint-9")


def test_a_run_that_is_continued_knows_its_best_step(pages, train_tiny, losses, tmp_path):
    data = pages / "train.jsonl"
    losses({0: 9.0, 2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 1.5})
    settings = (*STOPPED, "--eval_dataset", data, "--early_stopping_patience", 3, "--eval_on_start", True)
    whole = train_tiny(data, *settings)
    stopped = tmp_path / "output" / "stopped"
    shutil.copytree(whole, stopped)
    for path in [stopped / "checkpoint-9", stopped / "adapter_model.safetensors", stopped / "adapter_config.json"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train_tiny(data, *settings, "--resume_from_checkpoint", stopped)
    assert resumed == stopped
    assert evaluations(resumed) == evaluations(whole)
    assert weights(resumed) == weights(whole)


def signal_at(monkeypatch, place, call: int) -> list[int]:
    """Have a method's call of this number in evaluations find a signal; the list grows by one a call."""
    method, calls = {FinetuneTrainer: "compute_loss", GreedyDecoder: "_step"}[place], []
    original = getattr(place, method)

    def signalled(self, *args, **kwargs):
        if not self.model.training:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(place, method, signalled)
    return calls


def log_of(run) -> list[dict]:
    """metrics.jsonl without what depends on the machine."""
    timed = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    rows = [{name: value for name, value in row.items() if name not in timed} for row in read_rows(run / METRICS_FILE)]
    return [row for row in rows if "total_flos" not in row]


# Eight records in four batches: an evaluation has four of them, then decodes answers.
@pytest.mark.parametrize(
    ("settings", "place", "call", "step"),
    [
        # In the second batch of the first evaluation: nothing else asks for a checkpoint.
        ("--max_steps 6 --eval_steps 2 --save_strategy no", FinetuneTrainer, 2, 2),
        # In the third token of its answers.
        ("--max_steps 6 --eval_steps 2 --save_steps 2", GreedyDecoder, 3, 2),
        # After the first epoch, whose end is not the run's.
        ("--num_train_epochs 2 --eval_strategy epoch --save_strategy best", FinetuneTrainer, 1, 4),
        # In the last evaluation: there is no step to make any more.
        ("--num_train_epochs 1 --eval_strategy epoch --save_strategy epoch", FinetuneTrainer, 4, 4),
    ],
)
def test_a_signal_ends_an_evaluation_which_is_made_when_the_run_goes_on(
    pages, train_tiny, run_cli, monkeypatch, tmp_path, settings, place, call, step
):
    data = pages / "train.jsonl"
    common = ("--per_device_train_batch_size", 2, "--lora_dropout", 0.1, "--eval_dataset", data, *settings.split())
    common += ("--lr_scheduler_type", "reduce_lr_on_plateau", "--early_stopping_patience", 5)
    whole = train_tiny(data, *common)
    command = ["--model_id", TINY, "--learning_rate", "2e-3", "--dataset", data, "--output_dir", tmp_path / "stopped"]
    command += [*common, "--resume_from_checkpoint", "auto"]
    with monkeypatch.context() as patch:
        calls = signal_at(patch, place, call)
        code, out, err = run_cli("train", *command)
    assert code == 130
    assert err.endswith(f"error: stopped after step {step}, which is saved\n")
    assert len(calls) == call  # nothing more was evaluated
    assert f"step {step}: eval loss" not in out
    (run,) = (tmp_path / "stopped").iterdir()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    state = json.loads((run / f"checkpoint-{step}/trainer_state.json").read_text())
    assert not any("eval_loss" in entry for entry in state["log_history"])
    code, out, err = run_cli("train", *command)
    assert code == 0, err
    assert out.count(f"step {step}: eval loss") == 1
    assert weights(run) == weights(whole)
    assert log_of(run) == log_of(whole)
    assert {path.name for path in whole.glob("checkpoint-*")} <= {path.name for path in run.glob("checkpoint-*")}


def test_a_signal_in_the_middle_of_an_epoch_evaluates_nothing(pages, train_tiny, run_cli, monkeypatch, tmp_path):
    step, calls = FinetuneTrainer.training_step, []

    def signalled_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(FinetuneTrainer, "training_step", signalled_step)
    data, output = pages / "train.jsonl", tmp_path / "output"
    code, out, err = run_cli("train", *TRAIN, "--dataset", data, "--output_dir", output, "--eval_dataset", data)
    assert code == 130
    assert err.endswith("error: stopped after step 2, which is saved\n")
    assert "eval loss" not in out


def test_a_signal_before_the_first_step_leaves_nothing(pages, run_cli, monkeypatch, tmp_path):
    data, output = pages / "train.jsonl", tmp_path / "output"
    signal_at(monkeypatch, FinetuneTrainer, 1)
    command = (*TRAIN, "--dataset", data, "--output_dir", output, "--eval_dataset", data, "--eval_on_start", True)
    code, _, err = run_cli("train", *command)
    assert code == 130
    assert err.endswith("error: stopped before a step\n")
    assert not any(output.iterdir())


def test_a_signal_while_the_adapter_is_saved_costs_nothing(pages, train_tiny, monkeypatch):
    save = Run.save_adapter

    def signalled(self, model):
        os.kill(os.getpid(), signal.SIGINT)
        save(self, model)

    monkeypatch.setattr(Run, "save_adapter", signalled)
    run = train_tiny(pages / "train.jsonl", "--max_steps", 1, "--save_strategy", "no")
    assert (run / "adapter_config.json").is_file()
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_an_evaluation_that_a_kill_cut_off_is_made_when_the_run_goes_on(pages, train_tiny, losses, tmp_path):
    """A checkpoint that knows nothing of the evaluation at its step, as older versions wrote at an epoch's end."""
    data = pages / "train.jsonl"
    losses({8: 1.0, 16: 2.0, 24: 3.0})
    settings = ("--num_train_epochs", 3, "--eval_dataset", data, "--early_stopping_patience", 1, "--save_steps", 8)
    whole = train_tiny(data, *settings)
    assert [entry["step"] for entry in evaluations(whole)] == [8, 16]
    killed = shutil.copytree(whole, tmp_path / "output" / "killed")
    last = killed / "checkpoint-16"
    state = json.loads((last / "trainer_state.json").read_text())
    state["log_history"] = [entry for entry in state["log_history"] if entry.get("eval_loss") != 2.0]
    (last / "trainer_state.json").write_text(json.dumps(state))
    (last / "manifest.json").unlink()
    checkpoints._complete(last.rename(tmp_path / "checkpoint-16"), last, 16, True)
    assert train_tiny(data, *settings, "--resume_from_checkpoint", killed) == killed
    assert evaluations(killed) == evaluations(whole)  # and it is over, for want of patience
    assert weights(killed) == weights(whole)


def test_a_run_that_lost_patience_goes_no_further_when_it_is_continued(pages, train_tiny, losses, capsys):
    data = pages / "train.jsonl"
    losses({1: 1.0, 2: 2.0})
    settings = ("--max_steps", 4, "--eval_dataset", data, "--eval_steps", 1, "--save_steps", 1)
    run = train_tiny(data, *settings, "--early_stopping_patience", 1)
    before = weights(run)
    assert train_tiny(data, *settings, "--early_stopping_patience", 1, "--resume_from_checkpoint", run) == run
    assert [entry["step"] for entry in evaluations(run)] == [1, 2]
    assert weights(run) == before == weights(run / "checkpoint-1")


def names(run) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


@pytest.fixture
def seen(monkeypatch) -> list[list[str]]:
    """The checkpoints that are there after each one was written."""
    remove, found = checkpoints.remove_old, []

    def remove_and_look(run, *args):
        remove(run, *args)
        found.append(names(run))

    monkeypatch.setattr(checkpoints, "remove_old", remove_and_look)
    return found


BETTER_AND_BETTER = {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0, 5: 6.0}


@pytest.mark.slow
def test_checkpoints_of_steps_that_were_once_the_best_go(pages, train_tiny, losses, seen):
    data = pages / "train.jsonl"
    losses(BETTER_AND_BETTER)
    settings = ("--max_steps", 5, "--eval_dataset", data, "--eval_steps", 1, "--load_best_model_at_end", True)
    run = train_tiny(data, *settings, "--save_strategy", "no")
    assert seen == [["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"], ["checkpoint-4"]]
    assert names(run) == []  # none was asked for
    seen.clear()
    run = train_tiny(data, *settings, "--save_steps", 3)
    assert seen == [
        ["checkpoint-1"],
        ["checkpoint-2"],
        ["checkpoint-3"],
        ["checkpoint-3", "checkpoint-4"],
        ["checkpoint-3", "checkpoint-4", "checkpoint-5"],
    ]
    seen.clear()
    assert names(train_tiny(data, *settings, "--save_strategy", "best")) == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
    assert names(train_tiny(data, *settings, "--save_strategy", "no", "--save_minutes", 1e-9)) == [
        f"checkpoint-{step}" for step in (1, 2, 3, 4, 5)
    ]


def test_the_checkpoint_that_a_run_goes_on_from_stays_until_it_is_over(pages, train_tiny, losses, seen, tmp_path):
    data = pages / "train.jsonl"
    losses(BETTER_AND_BETTER)
    settings = ("--max_steps", 5, "--eval_dataset", data, "--eval_steps", 1, "--load_best_model_at_end", True)
    settings += ("--save_strategy", "no")
    with pytest.MonkeyPatch.context() as patch:  # as if it had been killed just then
        patch.setattr(checkpoints, "remove_all_unless_due", lambda run: None)
        run = train_tiny(data, *settings)
    expected = weights(run)
    # One that another process had left half removed, and older ones that a kill saved from being removed.
    for step in (1, 2):
        copy = shutil.copytree(run / "checkpoint-4", run / f"checkpoint-{step}")
        state = json.loads((copy / "trainer_state.json").read_text())
        assert state["global_step"] == 4
    seen.clear()
    run = train_tiny(data, *settings, "--resume_from_checkpoint", run / "checkpoint-4")
    assert seen == []  # step 5 is no better
    assert weights(run) == expected
    assert names(run) == []


def test_what_stays_of_checkpoints(tmp_path):
    def make(*steps, due=()):
        shutil.rmtree(tmp_path, ignore_errors=True)
        for step in steps:
            (tmp_path / f"checkpoint-{step}").mkdir(parents=True)
            write_json(tmp_path / f"checkpoint-{step}/manifest.json", {"due": step in due, "files": {}})

    def left(step, keep=None, best=None, origin=None):
        checkpoints.remove_old(tmp_path, step, keep, best, origin)
        return sorted(int(name.removeprefix("checkpoint-")) for name in names(tmp_path))

    make(2, 3, 4, 5, 6, 7, due=(2, 4, 6))
    assert left(7, best=5, origin=3) == [2, 3, 4, 5, 6, 7]
    assert left(7, best=5) == [2, 4, 5, 6, 7]
    assert left(7, best=5, keep=2) == [5, 6, 7]
    make(2, 4, 6, due=(2, 4, 6))  # continued from 2, and 6 is of the time before
    assert left(4, keep=1) == [4, 6]
    make(2, 3, 4)
    (tmp_path / "checkpoint-2/manifest.json").write_text("{")  # nobody can tell
    assert left(4) == [2, 4]
    checkpoints.remove_all_unless_due(tmp_path)
    assert left(4) == [2, 4]
    make(2, 4)
    checkpoints.remove_all_unless_due(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_being_asked_the_last_step_is_kept(pages, run_cli, losses, tmp_path):
    data = pages / "train.jsonl"
    losses({1: 3.0, 2: 1.0, 3: 2.0})
    code, out, err = run_cli(
        "train", *TRAIN, "--dataset", data, "--output_dir", tmp_path / "output", "--max_steps", 3, "--eval_steps", 1,
        "--eval_dataset", data,
    )  # fmt: skip
    assert code == 0, err
    assert (
        "eval loss rose after step 2 (epoch 0.25), from 1.0000 to 2.0000: the adapter is that of step 3; "
        "--load_best_model_at_end True keeps the best\n"
    ) in out
    assert weights(run_folder(out)) == weights(run_folder(out) / "checkpoint-3")


def test_a_best_step_that_is_gone_costs_no_adapter(pages, run_cli, losses, tmp_path, monkeypatch):
    data = pages / "train.jsonl"
    losses({1: 1.0, 2: 2.0})
    from mistral_ft.training import trainer as training

    monkeypatch.setattr(training.checkpoints, "fault", lambda path: "it is gone")
    code, out, err = run_cli(
        "train", *TRAIN, "--dataset", data, "--output_dir", tmp_path / "output", "--max_steps", 2, "--eval_steps", 1,
        "--eval_dataset", data, "--load_best_model_at_end", True,
    )  # fmt: skip
    assert code == 0
    assert "checkpoint-1: the best step cannot be restored, it is gone" in err
    assert "the adapter is that of step 2" in out


LOG = [
    {"step": 0, "epoch": 0, "eval_loss": 0.1, "eval_exact_match": 0.9},
    {"step": 5, "epoch": 0.5, "eval_loss": 0.5, "eval_exact_match": 0.2},
    {"step": 6, "epoch": 0.6, "loss": 0.01},
    {"step": 10, "epoch": 1.0, "eval_loss": 0.7, "eval_exact_match": 0.4},
    {"step": 15, "epoch": 1.5, "eval_loss": 0.5, "eval_exact_match": 0.4},
]


def test_what_is_best_depends_on_the_metric():
    assert best_evaluation(LOG, "loss")["step"] == 5  # the first of equals, and never the untrained model
    assert best_evaluation(LOG, "exact_match")["step"] == 10
    assert best_evaluation(LOG[:1], "loss") is None
    assert verdict(LOG, "exact_match", kept=10) == (
        "exact match grew no better after step 10 (epoch 1), from 0.4000 to 0.4000: the adapter is that of step 10"
    )
    assert verdict(LOG[:4], "loss", kept=5) == (
        "eval loss rose after step 5 (epoch 0.5), from 0.5000 to 0.7000: the adapter is that of step 5"
    )
    assert verdict(LOG[:2], "loss", kept=5) == (
        "eval loss was best at the end, 0.5000 at step 5 (epoch 0.5): the adapter is that of step 5"
    )


def test_records_of_one_page_are_held_out_together(tmp_path):
    rows = []
    for number in range(10):
        make_page(tmp_path / f"{number}.png", number + 1)
        shutil.copy(tmp_path / f"{number}.png", tmp_path / f"copy-{number}.png")
        rows += [row(number, "a", [f"{number}.png"]), row(number, "b", [f"copy-{number}.png"], text="Other?")]
        rows.append(row(number, f"c {number}", text=f"Text {number // 2}?"))
    records = read_records([write_jsonl(tmp_path / "rows.jsonl", rows)])
    held = hold_out(records, 0.2, seed=1)
    assert sum(held) == 6
    assert held == hold_out(records, 0.2, seed=1) != hold_out(records, 0.2, seed=2)
    for number in range(10):
        assert held[3 * number] == held[3 * number + 1]
        assert held[3 * number + 2] == held[3 * (number ^ 1) + 2]  # two rows ask the same
    with pytest.raises(UserError, match="--eval_fraction 0.01: 2 records cannot be divided so"):
        hold_out(records[:2], 0.01, seed=1)


def test_held_out_records_are_not_trained(pages, train_tiny, run_cli):
    run = train_tiny(pages / "train.jsonl", "--eval_fraction", 0.4, "--num_train_epochs", 1, "--save_strategy", "no")
    made = json.loads((run / "run.json").read_text())
    assert made["data"]["rows"] == 5
    assert len([entry for entry in history(run) if "loss" in entry]) == 5
    code, _, err = run_cli(
        "train", *TRAIN, "--dataset", pages / "train.jsonl", "--resume_from_checkpoint", run, "--eval_fraction", 0.1
    )
    assert code == 2
    assert "holds no complete checkpoint" in err


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(pages, train_tiny, tmp_path):
    data = write_jsonl(pages / "seven.jsonl", read_rows(pages / "train.jsonl")[1:])
    common = ("--max_steps", 2, "--eval_dataset", data, "--eval_steps", 1, "--save_strategy", "no")
    one = train_tiny(data, "--gradient_accumulation_steps", 2, *common)
    done = together("train", *TRAIN, "--dataset", data, "--output_dir", tmp_path / "two", *common)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1: eval loss ") == 1
    for ours, theirs in zip(evaluations(one), evaluations(run_folder(done.stdout)), strict=True):
        assert theirs | {"epoch": 0} == pytest.approx(ours | {"epoch": 0}, rel=1e-4)  # their last turns may be empty
    assert evaluations(one)[0].keys() >= {"eval_loss", "eval_exact_match", "eval_cer"}


@pytest.mark.slow
def test_a_sharded_base_is_evaluated_by_its_loss(pages, tmp_path):
    data = pages / "train.jsonl"
    done = together(
        "train", *TRAIN, "--dataset", data, "--output_dir", tmp_path / "two", "--max_steps", 1, "--eval_dataset", data,
        "--shard_base", True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = evaluations(run_folder(done.stdout))
    assert 1 < found["eval_loss"] < 20
    assert "eval_exact_match" not in found


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--eval_fraction", 0.1, "--eval_dataset", "x"), "--eval_dataset and --eval_fraction: give one of them"),
        (("--eval_fraction", 1), "--eval_fraction 1: must be more than 0 and less than 1"),
        (("--eval_fraction", 0.1, "--eval_generate", -1), "--eval_generate -1: must be at least 0"),
        (("--early_stopping_patience", 2), "--early_stopping_patience has no effect without --eval_dataset or"),
        (("--eval_generate", 2), "--eval_generate has no effect without --eval_dataset or --eval_fraction"),
        (("--eval_steps", 2), "--eval_steps has no effect without --eval_dataset or --eval_fraction"),
        (("--load_best_model_at_end", True), "--load_best_model_at_end has no effect without --eval_dataset or"),
        (("--eval_fraction", 0.1, "--eval_strategy", "steps"), "--eval_strategy steps needs --eval_steps"),
        (
            ("--eval_fraction", 0.1, "--metric_for_best_model", "cer", "--eval_generate", 0),
            "--metric_for_best_model cer needs answers: --eval_generate 16",
        ),
        (
            ("--eval_fraction", 0.1, "--metric_for_best_model", "f1"),
            "--metric_for_best_model f1: must be one of loss, exact_match, cer",
        ),
        (("--eval_fraction", 0.1, "--greater_is_better", True), "--greater_is_better: which way is better is known"),
        (("--eval_fraction", 0.1, "--per_device_eval_batch_size", 4), "--per_device_eval_batch_size: evaluation lays"),
    ],
)
def test_flags_that_cannot_act_are_refused(pages, run_cli, tmp_path, arguments, problem):
    data = pages / "train.jsonl"
    code, _, err = run_cli("train", "--model_id", TINY, "--dataset", data, "--output_dir", tmp_path, *arguments)
    assert code == 2
    assert err.startswith(f"error: {problem}")
    assert err.count("\n") == 1


def test_answers_need_whole_layers():
    class Args:
        given, save_strategy, eval_strategy, metric_for_best_model = {}, "steps", "epoch", "loss"

    arguments = EvaluationArguments(eval_fraction=0.1, eval_generate=4)
    (problem,) = arguments.problems(Args, shard_base=True)
    assert problem.startswith("--eval_generate needs whole layers")
    Args.metric_for_best_model = "cer"
    (problem,) = EvaluationArguments(eval_fraction=0.1).problems(Args, shard_base=True)
    assert problem.startswith("--metric_for_best_model cer needs answers")


def test_a_bad_row_of_the_evaluation_is_named(pages, run_cli, tmp_path):
    data = write_jsonl(pages / "eval.jsonl", [row(1, "a", ["nowhere.png"])])
    code, _, err = run_cli(
        "train", *TRAIN, "--dataset", pages / "train.jsonl", "--output_dir", tmp_path, "--eval_dataset", data
    )
    assert code == 2
    assert f"error: {data}:1: image {pages / 'nowhere.png'} does not exist" in err
