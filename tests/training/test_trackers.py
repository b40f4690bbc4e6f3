"""--report_to: what trackers are told, what a run that fails or goes on leaves there, and trackers that are not there.

MLflow and W&B are no requirement of the tests: theirs run where they are installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import integration_utils

from mistral_ft.model import loading as model
from tests.conftest import ROOT, TINY, read_rows

STEPS = ("--max_steps", 2, "--save_strategy", "no", "--eval_steps", 2, "--eval_dataset")


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_gets_what_is_logged(pages, train_tiny):
    data = pages / "train.jsonl"
    run = train_tiny(data, "--report_to", "tensorboard", "--neftune_noise_alpha", 5, *STEPS, data)
    metrics, told = read_rows(run / "metrics.jsonl"), events(run / "tensorboard")
    for tag, name in {
        "train/loss": "loss", "train/learning_rate": "learning_rate", "eval/loss": "eval_loss",
        "eval/exact_match": "eval_exact_match",
    }.items():  # fmt: skip
        logged = {line["step"]: line[name] for line in metrics if name in line}
        assert {event.step: event.value for event in told.Scalars(tag)} == pytest.approx(logged)
    assert len(told.Scalars("train/loss")) == 2
    settings = json.loads(told.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    # The toolkit's own settings too, and transformers' as they were given.
    expected = {"run_name": run.name, "output_dir": str(run), "dataset": [str(data)], "lora_rank": 16, "max_steps": 2}
    assert {name: settings[name] for name in expected} == expected
    assert settings["neftune_noise_alpha"] == 5


def test_it_learns_what_it_would_without(pages, train_tiny):
    data = pages / "train.jsonl"
    runs = [
        train_tiny(data, *more, "--lora_dropout", "0.1", *STEPS, data) for more in ((), ("--report_to", "tensorboard"))
    ]
    assert len({(run / "adapter_model.safetensors").read_bytes() for run in runs}) == 1


def test_a_run_that_goes_on_stays_one_curve(pages, train_tiny):
    common = (pages / "train.jsonl", "--report_to", "tensorboard", "--max_steps", 4, "--save_steps", 2)
    run = train_tiny(*common)
    assert train_tiny(*common, "--resume_from_checkpoint", run / "checkpoint-2") == run
    assert [event.step for event in events(run / "tensorboard").Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_first_of_several_processes_reports(pages, tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "train",
            "--model_id", TINY, "--dataset", pages / "train.jsonl", "--output_dir", tmp_path / "output",
            "--report_to", "tensorboard", "--max_steps", "2",
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    assert done.returncode == 0
    (file,) = (tmp_path / "output").glob("*/tensorboard/*")
    assert [event.step for event in events(file.parent).Scalars("train/loss")] == [1, 2]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nobody", "--report_to nobody: nobody is not supported, only "),
        ("all", "--report_to all: name the trackers, such as --report_to tensorboard"),
        ("tensorboard,clearml", "--report_to clearml: ClearMLCallback requires 'clearml' to be installed."),
    ],
)
def test_trackers_that_are_not_there(pages, run_cli, tmp_path, name, problem):
    code, _, err = run_cli(
        "train", "--model_id", TINY, "--dataset", pages / "train.jsonl", "--output_dir", tmp_path, "--report_to", name
    )
    assert code == 2
    assert err.startswith(f"error: {problem}")
    assert err.count("\n") == 1


class NoLogin(integration_utils.TrainerCallback):
    def setup(self, args, state, model):
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")


def test_a_missing_login_is_said_before_the_base_is_loaded(pages, run_cli, tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", NoLogin)
    monkeypatch.setattr(model, "load_base", None)
    code, _, err = run_cli(
        "train", "--model_id", TINY, "--dataset", pages / "train.jsonl", "--output_dir", tmp_path / "output",
        "--report_to", "tensorboard,wandb",
    )  # fmt: skip
    assert code == 2
    assert err.splitlines()[-1] == "error: --report_to wandb: No API key configured. Use `wandb login` to log in."
    assert not any((tmp_path / "output").iterdir())


@pytest.mark.parametrize("rate", ["2e-3", "1e38"])  # with the second one, the second step's loss is no number
def test_mlflow_knows_how_the_run_ended(pages, run_cli, tmp_path, monkeypatch, rate):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store := f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    data = pages / "train.jsonl"
    code, _, _ = run_cli(
        "train", "--model_id", TINY, "--dataset", data, "--learning_rate", rate, "--report_to", "mlflow", *STEPS, data
    )
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs(["0"])
    assert (code, run.info.status) == {"2e-3": (0, "FINISHED"), "1e38": (2, "FAILED")}[rate]
    assert run.data.params["lora_rank"] == "16"
    assert run.data.params["learning_rate"] == str(float(rate))
    assert "hf_secret" not in str(run)
    if code == 0:
        (folder,) = Path("output").iterdir()
        assert run.info.run_name == folder.name
        logged = [line["loss"] for line in read_rows(folder / "metrics.jsonl") if "loss" in line]
        assert [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")] == logged
        assert run.data.metrics["eval_loss"] == read_rows(folder / "metrics.jsonl")[2]["eval_loss"]


class Gone(integration_utils.TrainerCallback):
    """MLflow's, whose server has gone away."""

    def setup(self, args, state, model):
        self._ml_flow = self

    def end_run(self, state):
        raise ConnectionError("no server")


def test_a_server_that_goes_away_costs_no_adapter(pages, run_cli, tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Gone)
    data = pages / "train.jsonl"
    code, out, err = run_cli(
        "train", "--model_id", TINY, "--dataset", data, "--output_dir", tmp_path / "output", "--report_to", "mlflow",
        *STEPS, data,
    )  # fmt: skip
    assert code == 0
    assert err.splitlines()[-1] == "warning: --report_to mlflow: no server"
    assert (Path(out.split("Adapter saved in ")[1].strip()) / "adapter_model.safetensors").is_file()


def test_wandb_keeps_a_run_in_its_folder(pages, train_tiny, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)  # an earlier run in this process may have set it
    monkeypatch.chdir(tmp_path)
    run = train_tiny(pages / "train.jsonl", "--report_to", "wandb", *STEPS, pages / "train.jsonl")
    (record,) = run.glob("wandb/offline-run-*/*.wandb")
    data = record.read_bytes()
    assert all(word in data for word in (run.name.encode(), b"lora_rank", b"train/loss", b"eval/exact_match"))
    assert not (tmp_path / "wandb").exists()
