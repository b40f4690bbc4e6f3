"""Settings from a file: the run's own repeats it, the command line wins, and what nobody knows is refused by name."""

import json

import pytest

from tests.conftest import TINY, read_rows, write_jsonl

SETTINGS = {
    "model_id": str(TINY),
    "learning_rate": "1e-3",  # YAML reads 1e-3, without a point, as text
    "max_steps": 2,
    "lora_rank": 4,
    "train_projector": True,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.5},
    "images_dir": None,
}


@pytest.fixture
def train(run_cli):
    def train(*arguments):
        code, out, err = run_cli("train", *arguments)
        return out.split("Adapter saved in ")[1].strip() if code == 0 else err.strip()

    return train


@pytest.fixture
def config(pages, tmp_path):
    data = [str(pages / "train.jsonl"), str(write_jsonl(pages / "more.jsonl", read_rows(pages / "train.jsonl")[:2]))]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SETTINGS | {"dataset": data, "output_dir": str(tmp_path / "output")}))
    return path


def test_the_runs_own_file_repeats_it(train, config, tmp_path):
    first = tmp_path / train("--config", config, "--lora_rank", 8)
    made = json.loads((first / "run.json").read_text())
    assert made["settings"]["lora"] == {"lora_rank": 8, "train_projector": True}
    assert made["data"]["rows"] == 10
    again = tmp_path / train("--config", first / "config.yaml")
    assert again != first
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.yaml"):
        assert (again / name).read_bytes() == (first / name).read_bytes()
    other = tmp_path / train("--config", first / "config.yaml", "--seed", 7)
    assert (other / "adapter_model.safetensors").read_bytes() != (first / "adapter_model.safetensors").read_bytes()
    assert "seed: 7\n" in (other / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lora_rang: 3", "unknown setting lora_rang (did you mean lora_rank?)"),
        ("lora-rank: 3\nqqq: 1", "unknown setting lora-rank (did you mean lora_rank?); unknown setting qqq"),
        ("config: other.yaml", "unknown setting config"),
        ("warmup_ratio: 0.1", "warmup_ratio is gone from transformers: write --warmup_steps 0.03"),
        (
            "init_lora_weights: pissa",
            "init_lora_weights is left out: PiSSA, OLoRA and the like change the base's weights",
        ),
        ("seed: [1, 2]", "seed takes one value"),
        ("- lora_rank", "expected names and values, such as lora_rank: 16"),
        ("", "expected names and values"),
        ("a: [", "broken: while parsing a flow node"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(train, tmp_path, text, problem):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    line = train("--config", path)
    assert line.startswith(f"error: {path}: {problem}")
    assert "\n" not in line


def test_values_are_checked_as_on_the_command_line(train, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lora_rank: high")
    assert "argument --lora_rank/--lora-rank: invalid int value: 'high'" in train("--config", path)
    path.write_text("lora_rank: 0\nlabel_smoothing_factor: 0.1")
    assert "--label_smoothing_factor: the loss is computed at label positions" in train("--config", path)
    assert (
        train("--config", tmp_path / "nowhere.yaml") == f"error: {tmp_path / 'nowhere.yaml'}: no such file of settings"
    )
    assert train("--config") == "error: argument --config: expected one argument (see python -m train --help)"
