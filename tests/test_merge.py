"""Merged folders: the base's own key names, files and types; whole or not there at all."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mistral_ft import merging
from mistral_ft.lora import Adapter
from mistral_ft.model import load_base
from mistral_ft.prompt import PromptEncoder
from tests.conftest import TINY

CPU = torch.device("cpu")


@pytest.fixture
def run(pages, train_tiny):
    return train_tiny(pages / "train.jsonl", "--max_steps", 2, "--vision_lora", "True", "--train_projector", "True")


def read_weights(folder) -> dict[str, torch.Tensor]:
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


def test_merged_folder_loads_without_peft_and_is_the_base_plus_the_adapter(run, run_cli, tmp_path):
    code, out, _ = run_cli("merge_lora_weights", run, tmp_path / "merged")
    assert code == 0
    assert out == f"Merged 38 of 54 tensors of {TINY} into {tmp_path / 'merged'}\n"

    base, merged = read_weights(TINY), read_weights(tmp_path / "merged")
    assert merged.keys() == base.keys()
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    assert sum(not torch.equal(merged[key], base[key]) for key in base) == 38
    index = "model.safetensors.index.json"
    assert (tmp_path / "merged" / index).read_bytes() == (TINY / index).read_bytes()
    assert (tmp_path / "merged/config.json").read_bytes() == (TINY / "config.json").read_bytes()

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    in_memory = load_base(TINY, CPU)
    Adapter(run).merge_into(in_memory, torch.bfloat16)
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_merged_tokenizer_gives_the_encoders_ids(run, run_cli, tmp_path):
    run_cli("merge_lora_weights", run, tmp_path / "merged")
    messages = [{"role": "user", "content": "'The' title?"}]
    expected = PromptEncoder.from_folder(run).encode(messages)[0]
    (tmp_path / "merged/tekken.json").unlink()  # else AutoTokenizer takes mistral-common's, where it is installed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False) == expected
    assert tokenizer.convert_tokens_to_ids("</s>") == tokenizer.eos_token_id == 2
    assert not list((tmp_path / "merged").glob("chat_template.json"))


def test_files_are_readable_by_others_and_no_code_is_copied(run, run_cli, tmp_path):
    run_cli("merge_lora_weights", run, tmp_path / "merged")
    for path in (tmp_path / "merged").iterdir():
        assert path.stat().st_mode & stat.S_IROTH, path
        assert path.suffix != ".py"


def test_the_newer_key_names_and_a_single_file_are_merged_too(run, run_cli, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY, base, ignore=shutil.ignore_patterns("model*", "__pycache__"))
    names = {"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head"}
    weights = {}
    for key, tensor in read_weights(TINY).items():
        old = next((old for old in names if key.startswith(old)), None)
        weights[names[old] + key.removeprefix(old) if old else f"model.{key}"] = tensor
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))

    code, _, err = run_cli("merge_lora_weights", run, tmp_path / "merged")
    assert code == 0, err
    merged = load_base(tmp_path / "merged", CPU).state_dict()
    expected = load_base(base, CPU)
    Adapter(run).merge_into(expected, torch.bfloat16)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged[name], tensor), name


def test_a_folder_with_something_in_it_is_refused(run, run_cli, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine.txt").write_text("keep")
    code, _, err = run_cli("merge_lora_weights", run, tmp_path / "merged")
    assert code == 2
    assert err == f"error: {tmp_path / 'merged'}: exists and is not an empty folder; give a new one\n"
    assert (tmp_path / "merged/mine.txt").read_text() == "keep"


def test_a_failure_leaves_nothing_behind(run, run_cli, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def fail(base, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "copy_other_files", fail)
    code, _, err = run_cli("merge_lora_weights", run, tmp_path / "merged")
    assert code == 130
    assert err.endswith("error: interrupted\n")
    assert sorted(tmp_path.iterdir()) == before


def test_a_base_without_one_of_the_layers_is_refused(run, run_cli, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"]["language_model.model.layers.1.mlp.up_proj.weight"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    code, _, err = run_cli("merge_lora_weights", run, tmp_path / "merged")
    assert code == 2
    assert "has no tensor for the adapter's layer model.language_model.layers.1.mlp.up_proj" in err


def test_what_a_killed_merge_left_is_removed(run, run_cli, tmp_path):
    dead = tmp_path / ".merged.999999999.abc.tmp"
    alive = tmp_path / f".merged.{os.getpid()}.abc.tmp"
    dead.mkdir()
    alive.mkdir()
    assert run_cli("merge_lora_weights", run, tmp_path / "merged")[0] == 0
    assert not dead.exists()
    assert alive.exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_base_with_a_broken_file_is_refused(run, run_cli, tmp_path, name):
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    (base / name).write_text("{")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    code, _, err = run_cli("merge_lora_weights", run, tmp_path / "merged")
    assert code == 2
    assert f"{name}: broken" in err
    assert not (tmp_path / "merged").exists()


def test_a_base_with_another_tokenizer_is_refused(run, run_cli, tmp_path):
    made = json.loads((run / "run.json").read_text())
    made["prompt"]["tokenizer_sha256"] = "0" * 64
    (run / "run.json").write_text(json.dumps(made))
    code, _, err = run_cli("merge_lora_weights", run, tmp_path / "merged")
    assert code == 2
    assert "its tokenizer is not the one that" in err


def test_a_name_is_looked_for_in_output(run, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_cli("merge_lora_weights", run.name, "merged")[0] == 0
    code, _, err = run_cli("merge_lora_weights", "no-such-run", "other")
    assert code == 2
    assert err == "error: no-such-run: no such adapter folder, and none in output/\n"
